"""What a client asked of one generation, as plain data shared by the engine and the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ExitMode(StrEnum):
    """How a request's tokens may leave the stack early."""

    OFF = "off"
    ADAPTIVE = "adaptive"


class KVFill(StrEnum):
    """How the K,V of layers a token skipped are made (design: KV fill)."""

    PROJECT = "project"
    COPY = "copy"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one sequence.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 switch their filters off.
    ``seed`` makes the draws a function of (seed, index of the token) alone, so they do not depend
    on who shares the batch. ``stop_token_ids`` end the sequence and are not part of its text.
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

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits change before the choice, so that plain argmax is not enough."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.min_tokens
        )


@dataclass(frozen=True, slots=True)
class ExitSettings:
    """Early-exit wishes of one request.

    ``threshold`` is the gate score, 0 to 1, at which a token leaves; None takes the thresholds
    stored with the exits. ``min_layer`` is the first layer after which tokens may leave.
    """

    mode: ExitMode = ExitMode.OFF
    threshold: float | None = None
    min_layer: int = 0
    kv_fill: KVFill = KVFill.PROJECT
