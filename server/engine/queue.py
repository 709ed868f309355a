"""One waiting room: slots in order of arrival."""

from __future__ import annotations

from collections.abc import Iterator

from offramp.server.engine.slot import Place, Slot


class SequenceQueue:
    """FIFO of slots waiting for the same thing; stamps each with its place and arrival."""

    def __init__(self, place: Place, segment: int = 0) -> None:
        self._place = place
        self._segment = segment
        self._slots: dict[int, Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(list(self._slots.values()))

    def __contains__(self, slot: Slot) -> bool:
        return slot.id in self._slots

    def put(self, slot: Slot, now: float) -> None:
        """Append a slot."""
        slot.place, slot.segment, slot.since = self._place, self._segment, now
        self._slots[slot.id] = slot

    def remove(self, slot: Slot) -> None:
        """Take one slot out."""
        del self._slots[slot.id]

    def take_all(self) -> list[Slot]:
        """Empty the queue; the slots count as running."""
        slots = list(self._slots.values())
        self._slots.clear()
        for slot in slots:
            slot.place = Place.RUNNING
        return slots

    def oldest_age(self, now: float) -> float:
        """Seconds the first slot has waited; 0 if empty."""
        return now - next(iter(self._slots.values())).since if self._slots else 0.0
