"""A decode loop over the fake runner's pages, as late with its answers as a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from offramp.models.device_loop import Boarding, DeviceToken, LaunchResult
from tests.server.engine.fake_runner import MUST_BE_EXACT, Cell, FakeRunner, link, token_after


@dataclass
class _Seat:
    """What the device knows of a slot."""

    token: int
    position: int
    index: int
    end: int
    sampling_seed: int
    thresholds: tuple[float, ...]
    table: dict[int, int] = field(default_factory=dict)


class FakeFlight:
    """Results of a ride, read later."""

    def __init__(self, result: LaunchResult) -> None:
        self._result = result

    def result(self) -> LaunchResult:
        """See Flight."""
        return self._result


class FakeLoop:
    """Carries out rides at once, in the order they come, as a stream of a device does.

    A share of the riders is held and makes nothing. Pages that nobody gave to a slot, positions
    behind its end and tokens that left against their thresholds are faults.
    """

    def __init__(
        self, runner: FakeRunner, block_size: int, exit_layers: Sequence[int], layers: int
    ) -> None:
        self._runner = runner
        self._block_size = block_size
        self._layers = (*exit_layers, layers)
        self._seats: dict[int, _Seat] = {}
        self._random = Random(3)
        self.rides = 0
        self.held: list[Sequence[tuple[float, float]]] = []

    def board(self, boardings: Sequence[Boarding]) -> None:
        """See Loop."""
        for each in boardings:
            assert each.slot not in self._seats
            self._seats[each.slot] = _Seat(
                each.token,
                each.position,
                each.index,
                each.end,
                each.sampling.seed,
                tuple(each.thresholds),
                dict(enumerate(each.table)),
            )

    def grow(self, blocks: Mapping[tuple[int, int], int], ends: Mapping[int, int]) -> None:
        """See Loop."""
        for (slot, index), block in blocks.items():
            assert index not in self._seats[slot].table
            self._seats[slot].table[index] = block
        for slot, end in ends.items():
            assert end >= self._seats[slot].end
            self._seats[slot].end = end

    def ask(self, thresholds: Mapping[int, Sequence[float]]) -> None:
        """See Loop."""
        for slot, row in thresholds.items():
            self._seats[slot].thresholds = tuple(row)

    def hold(self, holds: Sequence[tuple[float, float]]) -> None:
        """See Loop."""
        assert len(holds) == len(self._layers)
        self.held.append(holds)

    def clear(self, slots: Sequence[int]) -> None:
        """See Loop."""
        for slot in slots:
            self._seats.pop(slot, None)

    def launch(self, live: int) -> FakeFlight:
        """See Loop."""
        assert live == len(self._seats)
        self.rides += 1
        landed = {}
        for slot, seat in self._seats.items():
            if seat.position < seat.end and self._random.random() < 0.8:
                landed[slot] = self._ride(seat)
        waiting = (len(self._seats), *([0] * (len(self._layers) - 1)))
        return FakeFlight(LaunchResult(landed, waiting, 0))

    def _ride(self, seat: _Seat) -> DeviceToken:
        places = [self._place(seat, position) for position in range(seat.position + 1)]
        pages, segments = self._runner.pages, len(self._layers)
        earlier = [[pages[segment, place] for place in places[:-1]] for segment in range(segments)]
        content = link(earlier[0][-1].content, seat.token)
        exit_point = self._exit(seat)
        for segment in range(segments):
            exact = segment <= exit_point and all(cell.exact for cell in earlier[segment])
            pages[segment, places[-1]] = Cell(content, exact)
        assert seat.sampling_seed != MUST_BE_EXACT or pages[segments - 1, places[-1]].exact
        seat.token = token_after(content)
        seat.position += 1
        seat.index += 1
        return DeviceToken(seat.token, self._layers[exit_point])

    def _exit(self, seat: _Seat) -> int:
        for point, threshold in enumerate(seat.thresholds):
            if threshold <= 1 and self._random.random() < 0.5:
                return point
        return len(seat.thresholds)

    def _place(self, seat: _Seat, position: int) -> int:
        block = seat.table[position // self._block_size]
        return block * self._block_size + position % self._block_size
