"""One step of the engine as plain data: what to run and what came of it.

The scheduler writes steps, the runner carries them out. Nothing here holds a tensor, so a step can
be made, checked and replayed without torch.

A *row* is an index into the runner's hidden buffer: the hidden state of one position of one slot
while that position is inside the stack, or owes layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp.models.sampling_params import KVFill, SamplingParams


@dataclass(frozen=True, slots=True)
class SlotRows:
    """Consecutive positions ``start .. start + len(rows)`` of one slot.

    ``table`` lists the slot's KV blocks in order of position. ``token_ids`` (ground segment only)
    are the tokens to embed. ``threshold`` is the gate score at which the last row leaves after
    this segment, None where it may not.
    """

    start: int
    rows: tuple[int, ...]
    table: Sequence[int]
    token_ids: tuple[int, ...] = ()
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class RunSegment:
    """Run all layers of one segment over the rows of several slots."""

    segment: int
    work: tuple[SlotRows, ...]


@dataclass(frozen=True, slots=True)
class OwedRows:
    """Debts of a slot at positions ``start .. start + len(rows)``.

    They left after segment ``segment - 1``, so they lack K,V from segment ``segment`` up.
    """

    segment: int
    start: int
    rows: tuple[int, ...]
    table: Sequence[int]


@dataclass(frozen=True, slots=True)
class FillKV:
    """Make the K,V of skipped layers for many positions in one launch."""

    method: KVFill
    work: tuple[OwedRows, ...]


@dataclass(frozen=True, slots=True)
class HeadRow:
    """A row that needs a token: ``exit`` is the exit point it left at, None for full depth.

    ``tokens`` are prompt and answer so far, the first ``num_prompt`` of them prompt; penalties
    read them. ``index`` counts the answer's tokens and picks the random draw.
    """

    row: int
    exit: int | None
    sampling: SamplingParams
    index: int
    tokens: Sequence[int]
    num_prompt: int


@dataclass(frozen=True, slots=True)
class RunHead:
    """Turn rows into tokens: exit heads where rows left early, LM head, sampler."""

    work: tuple[HeadRow, ...]


Step = RunSegment | FillKV | RunHead


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of a step.

    ``leave`` (segments): for each slot whether the gate of its last row fired.
    ``token_ids`` (head): one token a row. ``seconds``: time on the device.
    """

    seconds: float
    leave: tuple[bool, ...] = ()
    token_ids: tuple[int, ...] = ()
