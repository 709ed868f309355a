"""Measure what steps cost on this machine before the first request."""

from __future__ import annotations

from offramp.models.sampling_params import NEVER, ExitCriterion, KVFill, SamplingParams
from offramp.models.step import (
    ExitCheck,
    FillKV,
    HeadRow,
    OwedRows,
    RunHead,
    RunSegment,
    SequenceRows,
    Step,
)
from offramp.server.engine.engine import StepRunner
from offramp.server.engine.policy import CostModel
from offramp.server.engine.request import EngineInfo

_ROWS = (1, 2, 4, 8, 16)
_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def measure_costs(runner: StepRunner, info: EngineInfo, costs: CostModel) -> None:
    """Run every kind of step at a few row counts, twice, and keep the second time.

    The rows are slots of one token each in blocks nobody holds yet. Nothing is measured where no
    exit could be taken: then there is nothing to decide.
    """
    if not info.exit_layers:
        return
    largest = min(info.max_num_seqs, info.num_blocks)
    for count in [rows for rows in _ROWS if rows <= largest]:
        for _ in range(2):
            seconds = [runner.run(step) for step in _steps(count, len(info.exit_layers))]
        segments = seconds[: len(info.exit_layers) + 1]
        for index, result in enumerate(segments):
            costs.segments[index].add(count, result.seconds - result.check_seconds)
            costs.checks[index].add(count, result.check_seconds)
        costs.head.add(count, seconds[-2].seconds)
        costs.fill.add(count, seconds[-1].seconds)


def _steps(count: int, exits: int) -> list[Step]:
    """All segments, the head and a fill of the lowest exit's debts for ``count`` slots."""
    heads = [HeadRow(row, _GREEDY, 0, (0,), 1) for row in range(count)]
    steps: list[Step] = []
    for segment in range(exits + 1):
        work = tuple(
            SequenceRows(
                (0,),
                (row,),
                (row,),
                (0,) if segment == 0 else (),
                ExitCheck(ExitCriterion.MAX_PROB, NEVER, heads[row]) if segment < exits else None,
            )
            for row in range(count)
        )
        steps.append(RunSegment(segment, work))
    owed = tuple(OwedRows(1, (0,), (row,), (row,)) for row in range(count))
    return [*steps, RunHead(tuple(heads)), FillKV(KVFill.PROJECT, owed)]
