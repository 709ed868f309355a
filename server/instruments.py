"""The names under which the server is measured: depth and debt under ``offramp:``, vLLM's, HTTP's.

Times are seconds, sizes are tokens unless a name says otherwise. A name of vLLM stands here only
where this server has a true value for it. Run as a module it writes docs/metrics.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary


class Kind(StrEnum):
    """What Prometheus calls the type of a metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    SUMMARY = "summary"


@dataclass(frozen=True, slots=True)
class Instrument:
    """One name. ``labels`` are those beside `WHO`; counters get ``_total`` where they are read."""

    kind: Kind
    name: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    who: tuple[str, ...] = ("model_name", "engine")

    def make(self, registry: CollectorRegistry, buckets: Sequence[float] = ()) -> Any:
        """The instrument in ``registry``; ``buckets`` are those known only at run time."""
        common: dict[str, Any] = {"labelnames": self.who + self.labels, "registry": registry}
        match self.kind:
            case Kind.COUNTER:
                return Counter(self.name, self.text, **common)
            case Kind.GAUGE:
                return Gauge(self.name, self.text, **common)
            case Kind.SUMMARY:
                return Summary(self.name, self.text, **common)
            case Kind.HISTOGRAM:
                return Histogram(self.name, self.text, buckets=buckets or self.buckets, **common)

    @property
    def sample(self) -> str:
        """The name to ask Prometheus for; of histograms and summaries, what their names share."""
        return f"{self.name}_total" if self.kind is Kind.COUNTER else self.name


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
_LAG: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ROWS: Final = tuple(float(2**power) for power in range(15))
_COUNTS: Final = tuple(float(base * 10**power) for power in range(5) for base in (1, 2, 5))
_FEW: Final = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)

VLLM: Final = (
    *(
        Instrument(Kind.HISTOGRAM, name, text, buckets=buckets)
        for name, text, buckets in (
            ("vllm:time_to_first_token_seconds", "Arrival to first token.", _TTFT),
            ("vllm:inter_token_latency_seconds", "Time between tokens of a sequence.", _ITL),
            (
                "vllm:request_time_per_output_token_seconds",
                "Mean time per token after the first.",
                _ITL,
            ),
            ("vllm:e2e_request_latency_seconds", "Arrival to last token.", _LATENCY),
            ("vllm:request_queue_time_seconds", "Arrival to admission.", _LATENCY),
            ("vllm:request_prefill_time_seconds", "Admission to first token.", _LATENCY),
            ("vllm:request_decode_time_seconds", "First to last token.", _LATENCY),
            ("vllm:request_inference_time_seconds", "Admission to last token.", _LATENCY),
            ("vllm:request_prompt_tokens", "Tokens of a prompt.", _COUNTS),
            ("vllm:request_generation_tokens", "Tokens of an answer.", _COUNTS),
            (
                "vllm:request_max_num_generation_tokens",
                "Tokens an answer could have had.",
                _COUNTS,
            ),
            (
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens that were computed, not found in the prefix cache.",
                _COUNTS,
            ),
            ("vllm:request_params_max_tokens", "Tokens asked for at most.", _COUNTS),
            ("vllm:request_params_n", "Choices asked for.", (1.0, 2.0, 5.0, 10.0, 20.0)),
            ("vllm:request_num_preemptions", "Times a sequence was put back to waiting.", _FEW),
            ("vllm:iteration_tokens_total", "Token rows of an engine step.", _ROWS),
        )
    ),
    *(
        Instrument(Kind.COUNTER, name, text)
        for name, text in (
            ("vllm:prompt_tokens", "Prompt tokens, cached ones included."),
            ("vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache."),
            ("vllm:generation_tokens", "Tokens generated."),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache."),
            ("vllm:num_preemptions", "Sequences put back to waiting because blocks ran out."),
            ("vllm:spec_decode_num_drafts", "Runs of guessed tokens, by all sources."),
            ("vllm:spec_decode_num_draft_tokens", "Guessed tokens, by all sources."),
            ("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that full depth confirmed."),
        )
    ),
    Instrument(
        Kind.COUNTER,
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "The same by their place in the run, from 0.",
        ("position",),
    ),
    Instrument(
        Kind.COUNTER,
        "vllm:prompt_tokens_by_source",
        "Prompt tokens by whether they were computed or found in the prefix cache.",
        ("source",),
    ),
    Instrument(
        Kind.COUNTER,
        "vllm:prompt_tokens_cached_by_source",
        "Prompt tokens found in a cache, by where its memory is.",
        ("source",),
    ),
    Instrument(Kind.COUNTER, "vllm:request_success", "Ended requests.", ("finished_reason",)),
    Instrument(
        Kind.COUNTER,
        "vllm:admission_rejections",
        "Requests refused because a queue was full, by the limit they met.",
        ("reason",),
        who=("model_name",),
    ),
    Instrument(Kind.GAUGE, "vllm:num_requests_running", "Sequences in the engine."),
    Instrument(Kind.GAUGE, "vllm:num_requests_waiting", "Sequences waiting for admission."),
    Instrument(
        Kind.GAUGE,
        "vllm:num_requests_waiting_by_reason",
        "The same by what they wait for: capacity; nothing else defers them here.",
        ("reason",),
    ),
    Instrument(Kind.GAUGE, "vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1."),
    Instrument(
        Kind.GAUGE,
        "vllm:engine_sleep_state",
        "1 for the state the engine is in: awake once it is loaded; it is never put to sleep.",
        ("sleep_state",),
    ),
    Instrument(
        Kind.GAUGE,
        "vllm:cache_config_info",
        "The KV cache, in labels.",
        ("block_size", "num_gpu_blocks", "cache_dtype"),
    ),
)

HTTP: Final = (
    Instrument(
        Kind.COUNTER,
        "http_requests",
        "Requests by route, method and class of status (2xx); probes are not counted.",
        ("handler", "method", "status"),
        who=(),
    ),
    Instrument(
        Kind.HISTOGRAM,
        "http_request_duration_seconds",
        "Head of the request to end of the answer, by route and method.",
        ("handler", "method"),
        _LATENCY,
        who=(),
    ),
    Instrument(
        Kind.HISTOGRAM,
        "http_request_duration_highr_seconds",
        "The same of all routes, in finer buckets.",
        (),
        _TTFT,
        who=(),
    ),
    Instrument(
        Kind.SUMMARY, "http_request_size_bytes", "Bytes of bodies received.", ("handler",), who=()
    ),
    Instrument(
        Kind.SUMMARY, "http_response_size_bytes", "Bytes of bodies sent.", ("handler",), who=()
    ),
)

# Its buckets are the layers of the loaded model.
EXIT_LAYER: Final = Instrument(
    Kind.HISTOGRAM,
    "offramp:exit_layer",
    "Layer after which a token left, or an answer of a decision.",
    ("phase",),
)
OWN: Final = (
    EXIT_LAYER,
    *(
        Instrument(Kind.COUNTER, name, text)
        for name, text in (
            ("offramp:layers_executed", "Layers run for generated tokens, late ones included."),
            ("offramp:layers_possible", "Layers full depth would have run for the same tokens."),
            ("offramp:passes", "Passes through the whole stack that generated tokens came of."),
            ("offramp:int8_tokens", "Tokens generated by layers that took inputs of 8 bits."),
            ("offramp:stayed_tokens", "Tokens whose gate fired but that were kept in the stack."),
            ("offramp:embeddings", "Embedded inputs."),
            (
                "offramp:exit_audits",
                "Tokens checked at full depth, of answers with exits or inputs of 8 bits.",
            ),
            (
                "offramp:exit_disagreements",
                "Checked tokens that full depth would have chosen differently.",
            ),
            ("offramp:exit_head_rows", "Rows an exit's adapter and LM head ran for."),
            ("offramp:engine_steps", "Engine steps."),
            ("offramp:engine_seconds", "Time in engine steps."),
            ("offramp:engine_host_seconds", "Time in engine steps not spent computing layers."),
            ("offramp:engine_restarts", "Times that an engine which failed was built anew."),
        )
    ),
    Instrument(
        Kind.COUNTER, "offramp:exit_tokens", "Tokens by the layer they left after.", ("exit_layer",)
    ),
    Instrument(
        Kind.COUNTER,
        "offramp:draft_tokens",
        "Tokens guessed, for full depth to verify, by who guessed.",
        ("source",),
    ),
    Instrument(
        Kind.COUNTER,
        "offramp:accepted_tokens",
        "Guessed tokens that full depth confirmed.",
        ("source",),
    ),
    Instrument(
        Kind.COUNTER, "offramp:kv_fill_tokens", "Owed tokens whose K and V were made.", ("method",)
    ),
    Instrument(Kind.COUNTER, "offramp:decisions", "Answered questions.", ("type",)),
    Instrument(
        Kind.COUNTER,
        "offramp:requests_refused",
        "Requests answered with an error that is not the server's fault, or busy, by its code.",
        ("code",),
    ),
    *(
        Instrument(Kind.GAUGE, name, text)
        for name, text in (
            ("offramp:kv_debt_tokens", "Tokens whose skipped layers still lack K and V."),
            (
                "offramp:exit_guard_level",
                "0: as calibrated; 1, 2: thresholds tightened, no inputs of 8 bits; 3: exits off.",
            ),
            (
                "offramp:exit_quality_target",
                "Agreement promised to requests that name none; 0: none.",
            ),
            ("offramp:requests_in_flight", "Requests under /v1 not yet answered to their end."),
            ("offramp:open_connections", "Connections of clients."),
        )
    ),
    Instrument(
        Kind.GAUGE,
        "offramp:segment_queue_depth",
        "Sequences waiting at a segment.",
        ("segment",),
    ),
    Instrument(
        Kind.GAUGE,
        "offramp:exit_threshold",
        "Score to leave at, for requests that name none.",
        ("exit_layer",),
    ),
    Instrument(Kind.GAUGE, "offramp:engine_state", "1 for the state the engine is in.", ("state",)),
    Instrument(
        Kind.GAUGE,
        "offramp:build_info",
        "1; the versions are in the labels.",
        ("version", "python_version", "torch_version"),
    ),
    Instrument(
        Kind.HISTOGRAM,
        "offramp:segment_batch_size",
        "Token rows of a segment's run.",
        ("segment",),
        _ROWS,
    ),
    Instrument(
        Kind.HISTOGRAM,
        "offramp:event_loop_lag_seconds",
        "How much later than due the event loop runs what it was asked for.",
        (),
        _LAG,
    ),
)
ALL: Final = (*OWN, *VLLM, *HTTP)
_HEAD: Final = """\
Made from `server/instruments.py` by `make docs`; do not edit. Names that begin with `offramp:` or
`vllm:` carry the labels `model_name` and `engine` (`vllm:admission_rejections` the first only). Of
a histogram there are `_bucket`, `_sum` and `_count`, of a summary the last two. Beside these there
are prometheus_client's `process_*` (of the process that answers HTTP), `python_info` and
`python_gc_*`."""


def markdown() -> str:
    """The page docs/metrics.md: every name by family."""
    lines = ["# Metrics", "", *_HEAD.splitlines()]
    for title, family in (
        ("Offramp's own", OWN),
        ("vLLM's names", VLLM),
        ("HTTP, named as by prometheus-fastapi-instrumentator", HTTP),
    ):
        lines += ["", f"## {title}", "", "| name | type | labels | meaning |", "|---|---|---|---|"]
        for each in family:
            labels = ", ".join(f"`{label}`" for label in each.labels)
            lines.append(f"| `{each.sample}` | {each.kind} | {labels} | {each.text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
