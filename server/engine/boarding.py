"""Who gets on at the ground segment: decode tokens, prompt chunks, new admissions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from offramp.server.engine.asking import Limits
from offramp.server.engine.memory import OutOfBlocks, SequenceMemory
from offramp.server.engine.queue import SequenceQueue
from offramp.server.engine.rebatching import Rebatching
from offramp.server.engine.rides import Loop, Rides
from offramp.server.engine.slot import Place, Slot
from offramp.server.engine.targets import ExitTargets

# Prompt rows an audit may add to a step that others wait for.
_AUDIT_ROWS = 32


class Boarding:
    """The lines of those not admitted yet, and the choice of each ground step's slots.

    ``queues``, ``head`` and ``live`` are the scheduler's own.
    """

    def __init__(
        self,
        limits: Limits,
        memory: SequenceMemory,
        queues: Sequence[SequenceQueue],
        head: SequenceQueue,
        live: dict[int, Slot],
    ) -> None:
        self.waiting: deque[Slot] = deque()
        self.audits: deque[Slot] = deque()
        self.preemptions = 0
        self.rides: Rides | None = None
        """Those who decode on the device, if it can."""
        self._limits = limits
        self._memory = memory
        self._queues = queues
        self._head = head
        self._live = live

    def choose(self, now: float) -> list[Slot]:
        """Decode tokens first, then chunks of admitted prompts, then new admissions."""
        chosen: list[Slot] = []
        budget = self._limits.max_num_batched_tokens
        decoding = [slot for slot in self._queues[0] if slot.decoding]
        prefilling = [slot for slot in self._queues[0] if not slot.decoding]
        for slot in [*decoding, *prefilling]:
            if slot.place is Place.SEGMENT and self._board(slot, budget, chosen):
                budget -= len(slot.ride_rows)
        for slot in self._admissions(now):
            if not self._board(slot, budget, chosen):
                break
            budget -= len(slot.ride_rows)
        return chosen

    @property
    def queue_lengths(self) -> tuple[int, ...]:
        """Slots waiting at each segment, those that the device keeps included."""
        aboard = (0,) * len(self._queues) if self.rides is None else self.rides.waiting
        return tuple(len(q) + more for q, more in zip(self._queues, aboard, strict=True))

    def decode_on(
        self, loop: Loop, targets: ExitTargets, rebatching: Rebatching | None = None
    ) -> None:
        """Let ``loop`` decode for those that it can decode for (see Rides)."""
        self.rides = Rides(loop, self._limits, self._memory, targets, self.make_room, rebatching)

    def resume(self, slot: Slot, now: float) -> None:
        """A slot with a new token waits for its next ride, on the device where that can be."""
        if self.rides is not None and slot in self.rides:
            return
        if self.rides is not None and self.rides.takes(slot):
            self.rides.take(slot)
        else:
            self._queues[0].put(slot, now)

    def make_room(self, slot: Slot, length: int, spared: Sequence[Slot] = ()) -> bool:
        """Blocks for ``length`` positions of a slot, if need be at the cost of others.

        False if it was the slot itself that had to go; those ``spared`` never have to.
        """
        while True:
            try:
                self._memory.grow(slot, length)
            except OutOfBlocks:
                if not self._preempt_one(slot, spared):
                    return False
            else:
                return True

    def take_out(self, slot: Slot) -> None:
        """Take a live slot out of its place and give back what it holds."""
        if slot.place is Place.SEGMENT:
            self._queues[slot.segment].remove(slot)
        elif slot.place is Place.HEAD:
            self._head.remove(slot)
        elif slot.place is Place.ABOARD and self.rides is not None:
            self.rides.give_up(slot)
        self._memory.release(slot)
        del self._live[slot.id]

    def _admissions(self, now: float) -> Iterator[Slot]:
        """Admit waiting slots one by one, as long as there is room for them; audits come last."""
        while len(self._live) < self._limits.max_num_seqs:
            line = self.waiting or self.audits
            auditing = any(slot.audit for slot in self._live.values())
            if not line or (line is self.audits and auditing):
                return
            slot = line[0]
            if not self._memory.admit(slot):
                return
            line.popleft()
            if slot.admitted_at is None:
                slot.admitted_at = now
            self._live[slot.id] = slot
            self._queues[0].put(slot, now)
            yield slot

    def _board(self, slot: Slot, budget: int, chosen: list[Slot]) -> bool:
        """Put the slot's next positions on a ride, preempting others for blocks if it must."""
        count = min(slot.remaining, budget, self._memory.rows.num_free)
        if slot.audit and len(self._live) > 1:
            count = min(count, _AUDIT_ROWS)
        if count <= 0:
            return False
        if not self.make_room(slot, slot.computed[0] + count, chosen):
            return False
        self._memory.board(slot, count)
        self._queues[0].remove(slot)
        slot.place = Place.RUNNING
        chosen.append(slot)
        return True

    def _preempt_one(self, needy: Slot, spared: Sequence[Slot]) -> bool:
        """Send the slot admitted last back to waiting; False if that is the needy one itself."""
        victim = max(
            (slot for slot in self._live.values() if slot not in spared),
            key=lambda slot: (slot.audit, slot.admitted_at or 0.0, slot.id),
        )
        self.take_out(victim)
        if victim.audit:
            # Nobody waits for an audit; it is not worth a second try.
            victim.place = Place.RELEASED
            return victim is not needy
        victim.restart()
        victim.place = Place.WAITING
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return victim is not needy
