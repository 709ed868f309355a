"""A runner without tensors that knows what every K,V and hidden state must be.

A position's content is a hash chain over its tokens, read back from the first segment's own pages,
so a wrong block, a lost fill or a stale row changes every later token. It also checks the core
invariant on each read: a segment finds K,V of every earlier position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from offramp.models.sampling_params import KVFill
from offramp.models.step import (
    Decide,
    Draft,
    DraftRows,
    FillKV,
    HeadRow,
    OwedRows,
    RunSegments,
    ScoredRow,
    SequenceRows,
    Step,
    StepResult,
    TokenLogprobs,
)
from offramp.server.text.grammars import Grammar, GrammarState

if TYPE_CHECKING:
    from numpy.typing import NDArray

VOCAB = 50
# Seed of requests whose tokens must come of K,V that full depth would give: mode off, or debts
# paid by recompute. With the second seed exits guess, and are often wrong (lossless).
MUST_BE_EXACT = 7
MAY_GUESS = 8


def link(previous: bytes, token: int) -> bytes:
    """Content of a position from the one before and its token."""
    return hashlib.blake2b(previous + token.to_bytes(4, "big"), digest_size=8).digest()


def token_after(content: bytes) -> int:
    """What the model says after this content, at any depth."""
    return content[0] % VOCAB


def expected_answer(prompt: Sequence[int], count: int) -> list[int]:
    """The only right answer to a prompt."""
    content = b""
    for token in prompt:
        content = link(content, token)
    answer: list[int] = []
    for _ in range(count):
        answer.append(token_after(content))
        content = link(content, answer[-1])
    return answer


def logprobs_after(content: bytes) -> TokenLogprobs:
    """What the model thinks of the token that follows this content."""
    return TokenLogprobs(-content[1] / 256, 1, ())


def expected_logprobs(tokens: Sequence[int]) -> list[TokenLogprobs]:
    """What the model thinks of each of ``tokens`` but the first."""
    content, found = b"", []
    for token in tokens[:-1]:
        content = link(content, token)
        found.append(logprobs_after(content))
    return found


class FakeForm(GrammarState):
    """A grammar that knows the right answer, is over after ``length`` tokens, and forces some.

    What it forces is right, or the first of it is, as where the model may write a text in other
    tokens than the tokenizer would.
    """

    def __init__(self, answer: Sequence[int], length: int) -> None:
        self._answer = list(answer)
        self._length = length
        self._taken: list[int] = []

    @property
    def finished(self) -> bool:
        return len(self._taken) >= self._length

    @property
    def error(self) -> str | None:
        return None

    def accept(self, token: int) -> None:
        assert not self.finished
        self._taken.append(token)

    def allowed(self, drafts: Sequence[int]) -> int:
        return min(len(drafts), self._length - len(self._taken))

    def forced(self) -> list[int]:
        assert self._taken == self._answer[: len(self._taken)]
        begin = len(self._taken)
        right = self._answer[begin : begin + begin % 4]
        return right if begin % 3 else [*right[:1], *((token + 1) % VOCAB for token in right[1:])]

    def mask(self, drafts: Sequence[int] = ()) -> NDArray[np.int32]:
        begin = len(self._taken)
        # Behind a wrong draft no row counts.
        if list(drafts) == self._answer[begin : begin + len(drafts)]:
            assert begin + len(drafts) <= self._length
        return np.full(2, -1, dtype=np.int32)


class FakeGrammar(Grammar):
    """See FakeForm."""

    def __init__(self, answer: Sequence[int], length: int) -> None:
        self.length = length
        self._answer = answer

    def start(self) -> FakeForm:
        return FakeForm(self._answer, self.length)


@dataclass(frozen=True)
class Cell:
    """K,V of one position in one segment, or a hidden state; ``coarse`` inputs made it."""

    content: bytes
    exact: bool
    coarse: bool = False


class FakeRunner:
    """Carries out steps on dictionaries; gates fire at random."""

    def __init__(self, num_segments: int, block_size: int, leave_share: float, seed: int) -> None:
        self.pages: dict[tuple[int, int], Cell] = {}
        self.rows: dict[int, Cell] = {}
        self.entries: dict[int, bytes | None] = {}
        """The draft head's entries by place; None for one that was made without a state."""
        self.guesses = 0
        self._num_segments = num_segments
        self._block_size = block_size
        self._leave_share = leave_share
        self._random = Random(seed)

    def run(self, step: Step) -> StepResult:
        """Run one step; every step takes a microsecond a row."""
        match step:
            case RunSegments(first, last, work, head, scored):
                for segment in range(first, last + 1):
                    for item in work:
                        self._run_sequence(segment, item)
                tokens = [self._check(item) for item in work]
                seconds = 1e-6 * sum(len(item.rows) for item in work)
                return StepResult(
                    seconds * (last + 1 - first),
                    (seconds,) * (last + 1 - first),
                    leave=tuple(token is not None for token in tokens),
                    token_ids=tuple(-1 if token is None else token for token in tokens),
                    prompt_left=tuple(map(self._prompt_left, work)),
                    head_tokens=tuple(map(self._head, head)),
                    head_logprobs=tuple(map(self._logprobs, head)),
                    exit_logprobs=tuple(
                        self._logprobs(item.check.head) if item.check else None for item in work
                    ),
                    scored=tuple(map(self._scored, scored)),
                )
            case FillKV(method, owed):
                for debts in owed:
                    self._fill(method, debts)
                return StepResult(1e-6)
            case Draft(work, _):
                made = tuple(map(self._draft, work))
                self.guesses += sum(map(len, made))
                chances = tuple((0.75,) * len(own) for own in made)
                return StepResult(1e-6, guesses=made, chances=chances)
            case Decide():
                raise AssertionError("this engine was asked no questions")

    def _draft(self, item: DraftRows) -> tuple[int, ...]:
        """Make entries, which have to follow on those there, and guess, often right."""
        content: bytes | None = None
        for position, token, row in zip(item.positions, item.token_ids, item.rows, strict=True):
            content = None if row < 0 else link(self.rows[row].content, token)
            self.entries[self._place(item.table, position)] = content
        for position in range(item.first_block * self._block_size, item.positions[-1]):
            place = self._place(item.table, position)
            assert self.entries[place] in {None, self.pages[0, place].content}
        guesses: list[int] = []
        for position in range(item.positions.stop, item.positions.stop + item.guesses):
            token = token_after(content) if content else 0
            guesses.append(token if self._random.random() < 0.7 else (token + 1) % VOCAB)
            content = link(content or b"", guesses[-1])
            if len(guesses) < item.guesses:
                self.entries[self._place(item.table, position)] = content
            if self._random.random() < 0.2:
                break
        return tuple(guesses)

    def _place(self, table: Sequence[int], position: int) -> int:
        return table[position // self._block_size] * self._block_size + position % self._block_size

    def _run_sequence(self, segment: int, item: SequenceRows) -> None:
        for index, (position, row) in enumerate(zip(item.positions, item.rows, strict=True)):
            earlier = [self.pages[segment, self._place(item.table, p)] for p in range(position)]
            if segment == 0:
                previous = earlier[-1].content if earlier else b""
                cell = Cell(link(previous, item.token_ids[index]), exact=True, coarse=item.coarse)
            else:
                cell = self.rows[row]
            assert {item.coarse} == {other.coarse for other in (cell, *earlier)}
            exact = cell.exact and all(other.exact for other in earlier)
            self.rows[row] = Cell(cell.content, exact, item.coarse)
            self.pages[segment, self._place(item.table, position)] = self.rows[row]

    def _check(self, item: SequenceRows) -> int | None:
        """The token the sequence's last row leaves with, None if it stays."""
        if item.check is None or item.check.threshold > 1:
            return None
        if self._random.random() >= self._leave_share:
            return None
        token = token_after(self.rows[item.check.head.row].content)
        wrong = item.check.head.sampling.seed == MAY_GUESS and self._random.random() < 0.4
        return (token + 1) % VOCAB if wrong else token

    def _prompt_left(self, item: SequenceRows) -> tuple[int, ...]:
        if item.prompt_threshold is None:
            return ()
        share = self._leave_share
        return tuple(i for i in range(item.prompt_rows) if self._random.random() < share)

    def _fill(self, method: KVFill, item: OwedRows) -> None:
        assert method is not KVFill.RECOMPUTE
        for position, row in zip(item.positions, item.rows, strict=True):
            place = self._place(item.table, position)
            for segment in range(item.segment, self._num_segments):
                assert self.rows[row].content == self.pages[0, place].content
                self.pages[segment, place] = Cell(self.rows[row].content, exact=False)

    def _logprobs(self, item: HeadRow) -> TokenLogprobs | None:
        wanted = item.sampling.logprobs is not None
        return logprobs_after(self.rows[item.row].content) if wanted else None

    def _scored(self, item: ScoredRow) -> TokenLogprobs:
        assert self.rows[item.row].exact
        return logprobs_after(self.rows[item.row].content)

    def _head(self, item: HeadRow) -> int:
        cell = self.rows[item.row]
        assert cell.exact or item.sampling.seed not in {MUST_BE_EXACT, MAY_GUESS}
        return token_after(cell.content)
