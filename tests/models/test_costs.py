"""What is measured at the start."""

from __future__ import annotations

import pytest

from offramp.models.costs import profile_costs
from offramp.models.step import RunSegments, Step, StepResult


class TimedRunner:
    """A segment takes a second and a tenth of one a row; the first runs of a step take longer.

    With inputs of 8 bits it takes half as long.
    """

    def __init__(self) -> None:
        self._seen: set[Step] = set()

    def run(self, step: Step) -> StepResult:
        """Seconds, and nothing else."""
        if not isinstance(step, RunSegments):
            return StepResult(0.1)
        rows = len(step.work)
        seconds = (1 + 0.1 * rows) * (0.5 if step.work[0].coarse else 1.0)
        if step not in self._seen:
            self._seen.add(step)
            seconds *= 9
        count = step.last + 1 - step.first
        return StepResult(seconds * count, (seconds,) * count, head_seconds=2.0)


@pytest.mark.parametrize("coarse", [False, True])
def test_steps_are_measured_by_their_rows(*, coarse: bool) -> None:
    costs = profile_costs(TimedRunner(), 3, 8, coarse=coarse)
    assert costs.above(0, 4) == pytest.approx(3 * 1.4)
    assert costs.segments[1].at(8) == pytest.approx(1.8)
    assert costs.head.at(1) == 2.0
    assert costs.fill.at(2) == pytest.approx(0.1)
    assert costs.coarse_gain == pytest.approx(2.0 if coarse else 1.0)


def test_where_nothing_is_decided_nothing_is_measured() -> None:
    costs = profile_costs(TimedRunner(), 1, 8)
    assert not costs.head.known
    assert costs.coarse_gain == 1.0
