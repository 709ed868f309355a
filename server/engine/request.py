"""What crosses the engine boundary: plain data in, plain data out."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from offramp.models.exits.file import OperatingPoint
from offramp.models.sampling_params import ExitSettings, SamplingParams


class FinishReason(StrEnum):
    """The one terminal event of a request."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate: token ids and parameters."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    exits: ExitSettings = field(default_factory=ExitSettings)


@dataclass(frozen=True, slots=True)
class RequestStats:
    """What a request cost so far; times are seconds on the monotonic clock.

    ``layers_executed`` counts layers really run for the generated tokens, recomputed debts
    included; ``cached_tokens`` is the part of the prompt found in the prefix cache; ``stayed``
    counts tokens whose score would have let them leave but that were kept in the stack.
    ``prompt_layers_skipped`` are layers prompt tokens did not run. ``drafted`` guesses were made
    in lossless mode, of which full depth ``accepted`` some and ``rejected`` others; those behind a
    rejected one are neither.
    """

    submitted_at: float
    admitted_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    layers_executed: int = 0
    prompt_layers_skipped: int = 0
    stayed: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tokens of one request, in order, with the layer each left at (num_layers = full depth).

    The last event of a request carries ``finish_reason``; it may hold no token (abort, error).
    A token that ended the request (a stop id) is included in ``token_ids``.
    """

    request_id: str
    token_ids: tuple[int, ...]
    exit_layers: tuple[int, ...]
    stats: RequestStats
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one engine step did and the state it left behind, for metrics and logs.

    ``kind`` is ``segment``, ``head`` or ``fill``; ``rows`` are token rows of that step.
    Gauges (running to debt_tokens, thresholds, guard_level, quality_target) are values after the
    step, the rest are increments. ``exit_head_rows`` are rows an exit's LM head ran for,
    ``prompt_left`` prompt tokens that left after this segment, ``prompt_risen`` those that might
    have and ran the whole stack.
    """

    kind: str
    segment: int
    seconds: float
    host_seconds: float
    prefill_rows: int
    decode_rows: int
    layers_executed: int
    running: int
    waiting: int
    kv_used_blocks: int
    kv_total_blocks: int
    debt_tokens: int
    segment_queue: tuple[int, ...]
    fill_tokens: int = 0
    fill_method: str = ""
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    stayed: int = 0
    drafted: int = 0
    accepted: int = 0
    audited: int = 0
    disagreements: int = 0
    exit_head_rows: int = 0
    prompt_left: int = 0
    prompt_risen: int = 0
    thresholds: tuple[float, ...] = ()
    guard_level: int = 0
    quality_target: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """Everything one engine step hands to the outside."""

    events: tuple[TokenEvent, ...] = ()
    stats: StepStats | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts about a loaded engine that the front needs; constant while it lives."""

    model_name: str
    num_layers: int
    exit_layers: tuple[int, ...]
    exit_thresholds: tuple[float, ...]
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    dtype: str
    eos_token_ids: tuple[int, ...] = field(default=())
    points: tuple[OperatingPoint, ...] = ()
    prompt_threshold: float | None = None
    quality_floor: float | None = None
