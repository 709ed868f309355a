"""What the server measures of itself, for Prometheus, under the names of instruments.py.

One registry per application, so several can live in one process. All methods run on the event
loop.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
)

from offramp import __version__
from offramp.models.sampling_params import DraftSource, KVFill
from offramp.server import instruments
from offramp.server.errors import OfframpError, RequestError, ServiceUnavailable

if TYPE_CHECKING:
    from offramp.server.api.http_metrics import HttpExchange
    from offramp.server.engine.request import (
        EngineInfo,
        EngineOutput,
        GenerationRequest,
        RequestStats,
        StepStats,
        TokenEvent,
    )

logger = logging.getLogger("offramp.metrics")

# Values of the one label of a name, as far as they are known before the model is.
_VALUES: Final[Mapping[str, Sequence[str]]] = {
    "vllm:request_success": ("stop", "length", "tool_calls", "abort", "error"),
    "vllm:prompt_tokens_by_source": ("local_compute", "local_cache_hit"),
    "vllm:prompt_tokens_cached_by_source": ("device",),
    "vllm:num_requests_waiting_by_reason": ("capacity", "deferred"),
    "vllm:spec_decode_num_accepted_tokens_per_pos": tuple(map(str, range(8))),
    "offramp:draft_tokens": tuple(DraftSource),
    "offramp:accepted_tokens": tuple(DraftSource),
    "offramp:kv_fill_tokens": tuple(KVFill),
    "offramp:decisions": ("predicate", "choice", "score"),
}
_VERSIONS: Final = (__version__, platform.python_version(), metadata.version("torch"))
_LAG_EVERY_S: Final = 0.1
# Samples that are counted at once at most: in a millisecond or two.
_MOST_PENDING: Final = 256


class Metrics:
    """The instruments of one server."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            self.registry.register(collector)
        self._who = (model_name, "0")
        self._made: dict[str, Any] = {
            each.name: each.make(self.registry)
            for each in instruments.ALL
            if each is not instruments.EXIT_LAYER
        }
        self._plain: dict[str, Any] = {
            each.name: self._made[each.name].labels(*self._who)
            for each in instruments.ALL
            if not each.labels and each.who and each is not instruments.EXIT_LAYER
        }
        self._series: dict[tuple[str, tuple[str, ...]], Any] = {}
        # Series that exist from the start have rates from the start.
        for name, values in _VALUES.items():
            for value in values:
                self._labelled(name, value)
        for code in _refusals(RequestError, ServiceUnavailable):
            self._labelled("offramp:requests_refused", code)
        for reason in ("max_num_queued_reqs", "max_num_queued_tokens"):
            self._made["vllm:admission_rejections"].labels(model_name, reason)
        self._labelled("offramp:build_info", *_VERSIONS).set(1)
        self._exit_layers: tuple[int, ...] = ()
        self._num_layers = 0
        self._restarts = 0
        self._pending: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._counting = threading.Lock()
        self._state: StepStats | None = None
        self._shown: StepStats | None = None
        """The last step, and the one whose state the gauges show."""

    def later(self, count: Callable[..., None], *what: Any) -> None:
        """Call ``count(*what)`` within a tenth of a second, and before anybody reads the metrics.

        What happens for every token is counted so: many samples at once take a sixth of the time
        that they take one by one, between passes that leave nothing of it in the caches.
        """
        self._pending.append((count, what))
        if len(self._pending) >= _MOST_PENDING:
            self._count_pending()

    def collect(self) -> Iterator[Any]:
        """Count what is pending: as the registry's first collector, which has no series itself.

        May run on another thread.
        """
        self._count_pending()
        return iter(())

    def _count_pending(self) -> None:
        # In order, so one thread at a time.
        with self._counting:
            while self._pending:
                count, what = self._pending.popleft()
                try:
                    count(*what)
                except Exception:
                    # A fault in the accounting must not cost the rest of it.
                    logger.exception("a sample cannot be counted")
            state = self._state
            if state is not None and state is not self._shown:
                self._show(state)
                self._shown = state

    def configure(self, info: EngineInfo) -> None:
        """Add what depends on the loaded engine; call once."""
        self._num_layers = info.num_layers
        layers = (*info.exit_layers, info.num_layers)
        buckets = [float(layer) for layer in sorted({*layers, *info.decision_layers})]
        exit_layer = instruments.EXIT_LAYER
        self._made[exit_layer.name] = exit_layer.make(self.registry, buckets)
        for segment in range(len(layers)):
            self._labelled("offramp:segment_queue_depth", str(segment))
        for layer in layers:
            self._labelled("offramp:exit_tokens", str(layer))
        self._exit_layers = info.exit_layers
        self._set_thresholds(info.exit_thresholds)
        for state in ("awake", "weights_offloaded", "discard_all"):
            self._labelled("vllm:engine_sleep_state", state).set(state == "awake")
        facts = (str(info.block_size), str(info.num_blocks), info.cache_dtype)
        self._labelled("vllm:cache_config_info", *facts).set(1)

    def observe(self, output: EngineOutput) -> None:
        """Take in what an engine step did; events are counted by `RequestObserver`."""
        if output.stats is not None:
            self._state = output.stats
            self.later(self._observe_step, output.stats)

    def request(self, request: GenerationRequest, n: int, submitted_at: float) -> RequestObserver:
        """Follow one sequence; ``n`` is how many its HTTP request asked for.

        ``submitted_at`` is when the engine was asked, in seconds on the monotonic clock.
        """
        self.record("vllm:request_params_n", n)
        self.record("vllm:request_params_max_tokens", request.sampling.max_tokens)
        return RequestObserver(self, request, submitted_at)

    def record(self, name: str, value: float) -> None:
        """Add a sample to a histogram."""
        self._plain[name].observe(value)

    def count(self, name: str, amount: float = 1) -> None:
        """Raise a counter."""
        if amount:
            self._plain[name].inc(amount)

    def refused(self, code: str) -> None:
        """Count an error that a client was answered with."""
        self._labelled("offramp:requests_refused", code).inc()

    def rejected(self, reason: str) -> None:
        """Count a request that a full queue refused, by the option that bounds it."""
        self._made["vllm:admission_rejections"].labels(self._who[0], reason).inc()

    def http(self, exchange: HttpExchange) -> None:
        """Count an answered HTTP request."""
        handler, method = exchange.handler, exchange.method
        status = f"{exchange.status // 100}xx"
        self._made["http_requests"].labels(handler, method, status).inc()
        self._made["http_request_duration_seconds"].labels(handler, method).observe(
            exchange.seconds
        )
        self._made["http_request_duration_highr_seconds"].observe(exchange.seconds)
        self._made["http_request_size_bytes"].labels(handler).observe(exchange.received)
        self._made["http_response_size_bytes"].labels(handler).observe(exchange.sent)

    def server(
        self, states: Mapping[str, bool], restarts: int, in_flight: int, connections: int
    ) -> None:
        """Take in what others count, as it is now; ``states`` are those the engine can be in."""
        for state, is_now in states.items():
            self._labelled("offramp:engine_state", state).set(is_now)
        self.count("offramp:engine_restarts", restarts - self._restarts)
        self._restarts = restarts
        self._plain["offramp:requests_in_flight"].set(in_flight)
        self._plain["offramp:open_connections"].set(connections)

    async def watch_lag(self) -> None:
        """Measure for ever how late the event loop is, and count what is pending."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            self.record("offramp:event_loop_lag_seconds", max(0.0, loop.time() - due))
            self._count_pending()

    def finished(self, reason: str) -> None:
        """Count the end of a sequence."""
        self._labelled("vllm:request_success", reason).inc()

    def tokens(self, exit_layers: Sequence[int], phase: str) -> None:
        """Count generated tokens by the layer they left after."""
        for layer in exit_layers:
            self._labelled("offramp:exit_tokens", str(layer)).inc()
            self._depth(phase, layer)
        self.count("vllm:generation_tokens", len(exit_layers))
        self.count("offramp:layers_possible", self._num_layers * len(exit_layers))

    def decisions(
        self, kinds: Mapping[str, int], layers: Sequence[int], stats: RequestStats, seconds: float
    ) -> None:
        """Count the questions of one request by ``kinds``, and the layers that answered them."""
        for kind, number in kinds.items():
            self._labelled("offramp:decisions", kind).inc(number)
        self._prompts(stats, seconds)
        for layer in layers:
            self._depth("decision", layer)

    def embeddings(self, inputs: int, stats: RequestStats, seconds: float) -> None:
        """Count the inputs of one request."""
        self.count("offramp:embeddings", inputs)
        self._prompts(stats, seconds)

    def _prompts(self, stats: RequestStats, seconds: float) -> None:
        """An answered request that generated nothing."""
        self.finished("stop")
        self.record("vllm:e2e_request_latency_seconds", seconds)
        self.record("vllm:request_prompt_tokens", stats.prompt_tokens)
        self.prompt(stats.prompt_tokens, stats.cached_tokens)

    def prompt(self, tokens: int, cached: int) -> None:
        """Count the tokens of a prompt of which ``cached`` were known."""
        self.count("vllm:prompt_tokens", tokens)
        self.count("vllm:prompt_tokens_cached", cached)
        for source, number in (("local_compute", tokens - cached), ("local_cache_hit", cached)):
            self._labelled("vllm:prompt_tokens_by_source", source).inc(number)
        self.record("vllm:request_prefill_kv_computed_tokens", tokens - cached)

    def _observe_step(self, stats: StepStats) -> None:
        rows = stats.prefill_rows + stats.decode_rows
        self.count("offramp:engine_steps", stats.kind != "idle")
        self.count("offramp:engine_seconds", stats.seconds)
        self.count("offramp:engine_host_seconds", stats.host_seconds)
        self.count("vllm:num_preemptions", stats.preemptions)
        self.count("vllm:prefix_cache_queries", stats.prefix_queries)
        self.count("vllm:prefix_cache_hits", stats.prefix_hits)
        self.count("offramp:stayed_tokens", stats.stayed)
        if stats.prefix_hits:
            self._labelled("vllm:prompt_tokens_cached_by_source", "device").inc(stats.prefix_hits)
        self._observe_drafts(stats)
        self.count("offramp:exit_audits", stats.audited)
        self.count("offramp:exit_disagreements", stats.disagreements)
        self.count("offramp:exit_head_rows", stats.exit_head_rows)
        self._observe_prompt(stats)
        if stats.kind == "segments":
            for segment in range(stats.first_segment, stats.segment + 1):
                self._labelled("offramp:segment_batch_size", str(segment)).observe(rows)
        if rows and stats.kind != "fill" and stats.first_segment == 0:
            self.record("vllm:iteration_tokens_total", rows)
        if stats.fill_tokens:
            self._labelled("offramp:kv_fill_tokens", stats.fill_method).inc(stats.fill_tokens)

    def _show(self, stats: StepStats) -> None:
        """Set the gauges to the state after a step."""
        for index, depth in enumerate(stats.segment_queue):
            self._labelled("offramp:segment_queue_depth", str(index)).set(depth)
        self._labelled("vllm:num_requests_waiting_by_reason", "capacity").set(stats.waiting)
        usage = stats.kv_used_blocks / stats.kv_total_blocks if stats.kv_total_blocks else 0.0
        for name, value in (
            ("vllm:num_requests_running", stats.running),
            ("vllm:num_requests_waiting", stats.waiting),
            ("vllm:kv_cache_usage_perc", usage),
            ("offramp:kv_debt_tokens", stats.debt_tokens),
            ("offramp:exit_guard_level", stats.guard_level),
            ("offramp:exit_quality_target", stats.quality_target),
        ):
            self._plain[name].set(value)
        self._set_thresholds(stats.thresholds)

    def _observe_drafts(self, stats: StepStats) -> None:
        for source, count in stats.drafted.items():
            self._labelled("offramp:draft_tokens", source).inc(count)
        for source, count in stats.accepted.items():
            self._labelled("offramp:accepted_tokens", source).inc(count)
        self.count("vllm:spec_decode_num_drafts", stats.drafts)
        self.count("vllm:spec_decode_num_draft_tokens", sum(stats.drafted.values()))
        self.count("vllm:spec_decode_num_accepted_tokens", sum(stats.accepted.values()))
        for place, count in stats.accepted_at.items():
            self._labelled("vllm:spec_decode_num_accepted_tokens_per_pos", str(place)).inc(count)

    def _observe_prompt(self, stats: StepStats) -> None:
        """Depth of prompt tokens: those that left here, and those that reached the top."""
        for _ in range(stats.prompt_left):
            self._depth("prompt", self._exit_layers[stats.segment])
        for _ in range(stats.prompt_full):
            self._depth("prompt", self._num_layers)

    def _depth(self, phase: str, layer: int) -> None:
        """One token, or answer, that left after ``layer``."""
        if instruments.EXIT_LAYER.name in self._made:
            self._labelled(instruments.EXIT_LAYER.name, phase).observe(layer)

    def _set_thresholds(self, thresholds: Sequence[float]) -> None:
        for layer, value in zip(self._exit_layers, thresholds, strict=False):
            self._labelled("offramp:exit_threshold", str(layer)).set(value)

    def _labelled(self, name: str, *values: str) -> Any:
        """The series of ``name`` with these values of its own labels."""
        # Kept, since finding one takes longer than what is then done with it.
        found = self._series.get((name, values))
        if found is None:
            found = self._made[name].labels(*self._who, *values)
            self._series[name, values] = found
        return found


def _refusals(*kinds: type[OfframpError]) -> set[str]:
    """Codes of these errors and of all that are of their kind."""
    below = [_refusals(*kind.__subclasses__()) for kind in kinds]
    return {kind.default_code for kind in kinds if kind.default_code}.union(*below)


class RequestObserver:
    """Turns the events of one sequence into samples; `finish` counts its end exactly once."""

    def __init__(self, metrics: Metrics, request: GenerationRequest, submitted_at: float) -> None:
        self._metrics = metrics
        self._max_tokens = request.sampling.max_tokens
        self._prompt_tokens = len(request.prompt)
        self._submitted = submitted_at
        self._first: float | None = None
        self._last = submitted_at
        self._generated = 0
        self._stats: RequestStats | None = None
        self._open = True

    def event(self, event: TokenEvent) -> None:
        """Tokens arrived."""
        self._metrics.later(self._count, event, time.monotonic())

    def _count(self, event: TokenEvent, now: float) -> None:
        new, known = event.stats, self._stats
        layers, passes = (known.layers_executed, known.passes) if known else (0, 0)
        self._metrics.count("offramp:layers_executed", new.layers_executed - layers)
        self._metrics.count("offramp:passes", new.passes - passes)
        self._stats = new
        if not event.token_ids:
            return
        # The first token comes out of the prompt's own pass through all layers.
        first = event.exit_layers[: 1 if self._first is None else 0]
        self._metrics.tokens(first, "prefill")
        self._metrics.tokens(event.exit_layers[len(first) :], "decode")
        if new.coarse:
            self._metrics.count("offramp:int8_tokens", len(event.token_ids))
        if self._first is None:
            self._first = now
            self._metrics.prompt(self._prompt_tokens, new.cached_tokens)
            self._metrics.record("vllm:time_to_first_token_seconds", now - self._submitted)
        else:
            self._metrics.record("vllm:inter_token_latency_seconds", now - self._last)
        self._last = now
        self._generated += len(event.token_ids)

    def finish(self, reason: str) -> None:
        """The sequence ended; later calls change nothing."""
        if self._open:
            self._open = False
            self._metrics.later(self._count_end, reason, time.monotonic())

    def _count_end(self, reason: str, now: float) -> None:
        record = self._metrics.record
        self._metrics.finished(reason)
        record("vllm:e2e_request_latency_seconds", now - self._submitted)
        record("vllm:request_prompt_tokens", self._prompt_tokens)
        record("vllm:request_generation_tokens", self._generated)
        record("vllm:request_max_num_generation_tokens", self._max_tokens)
        if self._stats is not None:
            record("vllm:request_num_preemptions", self._stats.preemptions)
        if self._first is None:
            return
        decode = self._last - self._first
        record("vllm:request_decode_time_seconds", decode)
        record(
            "vllm:request_time_per_output_token_seconds",
            decode / (self._generated - 1) if self._generated > 1 else 0.0,
        )
        admitted = self._stats.admitted_at if self._stats is not None else None
        if admitted is not None:
            record("vllm:request_queue_time_seconds", admitted - self._submitted)
            record("vllm:request_prefill_time_seconds", self._first - admitted)
            record("vllm:request_inference_time_seconds", self._last - admitted)
