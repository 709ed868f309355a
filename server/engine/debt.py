"""The KV debt ledger: positions that lack K,V above their exit, and where their states are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from offramp.server.errors import BugError


class RowPool:
    """Rows of the runner's hidden buffer, handed out one by one."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = list(range(num_rows - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Rows nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` rows; asking for more than are free is a bug of the caller."""
        if count > len(self._free):
            raise BugError("More hidden rows were asked for than are free.")
        return [self._free.pop() for _ in range(count)]

    def give(self, rows: list[int]) -> None:
        """Return rows."""
        self._free += rows


@dataclass(frozen=True, slots=True)
class Owed:
    """One position without K,V from segment ``segment`` up; ``row`` keeps its exit state."""

    position: int
    segment: int
    row: int


class DebtLedger:
    """Debts by slot, each slot's in order of position."""

    def __init__(self, rows: RowPool, num_segments: int) -> None:
        self._rows = rows
        self._num_segments = num_segments
        self._debts: dict[int, list[Owed]] = {}

    @property
    def total(self) -> int:
        """Positions owed by all slots together."""
        return sum(map(len, self._debts.values()))

    @property
    def slots(self) -> set[int]:
        """Ids of slots in debt."""
        return set(self._debts)

    def owe(self, slot: int, debt: Owed) -> None:
        """Write down a debt; the ledger takes over its row."""
        self._debts.setdefault(slot, []).append(debt)

    def owed(self, slot: int) -> list[Owed]:
        """All debts of a slot."""
        return self._debts.get(slot, [])

    def lacking(self, slot: int, segment: int) -> list[Owed]:
        """Debts that must be paid before the slot's next token runs ``segment``."""
        return [debt for debt in self.owed(slot) if debt.segment <= segment]

    def advance(self, slot: int, segment: int) -> int:
        """Debts at ``segment`` ran through it (recompute); returns how many it paid, at the top."""
        kept: list[Owed] = []
        paid = 0
        for debt in self._debts.pop(slot, []):
            moved = replace(debt, segment=segment + 1) if debt.segment == segment else debt
            if moved.segment < self._num_segments:
                kept.append(moved)
            else:
                self._rows.give([moved.row])
                paid += 1
        if kept:
            self._debts[slot] = kept
        return paid

    def withdraw(self, slot: int) -> list[Owed]:
        """Strike the slot's debts off the ledger; their rows are the caller's again."""
        return self._debts.pop(slot, [])

    def settle(self, slot: int) -> None:
        """All debts of the slot are paid or void; their rows are free."""
        self._rows.give([debt.row for debt in self._debts.pop(slot, [])])
