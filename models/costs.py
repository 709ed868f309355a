"""What steps cost on this machine: learnt from measured times, read off for any number of rows."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from offramp.models.exits.criteria import PROFILED
from offramp.models.sampling_params import NEVER, KVFill, SamplingParams
from offramp.models.step import (
    Draft,
    DraftRows,
    ExitCheck,
    FillKV,
    HeadRow,
    OwedRows,
    RunSegments,
    SequenceRows,
    Step,
    StepResult,
    StepRunner,
)

# A new sample moves its bucket's mean by at least this share: means follow a machine whose speed
# drifts and forget a burst of noise.
_RENEWAL = 0.05
_PROFILED_ROWS = (1, 2, 4, 8, 16)
_PROFILED_GUESSES = 3
_PROFILED_RUNS = 4
_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(slots=True)
class _Bucket:
    rows: int
    seconds: float
    samples: int
    renewed: int


class StepCost:
    """Seconds of one kind of step by its number of rows.

    Samples are averaged per row count (above 8 rows per power of two) and read off linearly between
    the averages. More rows never cost less: where noise says so, neighbours are pooled.
    """

    def __init__(self) -> None:
        self._count = 0
        self._buckets: dict[int, _Bucket] = {}
        self._rows: list[float] = []
        self._seconds: list[float] = []
        self._pooled = True

    @classmethod
    def of(cls, points: dict[int, float]) -> StepCost:
        """The cost with these seconds by rows."""
        cost = cls()
        for rows, seconds in points.items():
            cost.add(rows, seconds)
        return cost

    def add(self, rows: int, seconds: float) -> None:
        """Learn from one step."""
        if rows <= 0:
            return
        key = rows if rows <= 8 else 1 << (rows - 1).bit_length()
        self._count += 1
        bucket = self._buckets.setdefault(key, _Bucket(rows, seconds, 0, self._count))
        bucket.samples += 1
        bucket.seconds += max(_RENEWAL, 1 / bucket.samples) * (seconds - bucket.seconds)
        bucket.rows, bucket.renewed = rows, self._count
        self._pooled = False

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return bool(self._buckets)

    def at(self, rows: float) -> float:
        """Predicted seconds for ``rows`` rows; no rows, no step."""
        if rows <= 0 or not self._buckets:
            return 0.0
        if not self._pooled:
            self._pool()
        xs, ys = self._rows, self._seconds
        if len(xs) == 1 or rows <= xs[0]:
            return ys[0]
        high = min(max(1, bisect_left(xs, rows)), len(xs) - 1)
        low = high - 1
        slope = (ys[high] - ys[low]) / (xs[high] - xs[low])
        return ys[low] + slope * (rows - xs[low])

    def more(self, rows: float, extra: float = 1) -> float:
        """Seconds that ``extra`` rows add to a step of ``rows``."""
        return self.at(rows + extra) - self.at(rows)

    @property
    def fixed(self) -> float:
        """Seconds that a step takes whatever its rows: those of the first beyond one more."""
        return max(0.0, self.at(1) - self.more(1))

    def _pool(self) -> None:
        """Pool adjacent violators, so that cost rises with the rows."""
        pools: list[list[float]] = []
        for bucket in sorted(self._buckets.values(), key=lambda item: item.rows):
            # The longer a mean was not renewed, the less it has to say against its neighbours.
            weight = min(bucket.samples, 1 / _RENEWAL) * 0.99 ** (self._count - bucket.renewed)
            weight = max(weight, 1e-6)
            pools.append([weight, bucket.seconds, bucket.rows, bucket.rows])
            while len(pools) > 1 and pools[-2][1] > pools[-1][1]:
                weight, seconds, _, last = pools.pop()
                total = pools[-1][0] + weight
                pools[-1][1] = (pools[-1][1] * pools[-1][0] + seconds * weight) / total
                pools[-1][0], pools[-1][3] = total, last
        self._rows, self._seconds = [], []
        for _, seconds, first, last in pools:
            for rows in dict.fromkeys((first, last)):
                self._rows.append(rows)
                self._seconds.append(seconds)
        self._pooled = True


@dataclass(slots=True)
class CostModel:
    """Seconds of each kind of step by its rows.

    ``checks[i]`` are the exit checks after segment i, apart from ``segments[i]``; ``fill`` makes
    K,V of skipped layers by projection. ``first_guess`` is the draft head's first guess of each
    sequence, ``next_guess`` one more. ``host`` is what planning and committing a pass through the
    whole stack take, drafts included: with guesses there is more to do. With inputs of 8 bits all
    layers are ``coarse_gain`` times as fast, at the most rows that were measured.
    """

    segments: list[StepCost]
    checks: list[StepCost]
    head: StepCost = field(default_factory=StepCost)
    fill: StepCost = field(default_factory=StepCost)
    first_guess: StepCost = field(default_factory=StepCost)
    next_guess: StepCost = field(default_factory=StepCost)
    host: StepCost = field(default_factory=StepCost)
    coarse_gain: float = 1.0

    @classmethod
    def of(cls, num_segments: int) -> CostModel:
        """A model that knows nothing yet."""
        return cls(
            [StepCost() for _ in range(num_segments)], [StepCost() for _ in range(num_segments)]
        )

    def learn_draft(self, sequences: int, result: StepResult) -> None:
        """Learn from guesses for so many sequences."""
        more = max(map(len, result.guesses)) - 1
        first, others = result.guess_seconds
        self.first_guess.add(sequences, first)
        if more:
            self.next_guess.add(sequences, others / more)

    def above(self, segment: int, rows: float) -> float:
        """Seconds for ``rows`` rows through ``segment`` and all above it, without the LM head."""
        return sum(cost.at(rows) for cost in self.segments[segment:])

    def below(self, segment: int, rows: float) -> float:
        """Seconds for ``rows`` rows from the first segment to the end of ``segment``."""
        return sum(cost.at(rows) for cost in self.segments[: segment + 1])

    def full_pass(self, rows: float) -> float:
        """Seconds of all segments and the LM head, and of the host."""
        return self.above(0, rows) + self.head.at(rows) + self.host.at(rows)


def profile_costs(
    runner: StepRunner,
    num_segments: int,
    most_rows: int,
    *,
    drafts: bool = False,
    coarse: bool = False,
) -> CostModel:
    """Run every kind of step at a few row counts up to ``most_rows``, each four times.

    The fastest run but the first counts: others may use the machine meanwhile.

    Each row is a sequence of one token in a block of its own, so no request may hold blocks yet.
    ``drafts`` says that there is a draft head, ``coarse`` that layers can take inputs of 8 bits.
    Nothing is measured where there is neither a draft head nor an exit: then there is nothing to
    decide.
    """
    costs = CostModel.of(num_segments)
    if num_segments == 1 and not drafts:
        return costs
    counts = [rows for rows in _PROFILED_ROWS if rows <= most_rows]
    for count in counts:
        steps = _profiled_steps(count, num_segments)
        if drafts:
            steps.append(_profiled_draft(count))
        runs = [[runner.run(step) for step in steps] for _ in range(_PROFILED_RUNS)][1:]
        for index in range(num_segments):
            results = [run[index] for run in runs]
            costs.segments[index].add(count, min(each.segment_seconds[0] for each in results))
            costs.checks[index].add(count, min(each.check_seconds for each in results))
        costs.head.add(count, min(run[num_segments - 1].head_seconds for run in runs))
        if num_segments > 1:
            costs.fill.add(count, min(run[num_segments].seconds for run in runs))
        if drafts:
            costs.learn_draft(count, min((run[-1] for run in runs), key=lambda each: each.seconds))
    if coarse:
        costs.coarse_gain = _coarse_gain(runner, num_segments, counts[-1])
    return costs


def _coarse_gain(runner: StepRunner, num_segments: int, count: int) -> float:
    """How many times as fast ``count`` rows go up the stack with inputs of 8 bits."""
    passes = []
    for coarse in (False, True):
        work = tuple(
            SequenceRows((0,), (row,), (row,), (0,), coarse=coarse) for row in range(count)
        )
        passes.append(RunSegments(0, num_segments - 1, work))
    runs = [[runner.run(step) for step in passes] for _ in range(_PROFILED_RUNS)][1:]
    fine, rounded = (min(sum(run[i].segment_seconds) for run in runs) for i in range(2))
    return fine / rounded


def _profiled_steps(count: int, num_segments: int) -> list[Step]:
    """Each segment, the last one with the head, and a fill of the lowest exit's debts."""
    heads = tuple(HeadRow(row, _GREEDY, 0, (0,), 1) for row in range(count))
    steps: list[Step] = []
    for segment in range(num_segments):
        top = segment + 1 == num_segments
        work = tuple(
            SequenceRows(
                (0,),
                (row,),
                (row,),
                (0,) if segment == 0 else (),
                None if top else ExitCheck(PROFILED, NEVER, heads[row]),
            )
            for row in range(count)
        )
        steps.append(RunSegments(segment, segment, work, heads if top else ()))
    if num_segments == 1:
        return steps
    owed = tuple(OwedRows(1, (0,), (row,), (row,)) for row in range(count))
    return [*steps, FillKV(KVFill.PROJECT, owed)]


def _profiled_draft(count: int) -> Draft:
    own = (DraftRows(range(1), (0,), (-1,), (row,), 0, _PROFILED_GUESSES) for row in range(count))
    return Draft(tuple(own), 0.0)
