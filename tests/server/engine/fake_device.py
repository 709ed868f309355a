"""A device loop over the fake runner's pages, as late with its answers as a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from offramp.models.device_loop import DeviceLoop, DeviceToken, LaunchResult, NewRow, PendingLaunch
from tests.server.engine.fake_runner import MUST_BE_EXACT, Cell, FakeRunner, link, token_after


@dataclass
class _Row:
    """What the device knows of a sequence."""

    token: int
    position: int
    index: int
    end: int
    sampling_seed: int
    thresholds: tuple[float, ...]
    table: dict[int, int] = field(default_factory=dict)


class FakeLaunch(PendingLaunch):
    """Results of a pass, read later."""

    def __init__(self, result: LaunchResult) -> None:
        self._result = result

    def result(self) -> LaunchResult:
        """See PendingLaunch."""
        return self._result


class FakeLoop(DeviceLoop):
    """Carries out passes at once, in the order they come, as a stream of a device does.

    A share of the rows is held and makes nothing. Pages that no sequence was given, positions
    behind its end and tokens that left against their thresholds are faults.
    """

    def __init__(
        self, runner: FakeRunner, block_size: int, exit_layers: Sequence[int], layers: int
    ) -> None:
        self._runner = runner
        self._block_size = block_size
        self._layers = (*exit_layers, layers)
        self._fake_rows: dict[int, _Row] = {}
        self._random = Random(3)
        self.launches = 0
        self.held: list[Sequence[tuple[float, float]]] = []

    def add(self, new: Sequence[NewRow]) -> None:
        """See DeviceLoop."""
        for each in new:
            assert each.row not in self._fake_rows
            self._fake_rows[each.row] = _Row(
                each.token,
                each.position,
                each.index,
                each.end,
                each.sampling.seed,
                tuple(each.thresholds),
                dict(enumerate(each.table)),
            )

    def grow(self, blocks: Mapping[tuple[int, int], int], ends: Mapping[int, int]) -> None:
        """See DeviceLoop."""
        for (number, index), block in blocks.items():
            assert index not in self._fake_rows[number].table
            self._fake_rows[number].table[index] = block
        for number, end in ends.items():
            assert end >= self._fake_rows[number].end
            self._fake_rows[number].end = end

    def set_thresholds(self, thresholds: Mapping[int, Sequence[float]]) -> None:
        """See DeviceLoop."""
        for number, values in thresholds.items():
            self._fake_rows[number].thresholds = tuple(values)

    def hold(self, holds: Sequence[tuple[float, float]]) -> None:
        """See DeviceLoop."""
        assert len(holds) == len(self._layers)
        self.held.append(holds)

    def clear(self, rows: Sequence[int]) -> None:
        """See DeviceLoop."""
        for number in rows:
            self._fake_rows.pop(number, None)

    def launch(self, live: int) -> FakeLaunch:
        """See DeviceLoop."""
        assert live == len(self._fake_rows)
        self.launches += 1
        tokens = {}
        for number, row in self._fake_rows.items():
            if row.position < row.end and self._random.random() < 0.8:
                tokens[number] = self._advance(row)
        waiting = (len(self._fake_rows), *([0] * (len(self._layers) - 1)))
        return FakeLaunch(LaunchResult(tokens, waiting, 0))

    def _advance(self, row: _Row) -> DeviceToken:
        places = [self._place(row, position) for position in range(row.position + 1)]
        pages, segments = self._runner.pages, len(self._layers)
        earlier = [[pages[segment, place] for place in places[:-1]] for segment in range(segments)]
        content = link(earlier[0][-1].content, row.token)
        exit_point = self._exit(row)
        for segment in range(segments):
            exact = segment <= exit_point and all(cell.exact for cell in earlier[segment])
            pages[segment, places[-1]] = Cell(content, exact)
        assert row.sampling_seed != MUST_BE_EXACT or pages[segments - 1, places[-1]].exact
        row.token = token_after(content)
        row.position += 1
        row.index += 1
        return DeviceToken(row.token, self._layers[exit_point])

    def _exit(self, row: _Row) -> int:
        for point, threshold in enumerate(row.thresholds):
            if threshold <= 1 and self._random.random() < 0.5:
                return point
        return len(row.thresholds)

    def _place(self, row: _Row, position: int) -> int:
        block = row.table[position // self._block_size]
        return block * self._block_size + position % self._block_size
