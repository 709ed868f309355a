"""What a client wants of one generation, as plain data shared by the engine and the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

NEVER = 1.01
"""A threshold that no score reaches: with it no check is made."""


class ExitMode(StrEnum):
    """How a request's tokens may leave the stack early."""

    OFF = "off"
    ADAPTIVE = "adaptive"
    LOSSLESS = "lossless"


class ExitCriterion(StrEnum):
    """Rule by which a token may leave at an exit point; see criteria.py for each one's source."""

    TWO_KEY = "two_key"
    GATE = "gate"
    MAX_PROB = "max_prob"
    TOP2_GAP = "top2_gap"
    ENTROPY = "entropy"
    ENTROPY_DROP = "entropy_drop"
    SATURATION = "saturation"
    PATIENCE = "patience"
    Q_EXIT = "q_exit"
    PREDICTOR = "predictor"
    FIXED = "fixed"
    PROMPT_DEPTH = "prompt_depth"

    @property
    def needs_threshold(self) -> bool:
        """Whether there is a score to compare; without, all leave at the first exit allowed."""
        return self is not ExitCriterion.FIXED


DEFAULT_CRITERION = ExitCriterion.TWO_KEY
"""The rule that the exit file's own thresholds are for, and the one that GPUs decide by."""


class DraftSource(StrEnum):
    """Who guessed a draft: the draft head, the text so far, an exit, or the answer's grammar."""

    HEAD = "head"
    NGRAM = "ngram"
    EXIT = "exit"
    GRAMMAR = "grammar"


class TokenSource(StrEnum):
    """Where a token of an answer came from.

    The model alone made it, at full depth or at an exit (``model``) or at full depth although its
    score would have let it leave (``stayed``); or full depth verified what one of DraftSource, here
    under the same names, had guessed.
    """

    MODEL = "model"
    STAYED = "stayed"
    HEAD = "head"
    NGRAM = "ngram"
    EXIT = "exit"
    GRAMMAR = "grammar"


class KVFill(StrEnum):
    """How the K,V of layers a token skipped are made (design: KV fill).

    ``auto`` is ``recompute`` where by measured cost the owed rows join a later pass for less than a
    projection would take, else ``project``. ``absent`` leaves zeros in their place; it exists to be
    measured against.
    """

    AUTO = "auto"
    PROJECT = "project"
    COPY = "copy"
    RECOMPUTE = "recompute"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one sequence.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 switch their filters off.
    ``seed`` makes the draws a function of (seed, index of the token) alone, so they do not depend
    on who shares the batch. ``stop_token_ids`` end the sequence and are not part of its text.
    Only ``allowed_token_ids`` may come, if there are any, and never the last token of one of
    ``bad_words`` where the others are before it. ``logprobs`` asks for the log-probability of every
    token, and of so many best ones beside it; ``prompt_logprobs`` for those of the prompt's tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits change before the choice, so that plain argmax is not enough."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.min_tokens
            or self.allowed_token_ids
            or self.bad_words
        )

    @property
    def filters_tokens(self) -> bool:
        """Whether random tokens come from the likelier ones alone."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True, slots=True)
class ExitSettings:
    """Early-exit wishes of one request.

    ``thresholds`` are the scores, 0 to 1, at which a token leaves at each exit point; None takes
    those in force for the whole server. ``quality`` is the agreement wanted, ``min_layer`` the
    first layer after which tokens may leave. With ``always`` they leave where their score says so,
    whether or not that saves time. ``prefill_threshold`` is the gate score at which prompt tokens
    leave too, None keeps them all.
    ``deadline_s`` is the wish for the whole answer, in seconds from its arrival: an answer that
    would be late takes ``late_thresholds``, the loosest its quality allows.
    """

    mode: ExitMode = ExitMode.OFF
    criterion: ExitCriterion = ExitCriterion.TWO_KEY
    thresholds: tuple[float, ...] | None = None
    quality: float | None = None
    min_layer: int = 0
    always: bool = False
    kv_fill: KVFill = KVFill.AUTO
    prefill_threshold: float | None = None
    deadline_s: float | None = None
    late_thresholds: tuple[float, ...] | None = None
