"""Requests whose tokens are decided on the device, ride after ride (models/decode_loop.py).

A request comes aboard when its prompt is done and stays until it ends or gives its blocks to
another. The host learns of a ride when the next one is already under way, so a request that has
ended may have made a token more; nobody sees it. What a late ride writes into blocks that were
given back is harmless: the device works in order, so their next holder writes later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Protocol

from offramp.models.device_loop import Boarding, DeviceToken, LaunchResult
from offramp.models.sampling_params import NEVER, ExitCriterion, ExitMode, KVFill
from offramp.server.engine.asking import Limits
from offramp.server.engine.memory import SequenceMemory
from offramp.server.engine.rebatching import Holds, Rebatching
from offramp.server.engine.slot import Place, Slot
from offramp.server.engine.targets import ExitTargets

# How K,V of skipped layers may be made: in rides they are projected at once.
_FILLS = frozenset({KVFill.AUTO, KVFill.PROJECT})


class Flight(Protocol):
    """A ride under way."""

    def result(self) -> LaunchResult:
        """Wait for its end."""
        ...


class Loop(Protocol):
    """What rides: models.device_loop.DeviceLoop, or a fake in tests."""

    def board(self, boardings: Sequence[Boarding]) -> None:
        """Give slots to requests."""
        ...

    def grow(self, blocks: Mapping[tuple[int, int], int], ends: Mapping[int, int]) -> None:
        """Write K,V blocks and slots' ends."""
        ...

    def ask(self, thresholds: Mapping[int, Sequence[float]]) -> None:
        """Change the scores at which slots' tokens leave."""
        ...

    def hold(self, holds: Holds) -> None:
        """Say what riders wait for."""
        ...

    def clear(self, slots: Sequence[int]) -> None:
        """Take slots back."""
        ...

    def launch(self, live: int) -> Flight:
        """Start a ride."""
        ...


@dataclass(slots=True, eq=False)
class _Berth:
    """A request's slot on the device, and how many of its blocks the device knows."""

    number: int
    slot: Slot
    blocks: int = 0


class Rides:
    """Owns which request has which of the device's ``berths`` slots.

    ``make_room`` grows a slot's block table to a length, at the cost of others or of itself;
    ``rebatching`` says what deep tokens wait for (None: what the loop was told stays).
    """

    def __init__(
        self,
        loop: Loop,
        limits: Limits,
        memory: SequenceMemory,
        targets: ExitTargets,
        make_room: Callable[[Slot, int], object],
        rebatching: Rebatching | None = None,
    ) -> None:
        self._loop = loop
        self._limits = limits
        self._memory = memory
        self._targets = targets
        self._make_room = make_room
        self._rebatching = rebatching
        self._free = list(range(limits.max_num_seqs))
        heapify(self._free)
        self._aboard: dict[int, _Berth] = {}
        self._left: list[int] = []
        self._told = self._verdict
        self._flying: tuple[Flight, list[_Berth]] | None = None
        self.waiting: tuple[int, ...] = (0,) * limits.num_segments
        """Slots at each segment after the last ride."""
        self.head_rows = 0
        """Rows that exits' LM heads were run for in the last ride."""

    def __len__(self) -> int:
        return len(self._aboard)

    def __contains__(self, slot: Slot) -> bool:
        return slot.id in self._aboard

    def takes(self, slot: Slot) -> bool:
        """Whether the slot's next tokens can be decided on the device."""
        exits, sampling = slot.request.exits, slot.request.sampling
        plain = slot.decoding and not slot.audit and not slot.drafts and not slot.lossless
        if not plain or sampling.adjusts_logits or self._memory.ledger.owed(slot.id):
            return False
        if exits.mode is ExitMode.OFF or not self._limits.exit_layers:
            return True
        if self._targets.online is not None or exits.deadline_s is not None:
            return False
        return exits.criterion is ExitCriterion.TWO_KEY and exits.kv_fill in _FILLS

    def take(self, slot: Slot) -> None:
        """The slot comes aboard; it rides from the next launch on."""
        self._aboard[slot.id] = _Berth(heappop(self._free), slot)
        slot.place = Place.ABOARD

    def give_up(self, slot: Slot) -> None:
        """The slot leaves; what a ride under way makes for it is forgotten."""
        number = self._aboard.pop(slot.id).number
        self._left.append(number)
        heappush(self._free, number)
        if not self._aboard:
            self.waiting = (0,) * self._limits.num_segments

    def fly(self) -> list[tuple[Slot, DeviceToken]]:
        """Start a ride for all aboard, then wait for the one before: what it made.

        The caller must pass every landed slot to `commit`.
        """
        flying, self._flying = self._flying, None
        self.head_rows = 0
        for berth in list(self._aboard.values()):
            if berth.slot.id in self._aboard:
                self._make_room(berth.slot, min(len(berth.slot.tokens) + 1, self._end(berth.slot)))
        if self._aboard:
            self._tell()
            self._flying = self._loop.launch(len(self._aboard)), list(self._aboard.values())
        if flying is None:
            return []
        result = flying[0].result()
        self.waiting, self.head_rows = result.waiting, result.head_rows
        self._rebatch(result)
        return [
            (berth.slot, result.landed[berth.number])
            for berth in flying[1]
            if berth.number in result.landed and self._aboard.get(berth.slot.id) is berth
        ]

    def commit(self, slot: Slot, landed: DeviceToken) -> None:
        """The slot's token has been made, and K,V of the position before in all layers."""
        slot.tokens.append(landed.token)
        position = len(slot.tokens) - 2
        slot.computed = [position + 1] * len(slot.computed)
        slot.layers_executed += landed.depth
        if landed.depth < self._limits.num_layers:
            slot.left_early += 1
            slot.exact = position if slot.exact is None else min(slot.exact, position)
        self._memory.publish(slot)

    def _rebatch(self, result: LaunchResult) -> None:
        if self._rebatching is None:
            return
        for landed in result.landed.values():
            self._rebatching.observe(landed.depth)
        if self._rebatching.due() and self._aboard:
            self._loop.hold(self._rebatching.choose(len(self._aboard)))

    def _tell(self) -> None:
        """Bring the device up to date."""
        self._loop.clear(self._left)
        self._left = []
        fresh = [berth for berth in self._aboard.values() if not berth.blocks]
        self._loop.board([self._boarding(berth) for berth in fresh])
        grown = [b for b in self._aboard.values() if b.blocks and b.blocks < len(b.slot.table)]
        blocks = {
            (berth.number, index): berth.slot.table[index]
            for berth in grown
            for index in range(berth.blocks, len(berth.slot.table))
        }
        self._loop.grow(blocks, {berth.number: self._room(berth.slot) for berth in grown})
        for berth in (*fresh, *grown):
            berth.blocks = len(berth.slot.table)
        if self._told != self._verdict:
            self._told = self._verdict
            known = (berth for berth in self._aboard.values() if berth not in fresh)
            self._loop.ask({berth.number: self._thresholds(berth.slot) for berth in known})

    @property
    def _verdict(self) -> tuple[tuple[float, ...], int]:
        """What moves the thresholds of requests: the server's own, and the guard's level."""
        return self._targets.thresholds, self._targets.guard_level

    def _boarding(self, berth: _Berth) -> Boarding:
        slot = berth.slot
        return Boarding(
            slot=berth.number,
            token=slot.tokens[-1],
            position=len(slot.tokens) - 1,
            index=slot.num_generated,
            table=slot.table,
            end=self._room(slot),
            sampling=slot.request.sampling,
            thresholds=self._thresholds(slot),
        )

    def _thresholds(self, slot: Slot) -> tuple[float, ...]:
        exits, layers = slot.request.exits, self._limits.exit_layers
        if not slot.exits_on or not self._limits.max_debt:
            return (NEVER,) * len(layers)
        asked = self._targets.of(exits, late=False)
        return tuple(
            NEVER if layer < exits.min_layer else threshold
            for layer, threshold in zip(layers, asked, strict=True)
        )

    def _room(self, slot: Slot) -> int:
        """The first position that is not to be run yet, or ever."""
        return min(len(slot.table) * self._memory.blocks.block_size, self._end(slot))

    def _end(self, slot: Slot) -> int:
        """The first position whose token nobody wants: position p makes token p + 1."""
        longest = min(
            slot.num_prompt + slot.request.sampling.max_tokens, self._limits.max_model_len
        )
        return longest - 1


def hold_shares(segments: Sequence[tuple[float, float]], rides: float) -> Holds:
    """What riders wait for such that no slot-second is lost, and at most ``rides`` rides.

    ``segments`` are the seconds of each for one rider and for many, the last with the head.
    Holding n riders back while r others go again saves the r a pass above, and costs all of them
    the fixed part of a ground step and the n a whole one (ExitPolicy.holds); so it pays while n / r
    is under the share.
    """
    fixed, ground = segments[0]
    shares = [(0.0, 0.0)]
    for index in range(1, len(segments)):
        above = sum(many for _, many in segments[index:])
        shares.append((max(0.0, above - fixed) / (ground + fixed), rides))
    return shares
