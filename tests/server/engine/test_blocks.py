"""The block pool: nothing is lost, nothing is given twice, and shared content is the right one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from offramp.models.sampling_params import SamplingParams
from offramp.server.engine.blocks import BlockPool, SequenceMemory, block_hashes
from offramp.server.engine.kv_debt import DebtLedger, RowPool
from offramp.server.engine.request import GenerationRequest
from offramp.server.engine.sequence import Sequence
from offramp.server.errors import BugError

SIZE = 4


def take(pool: BlockPool, count: int, after: int) -> list[int]:
    """Blocks that must be there."""
    taken = pool.allocate(count, after)
    assert taken is not None
    return taken


class PoolMachine(RuleBasedStateMachine):
    """Tables taken, shared, written, registered and given back in any order."""

    @initialize(num_blocks=st.integers(1, 9))
    def build(self, num_blocks: int) -> None:
        """An empty pool and the content of each page, as a runner would hold it."""
        self.pool = BlockPool(num_blocks, SIZE)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), after=st.integers(-1, 9))
    def admit(self, tokens: list[int], after: int) -> None:
        """Share what is cached, take the rest, write and register it."""
        hashes = block_hashes(tokens, SIZE)
        shared = self.pool.share(hashes)
        for block, digest in zip(shared, hashes, strict=False):
            assert self.content[block] == digest
        missing = -(-len(tokens) // SIZE) - len(shared)
        free = self.pool.num_free
        fresh = self.pool.allocate(missing, after)
        if fresh is None:
            assert missing > free
            assert self.pool.num_free == free
            self.pool.release(shared)
            return
        assert len(set(fresh)) == missing
        table = shared + fresh
        for block in fresh:
            self.content[block] = b""
        for block, digest in list(zip(table, hashes, strict=False))[len(shared) :]:
            self.content[block] = digest
            self.pool.register(block, digest)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Give one table back."""
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(index))

    def teardown(self) -> None:
        """After the last release everything is free."""
        if not hasattr(self, "pool"):
            return
        self.pool.check(self.tables)
        for table in self.tables:
            self.pool.release(table)
        self.pool.check([])
        assert self.pool.num_free == self.pool.num_blocks
        assert self.pool.num_used == 0


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestPoolMachine = PoolMachine.TestCase


@given(
    tokens=st.lists(st.integers(0, 2**40), max_size=40),
    known=st.integers(0, 10),
    changed=st.integers(0, 39),
)
def test_a_hash_names_all_tokens_up_to_its_block(
    tokens: list[int], known: int, changed: int
) -> None:
    hashes = block_hashes(tokens, SIZE)
    assert len(hashes) == len(tokens) // SIZE
    assert block_hashes(tokens, SIZE, hashes[:known]) == hashes
    assert not set(hashes) & set(block_hashes(tokens, SIZE, coarse=True))
    if changed < len(tokens):
        other = [*tokens[:changed], tokens[changed] + 1, *tokens[changed + 1 :]]
        same = [a == b for a, b in zip(hashes, block_hashes(other, SIZE), strict=True)]
        assert same == [index < changed // SIZE for index in range(len(hashes))]


def test_a_table_grows_into_its_neighbour() -> None:
    pool = BlockPool(8, SIZE)
    first = take(pool, 2, 2)
    assert first == [3, 4]
    assert take(pool, 2, first[-1]) == [5, 6]
    assert take(pool, 1, 2) == [0]


def test_the_block_unused_for_longest_is_given_out_first() -> None:
    """So what was asked for lately stays findable."""
    pool = BlockPool(3, SIZE)
    table = take(pool, 3, -1)
    hashes = block_hashes(list(range(3 * SIZE)), SIZE)
    for block, digest in zip(table, hashes, strict=True):
        pool.register(block, digest)
    pool.release(table)
    take(pool, 1, 7)
    assert pool.share(hashes) == table[:2]


def test_findable_content_outlives_blocks_without_any() -> None:
    """No cached block is given out while others are free, not even to a neighbour."""
    pool = BlockPool(6, SIZE)
    table = take(pool, 2, -1)
    hashes = block_hashes(list(range(2 * SIZE)), SIZE)
    for block, digest in zip(table, hashes, strict=True):
        pool.register(block, digest)
    pool.release(table)
    for _ in range(5):
        scratch = take(pool, 2, table[0] - 1) + take(pool, 2, 3)
        pool.release(scratch)
    assert pool.share(hashes) == table


def test_a_block_released_twice_is_a_bug() -> None:
    pool = BlockPool(2, SIZE)
    table = take(pool, 1, -1)
    pool.release(table)
    with pytest.raises(BugError, match="twice"):
        pool.release(table)


def test_the_audit_sees_lost_and_stolen_blocks() -> None:
    pool = BlockPool(3, SIZE)
    table = take(pool, 2, -1)
    pool.check([table])
    with pytest.raises(BugError, match="disagree"):
        pool.check([table[:1]])
    with pytest.raises(BugError, match="disagree"):
        pool.check([table, table])


def sequence_of(number: int, prompt: list[int]) -> Sequence:
    sampling = SamplingParams(max_tokens=4, temperature=0.0)
    return Sequence(number, GenerationRequest(str(number), tuple(prompt), sampling), 0.0, 1)


@pytest.mark.parametrize(
    ("entries", "first", "following"),
    [
        (0, 16, 16),
        (4, 16, 16),
        (8, 0, 8),
        (12, 0, 12),
        (15, 0, 12),
        (16, 0, 16),
    ],
)
def test_what_the_draft_head_finds_in_a_cached_prompt(
    entries: int, first: int, following: int
) -> None:
    """Entries count block by block; a few that lack at the end are made again, else all is left."""
    rows = RowPool(64)
    memory = SequenceMemory(BlockPool(16, SIZE), rows, DebtLedger(rows, 1), prefix_caching=True)
    prompt = list(range(18))
    one, other = sequence_of(0, prompt), sequence_of(1, prompt)
    assert memory.admit(one)
    one.computed = [17]
    memory.publish(one)
    one.next_entry = entries
    memory.mark_entries(one)
    assert memory.admit(other)
    assert other.table[:4] == one.table[:4]
    assert (other.first_entry, other.next_entry) == (first, following)
    memory.release(one)
    memory.release(other)
    # Blocks that are given out again hold nothing.
    assert memory.blocks.allocate(16, -1) is not None
    assert not memory.blocks.with_entries


def test_a_sequence_begins_where_memory_was_used_before() -> None:
    pool = BlockPool(1000, SIZE)
    first, second = take(pool, 3, pool.before_start(1)), take(pool, 2, pool.before_start(2))
    assert abs(second[0] - first[-1]) > 50
    pool.release(first)
    assert take(pool, 3, pool.before_start(3)) == first
    pool.register(second[0], b"content")
    pool.release(second)
    # The other block of it comes first; what can be found stays.
    assert take(pool, 2, pool.before_start(4))[0] == second[1]
    assert pool.share([b"content"]) == second[:1]
