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
        """Rows that are not held."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` rows; BugError if fewer are free."""
        if count > len(self._free):
            raise BugError("More hidden rows were taken than are free.")
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
    """Debts by sequence id, each sequence's in order of position."""

    def __init__(self, rows: RowPool, num_segments: int) -> None:
        self._rows = rows
        self._num_segments = num_segments
        self._debts: dict[int, list[Owed]] = {}

    @property
    def total(self) -> int:
        """Positions owed by all sequences together."""
        return sum(map(len, self._debts.values()))

    @property
    def sequences(self) -> set[int]:
        """Ids of sequences in debt."""
        return set(self._debts)

    def owe(self, sequence: int, debt: Owed) -> None:
        """Record a debt; the ledger takes over its row."""
        self._debts.setdefault(sequence, []).append(debt)

    def owed(self, sequence: int) -> list[Owed]:
        """All debts of a sequence."""
        return self._debts.get(sequence, [])

    def lacking(self, sequence: int, segment: int) -> list[Owed]:
        """Debts that must be paid before the sequence's next token runs ``segment``."""
        return [debt for debt in self.owed(sequence) if debt.segment <= segment]

    def advance(self, sequence: int, segment: int) -> int:
        """Debts at ``segment`` ran through it (recompute); returns how many it paid, at the top."""
        kept: list[Owed] = []
        paid = 0
        for debt in self._debts.pop(sequence, []):
            moved = replace(debt, segment=segment + 1) if debt.segment == segment else debt
            if moved.segment < self._num_segments:
                kept.append(moved)
            else:
                self._rows.give([moved.row])
                paid += 1
        if kept:
            self._debts[sequence] = kept
        return paid

    def withdraw(self, sequence: int) -> list[Owed]:
        """Take the sequence's debts off the ledger; their rows are the caller's again."""
        return self._debts.pop(sequence, [])

    def settle(self, sequence: int) -> None:
        """All debts of the sequence are paid or void; their rows are free."""
        self._rows.give([debt.row for debt in self._debts.pop(sequence, [])])
