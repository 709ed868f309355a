"""A fake runner that answers questions too, and knows what every place of the cache must hold.

K,V are kept by layer, so that decisions and chats, which cut the stack in different places, find
what the others left or are caught reading what is not there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, MutableMapping, Sequence
from itertools import pairwise

from offramp.models.step import AnswerRead, Decide, Pooling, PromptRows, Step, StepResult

from .fake_runner import Cell, FakeRunner, link


class LayerPages(MutableMapping[tuple[int, int], Cell]):
    """Pages by segment and place over K,V that are kept by layer and place."""

    def __init__(self, bounds: Sequence[int]) -> None:
        self.layers: dict[tuple[int, int], Cell] = {}
        self._bounds = list(pairwise(bounds))

    def __getitem__(self, key: tuple[int, int]) -> Cell:
        begin, end = self._bounds[key[0]]
        cells = [self.layers[layer, key[1]] for layer in range(begin, end)]
        assert len({cell.content for cell in cells}) == 1
        return Cell(cells[0].content, exact=all(cell.exact for cell in cells))

    def __setitem__(self, key: tuple[int, int], cell: Cell) -> None:
        begin, end = self._bounds[key[0]]
        for layer in range(begin, end):
            self.layers[layer, key[1]] = cell

    def __delitem__(self, key: tuple[int, int]) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[int, int]]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.layers)


def contents_of(tokens: Sequence[int]) -> list[bytes]:
    """Content of every position of a text."""
    found, content = [], b""
    for token in tokens:
        content = link(content, token)
        found.append(content)
    return found


def logits_of(
    content: bytes, layer: int, candidates: Sequence[int], task: str | None
) -> tuple[float, ...]:
    """What is read behind this content after a layer."""
    found = []
    for token in candidates:
        key = content + bytes((layer,)) + token.to_bytes(4, "big") + (task or "").encode()
        found.append(hashlib.blake2b(key, digest_size=2).digest()[0] / 40)
    return tuple(found)


def embedding_of(contents: Sequence[bytes], pooling: Pooling) -> tuple[float, ...]:
    """What an embedding is made of: the states of all positions, or the last one's."""
    read = contents if pooling is Pooling.MEAN else contents[-1:]
    key = b"".join(read) + pooling.encode()
    return tuple(hashlib.blake2b(key, digest_size=4).digest())


class DecidingRunner(FakeRunner):
    """Also carries out decisions over a stack cut at ``cuts``.

    ``faults`` lists what must not be: a row that is run without the K,V or the state that it needs,
    a block whose rows come apart, heads or embeddings that read means of states that nobody kept.
    ``fail_at`` are the numbers of decision steps that fail, after all they do.
    """

    def __init__(
        self,
        exit_layers: Sequence[int],
        cuts: Sequence[int],
        num_layers: int,
        block_size: int,
        leave_share: float = 0.5,
        seed: int = 0,
        fail_at: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(len(exit_layers) + 1, block_size, leave_share, seed)
        self.kv = LayerPages((0, *exit_layers, num_layers))
        self.pages = self.kv  # type: ignore[assignment]
        self.steps: list[Decide] = []
        self.faults: list[Exception] = []
        self._fail_at = fail_at
        self._cuts = (0, *cuts, num_layers)
        self._states: dict[int, tuple[bytes, int]] = {}
        self._sums: dict[tuple[int, int], list[bytes]] = {}
        self._before: dict[bytes, bytes] = {}

    def run(self, step: Step) -> StepResult:
        if not isinstance(step, Decide):
            return super().run(step)
        self.steps.append(step)
        try:
            result = self._decide(step)
        except (AssertionError, KeyError) as error:
            # The engine takes a step's errors for the device's.
            self.faults.append(error)
            raise
        if len(self.steps) - 1 in self._fail_at:
            raise RuntimeError("the fake runner was told to fail")
        return result

    def _decide(self, step: Decide) -> StepResult:
        assert step.work
        begin, end = self._cuts[step.segment : step.segment + 2]
        for source, target, count in step.copies:
            for offset in range(count):
                place = source * self._block_size + offset
                for layer in range(begin, end):
                    cell = self.kv.layers[layer, place]
                    self.kv.layers[layer, target * self._block_size + offset] = cell
                if end == self._cuts[-1]:
                    self._states[target * self._block_size + offset] = self._states[place]
        written: set[int] = set()
        for item in step.work:
            for place, content in self._advance(step.segment, item):
                assert place not in written
                written.add(place)
                self._states[place] = content, step.segment + 1
                for layer in range(begin, end):
                    self.kv.layers[layer, place] = Cell(content, exact=True)
        # All rows' K,V are written before any row reads, layer by layer.
        for item in step.work:
            self._check_earlier(item, range(begin, end))
        self._keep_sums(step)
        logits = tuple(self._read(step, read) for read in step.reads)
        return StepResult(1e-6 * len(written), logits=logits)

    def _advance(self, segment: int, item: PromptRows) -> list[tuple[int, bytes]]:
        """Places of a part's rows and their content behind the segment."""
        size, positions = self._block_size, list(item.positions)
        assert positions == list(range(positions[0], positions[-1] + 1))
        places = [self._place(item.table, position) for position in positions]
        if segment > 0:
            found = [self._states[place] for place in places]
            assert {done for _, done in found} == {segment}
            assert not item.token_ids
            return list(zip(places, (content for content, _ in found), strict=True))
        assert len(item.token_ids) == len(positions)
        rows, content = [], b""
        if positions[0]:
            content = self.kv.layers[0, self._place(item.table, positions[0] - 1)].content
        for place, token in zip(places, item.token_ids, strict=True):
            before, content = content, link(content, token)
            self._before[content] = before
            rows.append((place, content))
        assert len(item.table) >= -(-(positions[-1] + 1) // size)
        return rows

    def _check_earlier(self, item: PromptRows, layers: range) -> None:
        """Every row finds K,V of all positions before it, and no other's."""
        last = item.positions[-1]
        content = self._states[self._place(item.table, last)][0]
        for position in range(last, -1, -1):
            place = self._place(item.table, position)
            for layer in layers:
                cell = self.kv.layers[layer, place]
                assert cell.content == content
                assert cell.exact
            if position:
                content = self._before_of(content, item.table, position)
        assert self._before.get(content, b"") == b""

    def _before_of(self, content: bytes, table: Sequence[int], position: int) -> bytes:
        """Content of the position before; chats do not note it, so the page is believed there."""
        if content in self._before:
            return self._before[content]
        return self.kv.layers[0, self._place(table, position - 1)].content

    def _keep_sums(self, step: Decide) -> None:
        size = self._block_size
        fresh: set[int] = set()
        for item in step.work:
            for position in item.positions:
                block = item.table[position // size]
                if block not in fresh:
                    fresh.add(block)
                    self._sums[step.segment, block] = []
                content = self._states[self._place(item.table, position)][0]
                self._sums[step.segment, block].append(content)
        for source, target, count in step.copies:
            kept = self._sums[step.segment, source]
            assert len(kept) == count
            self._sums[step.segment, target] += kept

    def _read(self, step: Decide, read: AnswerRead) -> tuple[float, ...]:
        item = step.work[read.work]
        assert item.positions[-1] == read.length - 1
        content = self._states[self._place(read.table, read.length - 1)][0]
        top = self._cuts[step.segment + 1] == self._cuts[-1]
        assert top or read.task is not None
        if read.pooling is not None:
            return self._embed(read, read.pooling, content)
        if read.task is not None:
            kept = [own for block in read.table for own in self._sums[step.segment, block]]
            assert sorted(kept) == sorted(self._chain(content))
            assert len(kept) == read.length
        return logits_of(content, self._cuts[step.segment + 1], read.candidates, read.task)

    def _embed(self, read: AnswerRead, pooling: Pooling, last: bytes) -> tuple[float, ...]:
        top = len(self._cuts) - 1
        if pooling is Pooling.LAST:
            return embedding_of([last], pooling)
        found = [self._states[self._place(read.table, place)] for place in range(read.length)]
        assert {done for _, done in found} == {top}
        return embedding_of([content for content, _ in found], pooling)

    def _chain(self, content: bytes) -> list[bytes]:
        found = []
        while content:
            found.append(content)
            content = self._before[content]
        return found
