"""What blocks hold of prompts that have not been through the whole stack.

Prompts of decisions stop where their answer is known, so a block may hold K,V of the lower segments
alone. It stays findable all the same, by a name of its own, for requests that go on from there.
"""

from __future__ import annotations

from collections.abc import Iterable

from offramp.server.engine.blocks import SequenceMemory

# Names blocks that have not been through the whole stack.
_PARTIAL = b"partial:"


class DecisionBlocks:
    """How many of ``top`` segments each block has been through, and the prompt it is known to hold.

    A block's states lie where its K,V are, as far as it is known to hold a prompt.
    """

    def __init__(self, memory: SequenceMemory, top: int) -> None:
        self._memory = memory
        self._top = top
        self._depth: dict[int, int] = {}
        self._made: dict[int, bytes] = {}

    def depth(self, block: int) -> int:
        """Segments that the block has been through."""
        return self._depth[block]

    def find(self, digest: bytes, *, plain: bool) -> int | None:
        """Hold a cached block with this content, one that others' prompts left if ``plain``."""
        pool = self._memory.blocks
        for name in (_PARTIAL + digest, digest):
            for block in pool.share([name]):
                if self._made.get(block) == digest:
                    return block
                if plain and name == digest:
                    # Others' prompts have no states here, whatever the block held before.
                    self._depth[block] = self._top
                    self._made.pop(block, None)
                    return block
                pool.release([block])
        return None

    def claim(self, block: int, digest: bytes | None = None) -> None:
        """A block that was given out has been through nothing yet."""
        self._depth[block] = 0
        self._made.pop(block, None)
        if digest is not None:
            self._made[block] = digest

    def ran(self, blocks: Iterable[int], segment: int) -> None:
        """``blocks`` have been through ``segment``."""
        for block in blocks:
            self._depth[block] = segment + 1

    def spoil(self, blocks: Iterable[int]) -> None:
        """A step over ``blocks`` failed: nobody may go on from them."""
        for block in blocks:
            self._made.pop(block, None)

    def publish(self, blocks: Iterable[int], digests: Iterable[bytes]) -> None:
        """Make ``blocks`` findable as far as they are known to hold ``digests``."""
        if not self._memory.prefix_caching:
            return
        for block, digest in zip(blocks, digests, strict=False):
            depth = self._depth[block]
            if depth and self._made.get(block) == digest:
                whole = depth == self._top
                self._memory.blocks.rename(block, digest if whole else _PARTIAL + digest)
