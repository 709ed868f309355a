"""K,V blocks: which are free, which can be shared by prefix, and what each sequence holds."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import OrderedDict, abc

from offramp.server.engine.kv_debt import DebtLedger, RowPool
from offramp.server.engine.sequence import Sequence
from offramp.server.errors import BugError


def block_hashes(
    tokens: abc.Sequence[int],
    block_size: int,
    known: abc.Sequence[bytes] = (),
    salt: str = "",
    *,
    coarse: bool = False,
) -> list[bytes]:
    """Chained hashes of the full blocks of ``tokens``; ``known`` are those of its first blocks.

    SHA-256, so that no client can craft a prompt that collides with another's. Texts of another
    ``salt`` have other hashes, and so have those whose K,V are of ``coarse`` inputs.
    """
    root = hashlib.sha256(salt.encode()).digest() if salt else b""
    # Behind whole tokens, so that it makes no other text.
    mark = b"\1" if coarse else b""
    hashes = list(known)
    for index in range(len(hashes), len(tokens) // block_size):
        chunk = array("q", tokens[index * block_size : (index + 1) * block_size])
        parent = hashes[-1] if hashes else root
        hashes.append(hashlib.sha256(parent + chunk.tobytes() + mark).digest())
    return hashes


# Blocks that lack entries of the draft head, at the end of a cached prefix or behind steps without
# guesses, for which these are made all the same.
_ENTRIES_REMADE = 2


class BlockPool:
    """Reference-counted blocks ``0 .. num_blocks``.

    A block with no holder is free; if its content was registered under a hash it stays findable
    until the block is given out again: those without findable content go first, then the least
    recently used.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._written = bytearray(num_blocks)
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self.with_entries: set[int] = set()
        """Blocks whose positions all have their entries of the draft head."""

    @property
    def num_free(self) -> int:
        """Blocks without a holder, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with a holder."""
        return self.num_blocks - len(self._free)

    def before_start(self, number: int) -> int:
        """The block behind which the ``number``-th sequence best begins.

        Memory is the system's until it is written to for the first time, and getting it takes
        longer than writing. So blocks that were used before, and whose content cannot be found, go
        first. Otherwise sequences begin far apart, so that each finds neighbours free when growing.
        """
        first = next(iter(self._free), None)
        if first is not None and self._written[first] and first not in self._hash_of:
            return first - 1
        return number * 7919 % self.num_blocks

    def allocate(self, count: int, after: int) -> list[int] | None:
        """Take ``count`` free blocks, first those next to block ``after``; None if there are fewer.

        Neighbours let attention read a context without gathering it; findable content is not
        given up for them.
        """
        if count > len(self._free):
            return None
        taken: list[int] = []
        while len(taken) < count and after + 1 in self._free and after + 1 not in self._hash_of:
            after += 1
            taken.append(self._take(after))
        rest = [self._take(next(iter(self._free))) for _ in range(count - len(taken))]
        return taken + sorted(rest)

    def share(self, hashes: abc.Sequence[bytes]) -> list[int]:
        """Hold the cached blocks that match a prefix of ``hashes``; returns them in order."""
        shared: list[int] = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            self._free.pop(block, None)
            self._holders[block] += 1
            shared.append(block)
        return shared

    def register(self, block: int, digest: bytes) -> None:
        """Make a full, final block findable; the first block of equal content wins."""
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def rename(self, block: int, digest: bytes) -> None:
        """Make a block findable under ``digest`` and no other, unless another block is already."""
        if digest not in self._block_of:
            old = self._hash_of.pop(block, None)
            if old is not None:
                del self._block_of[old]
            self.register(block, digest)

    def release(self, table: abc.Sequence[int]) -> None:
        """Give up one hold on each block; tails become free before heads, so prefixes live on."""
        for block in reversed(table):
            self._holders[block] -= 1
            if self._holders[block] < 0:
                raise BugError(f"Block {block} was released twice.")
            if self._holders[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def check(self, tables: abc.Sequence[abc.Sequence[int]]) -> None:
        """Audit: the holders are exactly ``tables``, and free + used == total."""
        expected = [0] * self.num_blocks
        for table in tables:
            for block in table:
                expected[block] += 1
        if expected != self._holders:
            raise BugError("Block holders and block tables disagree.")
        if {b for b, n in enumerate(expected) if n == 0} != set(self._free):
            raise BugError("Free and held blocks do not add up to all blocks.")

    def _take(self, block: int) -> int:
        del self._free[block]
        self._written[block] = True
        self.with_entries.discard(block)
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        self._holders[block] = 1
        return block


class SequenceMemory:
    """All that sequences hold on the device: K,V blocks, hidden rows and debts."""

    def __init__(
        self, blocks: BlockPool, rows: RowPool, ledger: DebtLedger, *, prefix_caching: bool
    ) -> None:
        self.blocks = blocks
        self.rows = rows
        self.ledger = ledger
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.prefix_caching = prefix_caching

    def admit(self, sequence: Sequence) -> bool:
        """Take blocks for all the sequence's tokens, cached ones first; False if they do not fit.

        At least the last token is left to compute, since its logits are wanted; of an audit, every
        position that makes a token of the answer. A prompt's last token may lie in a cached block:
        it runs every layer, so its K,V are written again as they are.
        """
        size = self.blocks.block_size
        shared: list[int] = []
        cached = 0
        # What is found in the cache does not run, so it has no log-probabilities.
        if self.prefix_caching and not sequence.unscored:
            self._hash(sequence, sequence.tokens)
            wanted = sequence.num_prompt if sequence.audit else len(sequence.tokens)
            last = 0 if wanted == sequence.num_prompt else 1
            shared = self.blocks.share(sequence.hashes[: (wanted - last) // size])
            cached = min(len(shared) * size, wanted - 1)
        missing = -(-len(sequence.tokens) // size) - len(shared)
        after = shared[-1] if shared else self.blocks.before_start(sequence.id)
        new = self.blocks.allocate(missing, after)
        if new is None:
            self.blocks.release(shared)
            return False
        sequence.table = shared + new
        sequence.computed = [cached] * sequence.num_segments
        self._find_entries(sequence, shared)
        if self.prefix_caching:
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += cached
        if sequence.admitted_at is None:
            sequence.cached_tokens = min(cached, sequence.num_prompt)
        return True

    def grow(self, sequence: Sequence, length: int) -> bool:
        """Make room for ``length`` positions; False, and nothing taken, if there is none."""
        missing = max(0, -(-length // self.blocks.block_size) - len(sequence.table))
        new = self.blocks.allocate(missing, sequence.table[-1] if sequence.table else -1)
        sequence.table += new or ()
        return new is not None

    def start_chunk(self, sequence: Sequence, count: int) -> None:
        """Make the next ``count`` positions the sequence's chunk, with hidden rows."""
        start = sequence.computed[0]
        sequence.chunk = list(range(start, start + count))
        sequence.chunk_rows = self.rows.take(count)
        sequence.filled.clear()

    def free_chunk(self, sequence: Sequence, keep_from: int | None = None) -> None:
        """Free the chunk's rows, but not those of positions ``keep_from`` and up."""
        first = len(sequence.chunk)
        if keep_from is not None:
            first = bisect_left(sequence.chunk, keep_from)
        self.rows.give(sequence.chunk_rows[:first])
        sequence.chunk = sequence.chunk[first:]
        sequence.chunk_rows = sequence.chunk_rows[first:]

    def rejoin(self, sequence: Sequence) -> None:
        """Put positions that left early back into the chunk: their debts ran every segment."""
        debts = self.ledger.withdraw(sequence.id)
        sequence.chunk = [debt.position for debt in debts] + sequence.chunk
        sequence.chunk_rows = [debt.row for debt in debts] + sequence.chunk_rows

    def publish(self, sequence: Sequence) -> None:
        """Make blocks whose K,V are complete and exact findable by other requests."""
        if not self.prefix_caching:
            return
        size = self.blocks.block_size
        whole = min(sequence.computed[-1], sequence.verified)
        if sequence.exact is not None:
            whole = min(whole, sequence.exact)
        if whole // size > len(sequence.hashes):
            self._hash(sequence, sequence.tokens[: whole // size * size])
        for index in range(sequence.published, whole // size):
            self.blocks.register(sequence.table[index], sequence.hashes[index])
        sequence.published = max(sequence.published, whole // size)

    def _hash(self, sequence: Sequence, known: abc.Sequence[int]) -> None:
        """Hash the blocks of ``known``, the sequence's first tokens."""
        salt, size = sequence.request.cache_salt, self.blocks.block_size
        sequence.hashes = block_hashes(known, size, sequence.hashes, salt, coarse=sequence.coarse)

    def _find_entries(self, sequence: Sequence, shared: list[int]) -> None:
        """Which of the sequence's first blocks hold entries of the draft head."""
        without = [i for i, block in enumerate(shared) if block not in self.blocks.with_entries]
        size, end = self.blocks.block_size, len(shared)
        if without and without[0] < end - _ENTRIES_REMADE:
            sequence.entry_blocks = without[-1] + 1
            sequence.first_entry = sequence.entry_blocks * size
            end = max(sequence.entry_blocks, end)
        else:
            # An answer ends before its last entries are made. Made without states they are poor,
            # but better than nothing from the answer or before.
            end = without[0] if without else end
            sequence.entry_blocks, sequence.first_entry = end, 0
        sequence.next_entry = end * size

    def keep_states(self, sequence: Sequence) -> None:
        """Let the sequence hold the rows of its chunk, whose states the draft head will need."""
        sequence.state_positions += sequence.chunk
        sequence.state_rows += sequence.chunk_rows
        sequence.chunk_rows = []

    def free_states(self, sequence: Sequence) -> None:
        """Give those rows back."""
        self.rows.give(sequence.state_rows)
        sequence.state_positions, sequence.state_rows = [], []

    def drop_states(self, sequence: Sequence, start: int) -> None:
        """Give back the rows of states at positions from ``start`` on."""
        kept = bisect_left(sequence.state_positions, start)
        self.rows.give(sequence.state_rows[kept:])
        del sequence.state_positions[kept:], sequence.state_rows[kept:]

    def skip_entries(self, sequence: Sequence) -> None:
        """Let the draft head's entries begin anew where there are states, if many lack them."""
        size = self.blocks.block_size
        first = (sequence.state_positions[0] + 1) // size
        if first - sequence.next_entry // size > _ENTRIES_REMADE:
            sequence.entry_blocks = first
            sequence.first_entry = sequence.next_entry = first * size

    def mark_entries(self, sequence: Sequence) -> None:
        """The draft head has made the sequence's entries: note the blocks that are complete."""
        whole = sequence.next_entry // self.blocks.block_size
        self.blocks.with_entries.update(sequence.table[sequence.entry_blocks : whole])
        sequence.entry_blocks = max(sequence.entry_blocks, whole)

    def release(self, sequence: Sequence) -> None:
        """Give back everything the sequence holds."""
        self.free_chunk(sequence)
        self.free_states(sequence)
        self.ledger.settle(sequence.id)
        self.blocks.release(sequence.table)
        sequence.table = []

    def check(
        self, sequences: abc.Iterable[Sequence], others: abc.Sequence[abc.Sequence[int]] = ()
    ) -> None:
        """Audit blocks, rows and debts against the live sequences and ``others``' blocks."""
        live = {sequence.id: sequence for sequence in sequences}
        self.blocks.check([*(sequence.table for sequence in live.values()), *others])
        if not self.ledger.sequences <= live.keys():
            raise BugError("A released sequence is still in debt.")
        held = self.ledger.total + sum(
            len(sequence.chunk_rows) + len(sequence.state_rows) for sequence in live.values()
        )
        if held + self.rows.num_free != self.rows.num_rows:
            raise BugError("Held and free hidden rows do not add up.")
        for sequence in live.values():
            self._check_debts(sequence)

    def _check_debts(self, sequence: Sequence) -> None:
        """What segment i lacks of the positions the first segment ran is in the stack or owed."""
        running = sequence.filled.union(sequence.chunk)
        for segment, computed in enumerate(sequence.computed):
            owed = [debt.position for debt in self.ledger.lacking(sequence.id, segment)]
            lacking = [p for p in range(computed, sequence.computed[0]) if p not in running]
            if owed != lacking:
                raise BugError(
                    f"Sequence {sequence.id} lacks K,V in segment {segment} without a debt."
                )
