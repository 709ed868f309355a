"""What a step of the host decoder did, for metrics and logs."""

from __future__ import annotations

from bisect import bisect_left
from collections import abc
from typing import Any

from offramp.models.sampling_params import KVFill
from offramp.models.step import FillKV, RunSegments, SequenceRows, StepResult
from offramp.server.engine.request import StepStats
from offramp.server.engine.sequence import Sequence


def step_stats(
    step: RunSegments | FillKV,
    sequences: list[Sequence],
    result: StepResult,
    facts: dict[str, Any],
) -> StepStats:
    """What a step did; ``facts`` are fields that are known already."""
    if isinstance(step, FillKV):
        rows = sum(len(item.rows) for item in step.work)
        facts |= {"fill_tokens": rows, "fill_method": str(step.method)}
        return StepStats("fill", step.work[0].segment, decode_rows=rows, **facts)
    if facts.get("fill_tokens"):
        facts["fill_method"] = str(KVFill.RECOMPUTE)
    total = sum(len(item.rows) for item in step.work)
    decode = sum(
        len(item.positions) - bisect_left(item.positions, sequence.num_prompt)
        for item, sequence in zip(step.work, sequences, strict=True)
        if not sequence.audit
    )
    return StepStats(
        "segments",
        step.last,
        first_segment=step.first,
        head_seconds=result.head_seconds,
        prefill_rows=total - decode,
        decode_rows=decode,
        exit_head_rows=result.exit_head_rows,
        prompt_left=sum(map(len, result.prompt_left)),
        **facts,
    )


def checked_prompt_rows(work: abc.Sequence[SequenceRows], sequences: abc.Sequence[Sequence]) -> int:
    """Prompt rows of a step that belong to requests whose prompt tokens may leave."""
    return sum(
        bisect_left(item.positions, sequence.num_prompt)
        for item, sequence in zip(work, sequences, strict=True)
        if sequence.request.exits.prefill_threshold is not None and not sequence.audit
    )
