"""Prometheus metrics: depth and debt under ``offramp:``, and the names dashboards know from vLLM.

One registry per application, so several can live in one process. All methods run on the event
loop. Times are seconds, sizes are tokens unless a name says otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from offramp.models.sampling_params import DraftSource, KVFill

if TYPE_CHECKING:
    from offramp.server.engine.request import (
        EngineInfo,
        EngineOutput,
        GenerationRequest,
        RequestStats,
        StepStats,
        TokenEvent,
    )

_LABELS: Final = ("model_name", "engine")
# Small models with exits answer in single milliseconds, so both series start at 1 and 2 ms.
_TTFT: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL: Final = (
    *(0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08),
    *(0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 8.0),
)
_LATENCY: Final = (
    *(0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0),
)
_ROWS: Final = tuple(float(2**power) for power in range(15))
_COUNTS: Final = tuple(float(base * 10**power) for power in range(5) for base in (1, 2, 5))
_REASONS: Final = ("stop", "length", "tool_calls", "abort", "error")
_QUESTIONS: Final = ("predicate", "choice", "score")
_HISTOGRAMS: Final = (
    ("vllm:time_to_first_token_seconds", "Arrival to first token.", _TTFT),
    ("vllm:inter_token_latency_seconds", "Time between tokens of a sequence.", _ITL),
    ("vllm:request_time_per_output_token_seconds", "Mean time per token after the first.", _ITL),
    ("vllm:e2e_request_latency_seconds", "Arrival to last token.", _LATENCY),
    ("vllm:request_queue_time_seconds", "Arrival to admission.", _LATENCY),
    ("vllm:request_prefill_time_seconds", "Admission to first token.", _LATENCY),
    ("vllm:request_decode_time_seconds", "First to last token.", _LATENCY),
    ("vllm:request_inference_time_seconds", "Admission to last token.", _LATENCY),
    ("vllm:request_prompt_tokens", "Tokens of a prompt.", _COUNTS),
    ("vllm:request_generation_tokens", "Tokens of an answer.", _COUNTS),
    ("vllm:request_max_num_generation_tokens", "Tokens an answer could have had.", _COUNTS),
    ("vllm:request_params_max_tokens", "Tokens asked for at most.", _COUNTS),
    ("vllm:request_params_n", "Choices asked for.", (1.0, 2.0, 5.0, 10.0, 20.0)),
    ("vllm:iteration_tokens_total", "Token rows of an engine step.", _ROWS),
)
_COUNTERS: Final = (
    ("vllm:prompt_tokens", "Prompt tokens, cached ones included."),
    ("vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache."),
    ("vllm:generation_tokens", "Tokens generated."),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    ("vllm:num_preemptions", "Sequences put back to waiting because blocks ran out."),
    ("offramp:layers_executed", "Layers run for generated tokens, recomputed debts included."),
    ("offramp:layers_possible", "Layers full depth would have run for the same tokens."),
    ("offramp:stayed_tokens", "Tokens whose gate fired but that were kept in the stack."),
    ("offramp:embeddings", "Embedded inputs."),
    ("offramp:exit_audits", "Exited tokens checked at full depth."),
    ("offramp:exit_disagreements", "Checked tokens that full depth would have chosen differently."),
    ("offramp:exit_head_rows", "Rows an exit's adapter and LM head ran for."),
    ("offramp:engine_steps", "Engine steps."),
    ("offramp:engine_seconds", "Time in engine steps."),
    ("offramp:engine_host_seconds", "Time in engine steps not spent computing layers."),
)
_GAUGES: Final = (
    ("vllm:num_requests_running", "Sequences in the engine."),
    ("vllm:num_requests_waiting", "Sequences waiting for admission."),
    ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1."),
    ("offramp:kv_debt_tokens", "Tokens whose skipped layers still lack K and V."),
    ("offramp:exit_guard_level", "0: as calibrated; 1, 2: thresholds tightened; 3: exits off."),
    ("offramp:exit_quality_target", "Agreement promised to requests that name none; 0: none."),
)


class Metrics:
    """The instruments of one server."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._who = (model_name, "0")
        make: dict[str, Any] = {"registry": self.registry, "labelnames": _LABELS}
        self._histograms = {
            name: Histogram(name, text, buckets=buckets, **make).labels(*self._who)
            for name, text, buckets in _HISTOGRAMS
        }
        self._counters = {
            name: Counter(name, text, **make).labels(*self._who) for name, text in _COUNTERS
        }
        self._gauges = {
            name: Gauge(name, text, **make).labels(*self._who) for name, text in _GAUGES
        }
        self._finished = self._counter("vllm:request_success", "Ended requests.", "finished_reason")
        for reason in _REASONS:
            self._finished.labels(*self._who, reason)
        self._draft_tokens = self._counter(
            "offramp:draft_tokens", "Tokens guessed in lossless mode, by who guessed.", "source"
        )
        self._accepted_tokens = self._counter(
            "offramp:accepted_tokens", "Guessed tokens that full depth confirmed.", "source"
        )
        for source in DraftSource:
            self._draft_tokens.labels(*self._who, source.value)
            self._accepted_tokens.labels(*self._who, source.value)
        self._decisions = self._counter("offramp:decisions", "Answered questions.", "type")
        for kind in _QUESTIONS:
            self._decisions.labels(*self._who, kind)
        self._exit_tokens = self._counter(
            "offramp:exit_tokens", "Tokens by the layer they left after.", "exit_layer"
        )
        self._fill_tokens = self._counter(
            "offramp:kv_fill_tokens", "Owed tokens whose K and V were made.", "method"
        )
        self._queue_depth = self._gauge(
            "offramp:segment_queue_depth", "Sequences waiting at a segment.", "segment"
        )
        self._batch_size = Histogram(
            "offramp:segment_batch_size",
            "Token rows of a segment's run.",
            (*_LABELS, "segment"),
            buckets=_ROWS,
            registry=self.registry,
        )
        self._threshold = self._gauge(
            "offramp:exit_threshold",
            "Score to leave at, for requests that name none.",
            "exit_layer",
        )
        self._exit_layer: Histogram | None = None
        self._exit_layers: tuple[int, ...] = ()
        self._num_layers = 0

    def configure(self, info: EngineInfo) -> None:
        """Add what depends on the loaded engine; call once."""
        self._num_layers = info.num_layers
        layers = (*info.exit_layers, info.num_layers)
        self._exit_layer = Histogram(
            "offramp:exit_layer",
            "Layer after which a token left, or an answer of a decision.",
            (*_LABELS, "phase"),
            buckets=[float(layer) for layer in sorted({*layers, *info.decision_layers})],
            registry=self.registry,
        )
        # Series that exist from the start have rates from the start.
        for method in KVFill:
            self._fill_tokens.labels(*self._who, method.value)
        for segment in range(len(layers)):
            self._queue_depth.labels(*self._who, str(segment))
        for layer in layers:
            self._exit_tokens.labels(*self._who, str(layer))
        self._exit_layers = info.exit_layers
        self._set_thresholds(info.exit_thresholds)
        facts = {
            "block_size": str(info.block_size),
            "num_gpu_blocks": str(info.num_blocks),
            "cache_dtype": info.cache_dtype,
        }
        labels = (*_LABELS, *facts)
        config = Gauge("vllm:cache_config_info", "KV cache.", labels, registry=self.registry)
        config.labels(*self._who, *facts.values()).set(1)

    def observe(self, output: EngineOutput) -> None:
        """Take in what an engine step did; events are counted by `RequestObserver`."""
        if output.stats is not None:
            self._observe_step(output.stats)

    def request(self, request: GenerationRequest, n: int) -> RequestObserver:
        """Follow one sequence; ``n`` is how many its HTTP request asked for."""
        self.record("vllm:request_params_n", n)
        self.record("vllm:request_params_max_tokens", request.sampling.max_tokens)
        return RequestObserver(self, request)

    def record(self, name: str, value: float) -> None:
        """Add a sample to a histogram."""
        self._histograms[name].observe(value)

    def count(self, name: str, amount: float = 1) -> None:
        """Raise a counter."""
        if amount:
            self._counters[name].inc(amount)

    def finished(self, reason: str) -> None:
        """Count the end of a sequence."""
        self._finished.labels(*self._who, reason).inc()

    def tokens(self, exit_layers: Sequence[int], phase: str) -> None:
        """Count generated tokens by the layer they left after."""
        for layer in exit_layers:
            self._exit_tokens.labels(*self._who, str(layer)).inc()
            if self._exit_layer is not None:
                self._exit_layer.labels(*self._who, phase).observe(layer)
        self.count("vllm:generation_tokens", len(exit_layers))
        self.count("offramp:layers_possible", self._num_layers * len(exit_layers))

    def decisions(
        self, kinds: Mapping[str, int], layers: Sequence[int], stats: RequestStats, seconds: float
    ) -> None:
        """Count the questions of one request by ``kinds``, and the layers that answered them."""
        for kind, number in kinds.items():
            self._decisions.labels(*self._who, kind).inc(number)
        self._prompts(stats, seconds)
        if self._exit_layer is not None:
            depth = self._exit_layer.labels(*self._who, "decision")
            for layer in layers:
                depth.observe(layer)

    def embeddings(self, inputs: int, stats: RequestStats, seconds: float) -> None:
        """Count the inputs of one request."""
        self.count("offramp:embeddings", inputs)
        self._prompts(stats, seconds)

    def _prompts(self, stats: RequestStats, seconds: float) -> None:
        """An answered request that generated nothing."""
        self.finished("stop")
        self.record("vllm:e2e_request_latency_seconds", seconds)
        self.record("vllm:request_prompt_tokens", stats.prompt_tokens)
        self.count("vllm:prompt_tokens", stats.prompt_tokens)
        self.count("vllm:prompt_tokens_cached", stats.cached_tokens)

    def _observe_step(self, stats: StepStats) -> None:
        rows = stats.prefill_rows + stats.decode_rows
        self.count("offramp:engine_steps", stats.kind != "idle")
        self.count("offramp:engine_seconds", stats.seconds)
        self.count("offramp:engine_host_seconds", stats.host_seconds)
        self.count("vllm:num_preemptions", stats.preemptions)
        self.count("vllm:prefix_cache_queries", stats.prefix_queries)
        self.count("vllm:prefix_cache_hits", stats.prefix_hits)
        self.count("offramp:stayed_tokens", stats.stayed)
        for source, count in stats.drafted.items():
            self._draft_tokens.labels(*self._who, source.value).inc(count)
        for source, count in stats.accepted.items():
            self._accepted_tokens.labels(*self._who, source.value).inc(count)
        self.count("offramp:exit_audits", stats.audited)
        self.count("offramp:exit_disagreements", stats.disagreements)
        self.count("offramp:exit_head_rows", stats.exit_head_rows)
        self._observe_prompt(stats)
        if stats.kind == "segments":
            for segment in range(stats.first_segment, stats.segment + 1):
                self._batch_size.labels(*self._who, str(segment)).observe(rows)
        if rows and stats.kind != "fill" and stats.first_segment == 0:
            self.record("vllm:iteration_tokens_total", rows)
        if stats.fill_tokens:
            self._fill_tokens.labels(*self._who, stats.fill_method).inc(stats.fill_tokens)
        for index, depth in enumerate(stats.segment_queue):
            self._queue_depth.labels(*self._who, str(index)).set(depth)
        self._gauges["vllm:num_requests_running"].set(stats.running)
        self._gauges["vllm:num_requests_waiting"].set(stats.waiting)
        usage = stats.kv_used_blocks / stats.kv_total_blocks if stats.kv_total_blocks else 0.0
        self._gauges["vllm:kv_cache_usage_perc"].set(usage)
        self._gauges["offramp:kv_debt_tokens"].set(stats.debt_tokens)
        self._gauges["offramp:exit_guard_level"].set(stats.guard_level)
        self._gauges["offramp:exit_quality_target"].set(stats.quality_target)
        self._set_thresholds(stats.thresholds)

    def _observe_prompt(self, stats: StepStats) -> None:
        """Depth of prompt tokens: those that left here, and those that reached the top."""
        if self._exit_layer is None:
            return
        if stats.prompt_left:
            depth = self._exit_layer.labels(*self._who, "prompt")
            for _ in range(stats.prompt_left):
                depth.observe(self._exit_layers[stats.segment])
        if stats.prompt_full:
            depth = self._exit_layer.labels(*self._who, "prompt")
            for _ in range(stats.prompt_full):
                depth.observe(self._num_layers)

    def _set_thresholds(self, thresholds: Sequence[float]) -> None:
        for layer, value in zip(self._exit_layers, thresholds, strict=False):
            self._threshold.labels(*self._who, str(layer)).set(value)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, (*_LABELS, label), registry=self.registry)

    def _gauge(self, name: str, text: str, label: str) -> Gauge:
        return Gauge(name, text, (*_LABELS, label), registry=self.registry)


class RequestObserver:
    """Turns the events of one sequence into samples; `finish` counts its end exactly once."""

    def __init__(self, metrics: Metrics, request: GenerationRequest) -> None:
        self._metrics = metrics
        self._max_tokens = request.sampling.max_tokens
        self._prompt_tokens = len(request.prompt)
        self._started = time.monotonic()
        self._first: float | None = None
        self._last = self._started
        self._admitted: float | None = None
        self._generated = 0
        self._layers = 0
        self._open = True

    def event(self, event: TokenEvent) -> None:
        """Tokens arrived."""
        now = time.monotonic()
        self._admitted = event.stats.admitted_at
        self._metrics.count("offramp:layers_executed", event.stats.layers_executed - self._layers)
        self._layers = event.stats.layers_executed
        if not event.token_ids:
            return
        # The first token comes out of the prompt's own pass through all layers.
        first = event.exit_layers[: 1 if self._first is None else 0]
        self._metrics.tokens(first, "prefill")
        self._metrics.tokens(event.exit_layers[len(first) :], "decode")
        if self._first is None:
            self._first = now
            self._metrics.count("vllm:prompt_tokens", self._prompt_tokens)
            self._metrics.count("vllm:prompt_tokens_cached", event.stats.cached_tokens)
            self._metrics.record("vllm:time_to_first_token_seconds", now - self._started)
        else:
            self._metrics.record("vllm:inter_token_latency_seconds", now - self._last)
        self._last = now
        self._generated += len(event.token_ids)

    def finish(self, reason: str) -> None:
        """The sequence ended; later calls change nothing."""
        if not self._open:
            return
        self._open = False
        record = self._metrics.record
        self._metrics.finished(reason)
        record("vllm:e2e_request_latency_seconds", time.monotonic() - self._started)
        record("vllm:request_prompt_tokens", self._prompt_tokens)
        record("vllm:request_generation_tokens", self._generated)
        record("vllm:request_max_num_generation_tokens", self._max_tokens)
        if self._first is None:
            return
        decode = self._last - self._first
        record("vllm:request_decode_time_seconds", decode)
        record(
            "vllm:request_time_per_output_token_seconds",
            decode / (self._generated - 1) if self._generated > 1 else 0.0,
        )
        if self._admitted is not None:
            record("vllm:request_queue_time_seconds", max(0.0, self._admitted - self._started))
            record("vllm:request_prefill_time_seconds", max(0.0, self._first - self._admitted))
            record("vllm:request_inference_time_seconds", max(0.0, self._last - self._admitted))
