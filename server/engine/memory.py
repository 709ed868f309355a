"""All a slot holds on the device: K,V blocks, hidden rows and debts, taken and given together."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from offramp.server.engine.blocks import BlockPool, OutOfBlocks, block_hashes
from offramp.server.engine.debt import DebtLedger, RowPool
from offramp.server.engine.slot import Slot
from offramp.server.errors import BugError

__all__ = ["OutOfBlocks", "SequenceMemory"]


class SequenceMemory:
    """Owner of the block pool, the hidden rows and the debt ledger."""

    def __init__(
        self, blocks: BlockPool, rows: RowPool, ledger: DebtLedger, *, prefix_caching: bool
    ) -> None:
        self.blocks = blocks
        self.rows = rows
        self.ledger = ledger
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._prefix_caching = prefix_caching

    def admit(self, slot: Slot) -> bool:
        """Take the blocks of all the slot's tokens, cached ones first; False if they do not fit.

        At least the last token is left to compute, since its logits are wanted; of an audit, every
        position that makes a token of the answer.
        """
        size = self.blocks.block_size
        shared: list[int] = []
        if self._prefix_caching:
            slot.hashes = block_hashes(slot.tokens, size, slot.hashes)
            wanted = slot.num_prompt if slot.audit else len(slot.tokens)
            shared = self.blocks.share(slot.hashes[: (wanted - 1) // size])
        missing = -(-len(slot.tokens) // size) - len(shared)
        home = slot.id * 7919 % self.blocks.num_blocks
        try:
            slot.table = shared + self.blocks.allocate(missing, shared[-1] if shared else home)
        except OutOfBlocks:
            self.blocks.release(shared)
            return False
        cached = len(shared) * size
        slot.computed = [cached] * slot.num_segments
        if self._prefix_caching:
            self.prefix_queries += len(slot.tokens)
            self.prefix_hits += cached
        if slot.admitted_at is None:
            slot.cached_tokens = min(cached, slot.num_prompt)
        return True

    def grow(self, slot: Slot, length: int) -> None:
        """Make room for ``length`` positions; raises OutOfBlocks."""
        missing = -(-length // self.blocks.block_size) - len(slot.table)
        if missing > 0:
            slot.table += self.blocks.allocate(missing, slot.table[-1] if slot.table else -1)

    def board(self, slot: Slot, count: int) -> None:
        """Give the next ``count`` positions their hidden rows."""
        start = slot.computed[0]
        slot.ride = list(range(start, start + count))
        slot.ride_rows = self.rows.take(count)
        slot.filled.clear()

    def alight(self, slot: Slot, keep_from: int | None = None) -> None:
        """Free the ride's rows, but not those of positions ``keep_from`` and up."""
        first = len(slot.ride)
        if keep_from is not None:
            first = bisect_left(slot.ride, keep_from)
        self.rows.give(slot.ride_rows[:first])
        slot.ride, slot.ride_rows = slot.ride[first:], slot.ride_rows[first:]

    def rejoin(self, slot: Slot) -> None:
        """Positions that left early are on the ride again: their debts ran every segment."""
        debts = self.ledger.withdraw(slot.id)
        slot.ride = [debt.position for debt in debts] + slot.ride
        slot.ride_rows = [debt.row for debt in debts] + slot.ride_rows

    def publish(self, slot: Slot) -> None:
        """Make blocks whose K,V are complete and exact findable by other requests."""
        if not self._prefix_caching:
            return
        size = self.blocks.block_size
        whole = min(slot.computed[-1], slot.verified)
        if slot.exact is not None:
            whole = min(whole, slot.exact)
        if whole // size > len(slot.hashes):
            slot.hashes = block_hashes(slot.tokens[: whole // size * size], size, slot.hashes)
        for index in range(slot.published, whole // size):
            self.blocks.register(slot.table[index], slot.hashes[index])
        slot.published = max(slot.published, whole // size)

    def release(self, slot: Slot) -> None:
        """Give back everything the slot holds."""
        self.alight(slot)
        self.ledger.settle(slot.id)
        self.blocks.release(slot.table)
        slot.table = []

    def check(self, slots: Iterable[Slot]) -> None:
        """Audit blocks, rows and debts against the live slots."""
        live = {slot.id: slot for slot in slots}
        self.blocks.check([slot.table for slot in live.values()])
        if not self.ledger.slots <= live.keys():
            raise BugError("A released slot is still in debt.")
        held = self.ledger.total + sum(len(slot.ride_rows) for slot in live.values())
        if held + self.rows.num_free != self.rows.num_rows:
            raise BugError("Held and free hidden rows do not add up.")
        for slot in live.values():
            self._check_debts(slot)

    def _check_debts(self, slot: Slot) -> None:
        """What segment i lacks below the ground segment's front rides or is owed there."""
        riding = slot.filled.union(slot.ride)
        for segment, computed in enumerate(slot.computed):
            owed = [debt.position for debt in self.ledger.lacking(slot.id, segment)]
            lacking = [p for p in range(computed, slot.computed[0]) if p not in riding]
            if owed != lacking:
                raise BugError(f"Slot {slot.id} lacks K,V in segment {segment} that nobody owes.")
