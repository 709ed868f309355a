"""What crosses the engine boundary: plain data in, plain data out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from offramp.models.exits.points import DecisionPoint, OperatingPoint
from offramp.models.sampling_params import (
    DraftSource,
    ExitSettings,
    SamplingParams,
    TokenSource,
)
from offramp.models.step import Pooling, TokenLogprobs
from offramp.server.text.grammars import Grammar

# Rows with states for the draft head that a sequence may hold before its entries are made. Sixteen
# entries at once take little more than one.
MOST_STATES = 16


class FinishReason(StrEnum):
    """The one terminal event of a request."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate: token ids and parameters; ``grammar`` is the form of its answer.

    Of requests that wait those of the lowest ``priority`` run first. K,V are shared only with
    requests of the same ``cache_salt``.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    exits: ExitSettings = field(default_factory=ExitSettings)
    grammar: Grammar | None = None
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """One place where an answer of a fixed set is read: behind the tokens of a prompt.

    ``candidates`` are token ids of which one would come next. ``task`` names trained heads that may
    answer earlier; their outputs then stand for the candidates, at full depth only where the task
    is ``labelled``. Such an answer leaves after the first segment where its probability reaches the
    threshold, of which there is one for each of the engine's ``decision_layers`` (empty: full
    depth). With ``pooling`` the read is an embedding: the prompt's states behind the final norm
    pooled into one, at full depth, and needs no other field.
    """

    tokens: tuple[int, ...]
    candidates: tuple[int, ...]
    task: str | None = None
    labelled: bool = False
    thresholds: tuple[float, ...] = ()
    pooling: Pooling | None = None


@dataclass(frozen=True, slots=True)
class DecisionRequest:
    """Reads that are answered together; what their prompts begin with is computed once."""

    request_id: str
    reads: tuple[AnswerRequest, ...]


@dataclass(frozen=True, slots=True)
class AnswerResult:
    """Logits of the candidates, or an embedding, and the layer they were read after."""

    logits: tuple[float, ...]
    layer: int


class RequestStats(NamedTuple):
    """What a request cost so far; times are seconds on the monotonic clock.

    ``layers_executed`` counts layers really run for the generated tokens, recomputed debts
    included; ``cached_tokens`` is the part of the prompt found in the prefix cache; ``stayed``
    counts tokens whose score would have let them leave but that were kept in the stack.
    ``prompt_layers_skipped`` are layers prompt tokens did not run. The answer's tokens came of
    ``passes`` through the top of the stack. ``drafts`` says by source how many tokens were guessed
    and how many of them full depth accepted; it ``rejected`` others, and those
    behind a rejected one are neither. Layers took inputs of 8 bits of a ``coarse`` request.
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
    passes: int = 0
    drafts: Mapping[DraftSource, tuple[int, int]] = {}
    rejected: int = 0
    preemptions: int = 0
    coarse: bool = False

    @property
    def drafted(self) -> int:
        """Guessed tokens."""
        return sum(drafted for drafted, _ in self.drafts.values())

    @property
    def accepted(self) -> int:
        """Guessed tokens that full depth accepted."""
        return sum(accepted for _, accepted in self.drafts.values())


class TokenEvent(NamedTuple):
    """Tokens of one request, in order, with the layer each left at (num_layers = full depth).

    The last event of a request carries ``finish_reason``; it may hold no token (abort, error).
    A token that ended the request (a stop id) is included in ``token_ids``. Decisions end in one
    event with their ``answers``, in the order of the reads. ``logprobs`` are those of ``token_ids``
    where the request asked for them, else empty; ``prompt_logprobs`` are of all tokens of the
    prompt but the first, and come with the answer's first token. ``sources`` say where the tokens
    came from; empty where the model made all of them.
    """

    request_id: str
    token_ids: tuple[int, ...]
    exit_layers: tuple[int, ...]
    stats: RequestStats
    finish_reason: FinishReason | None = None
    error: str | None = None
    answers: tuple[AnswerResult, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    sources: tuple[TokenSource, ...] = ()


@dataclass(slots=True)
class StepStats:
    """What one engine step did and the state it left behind, for metrics and logs.

    The decoder says what was done, the engine then adds the state.
    ``kind`` is ``segments``, ``fill``, ``decisions`` (a segment of their own), ``device`` (a pass
    of all segments, decided on the device) or ``idle`` (nothing ran); ``segment`` is the last one
    that ran, ``head_seconds`` the part of ``seconds`` for the LM head and sampling;
    ``draft_seconds`` were spent on guesses before. ``rows`` are token rows of that step. Fields
    up to ``disagreements`` are increments, the rest are values after the step. ``exit_head_rows``
    are rows an exit's LM head ran for, ``prompt_left`` prompt tokens that left after this
    segment, ``prompt_full`` those that might have left and ran the whole stack. The ``drafted``
    tokens are of ``drafts`` runs; ``accepted_at`` counts those accepted by their place in the run.
    """

    kind: str
    segment: int
    seconds: float = 0.0
    host_seconds: float = 0.0
    draft_seconds: float = 0.0
    first_segment: int = 0
    head_seconds: float = 0.0
    prefill_rows: int = 0
    decode_rows: int = 0
    layers_executed: int = 0
    fill_tokens: int = 0
    fill_method: str = ""
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    stayed: int = 0
    drafted: Mapping[DraftSource, int] = field(default_factory=dict)
    accepted: Mapping[DraftSource, int] = field(default_factory=dict)
    drafts: int = 0
    accepted_at: Mapping[int, int] = field(default_factory=dict)
    exit_head_rows: int = 0
    prompt_left: int = 0
    prompt_full: int = 0
    audited: int = 0
    disagreements: int = 0
    running: int = 0
    waiting: int = 0
    kv_used_blocks: int = 0
    kv_total_blocks: int = 0
    debt_tokens: int = 0
    segment_queue: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    guard_level: int = 0
    quality_target: float = 0.0


class EngineOutput(NamedTuple):
    """Everything one engine step hands to the outside."""

    events: tuple[TokenEvent, ...] = ()
    stats: StepStats | None = None


@dataclass(frozen=True, slots=True)
class DecisionInfo:
    """A trained task as requests may use it: its question's ``wording`` and ``labels``.

    See DecisionTask for ``labelled`` and ``scale``.

    ``layers`` are those below full depth after which its heads read.
    """

    wording: str
    labels: tuple[str, ...]
    labelled: bool
    layers: tuple[int, ...]
    points: tuple[DecisionPoint, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts about a loaded engine; constant while it lives.

    ``exit_layers`` are the exit points, ascending; they cut the ``num_layers`` layers into
    segments. ``max_num_batched_tokens`` bounds the rows of one step, ``max_exit_debt`` the
    positions that one sequence may owe. ``head_chances`` are those of the draft head's file, empty
    without a draft head. Where the engine ``decides_on_device`` a device loop decodes what needs no
    guesses. ``decision_layers`` cut the stack for decisions; ``decision_tasks`` are
    those that heads were trained for, by name. ``hidden_size`` is the length of an embedding.
    Layers take inputs of 8 bits of all requests if it is ``coarse``, else of those that are content
    with a quality of ``coarse_quality``, where that pays (None: of none).
    """

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
    max_num_batched_tokens: int = 512
    max_exit_debt: int = 16
    eos_token_ids: tuple[int, ...] = field(default=())
    points: tuple[OperatingPoint, ...] = ()
    prompt_threshold: float | None = None
    quality_floor: float | None = None
    cache_dtype: str = "float32"
    head_chances: tuple[tuple[float, float], ...] = ()
    decides_on_device: bool = False
    decision_layers: tuple[int, ...] = ()
    decision_tasks: Mapping[str, DecisionInfo] = field(default_factory=dict)
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    hidden_size: int = 0
    coarse: bool = False
    coarse_quality: float | None = None

    @property
    def draft_head(self) -> bool:
        """Whether there is a draft head."""
        return bool(self.head_chances)

    @property
    def num_segments(self) -> int:
        """Segments of the stack."""
        return len(self.exit_layers) + 1

    def layers_of(self, segment: int) -> int:
        """Layers of one segment."""
        bounds = (0, *self.exit_layers, self.num_layers)
        return bounds[segment + 1] - bounds[segment]
