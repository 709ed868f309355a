"""Host accounting of K,V pages: who holds which block, and which full blocks can be shared."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from offramp.server.errors import BugError


class OutOfBlocks(Exception):
    """Not enough free blocks; nothing was taken."""


def block_hashes(
    tokens: Sequence[int], block_size: int, known: Sequence[bytes] = ()
) -> list[bytes]:
    """Chained hashes of the full blocks of ``tokens``; ``known`` are those of its first blocks.

    SHA-256, so that nobody can craft a prompt that collides with another client's.
    """
    hashes = list(known)
    for index in range(len(hashes), len(tokens) // block_size):
        chunk = array("q", tokens[index * block_size : (index + 1) * block_size])
        parent = hashes[-1] if hashes else b""
        hashes.append(hashlib.sha256(parent + chunk.tobytes()).digest())
    return hashes


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
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks without a holder, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with a holder."""
        return self.num_blocks - len(self._free)

    def allocate(self, count: int, after: int) -> list[int]:
        """Take ``count`` free blocks, first those next to block ``after``.

        Neighbours let attention read a slot's context without gathering it; they are not worth
        findable content. Raises OutOfBlocks.
        """
        if count > len(self._free):
            raise OutOfBlocks
        taken: list[int] = []
        while len(taken) < count and after + 1 in self._free and after + 1 not in self._hash_of:
            after += 1
            taken.append(self._take(after))
        rest = [self._take(next(iter(self._free))) for _ in range(count - len(taken))]
        return taken + sorted(rest)

    def share(self, hashes: Sequence[bytes]) -> list[int]:
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

    def release(self, table: Sequence[int]) -> None:
        """Give up one hold on each block; tails become free before heads, so prefixes live on."""
        for block in reversed(table):
            self._holders[block] -= 1
            if self._holders[block] < 0:
                raise BugError(f"Block {block} was released twice.")
            if self._holders[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def check(self, tables: Sequence[Sequence[int]]) -> None:
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
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        self._holders[block] = 1
        return block
