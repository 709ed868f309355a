"""Decoding with all decisions on the device against the same decisions taken step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product

import pytest
import torch

from offramp.kernels.backend import INTERPRETED, rehearsal, triton
from offramp.models.device_loop import DeviceLoop, DeviceToken, LaunchResult, NewRow
from offramp.models.exits.head import ExitHead
from offramp.models.exits.training.train import TrainOptions, new_head
from offramp.models.loading.formats import as_they_are
from offramp.models.runner import Runner
from offramp.models.sampling_params import NEVER, SamplingParams
from offramp.models.step import (
    HeadRow,
    RunSegments,
    SequenceRows,
)
from offramp.models.transformer import Transformer
from offramp.server.bench.engine.check import next_by_steps

from .small import BLOCK, EXITS, FAMILIES, LAYERS, VOCAB, make, new_cache, random_ids

MAX_BLOCKS = 8
GREEDY = SamplingParams(max_tokens=9, temperature=0.0)
HOT = SamplingParams(max_tokens=9, temperature=1.2, seed=7)
SOME = torch.arange(1, VOCAB, 2)


@pytest.fixture(
    scope="module", params=["llama", "llama-biased-tied", "mistral-window", "qwen3-wide-heads"]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder = tmp_path_factory.mktemp("loop")
    return make(FAMILIES[request.param], folder, as_they_are())[1]


@pytest.fixture
def heads(model: Transformer) -> list[ExitHead]:
    """Random exits whose scores spread over 0 to 1; one with a second key, one without.

    Of different sizes: each has its own part of the scratch memory.
    """
    sizes = (TrainOptions(width=16, router=5), TrainOptions(width=12, router=8))
    made = [
        new_head(layer, model, options)
        for layer, options in zip(model.exit_layers, sizes, strict=True)
    ]
    for head in made:
        for tensor in (head.down, head.router_down, head.router_down_bias):
            tensor.normal_()
    return [replace(made[0], floor=0.3, fuse=torch.tensor([0.4, 0.6, 0.5, 1.0])), made[1]]


@dataclass
class Text:
    """A prompt in the pages, and the thresholds of its tokens."""

    tokens: list[int]
    table: list[int]
    thresholds: tuple[float, ...]
    sampling: SamplingParams = GREEDY


def texts(runner: Runner, thresholds: Sequence[tuple[float, ...]]) -> list[Text]:
    """Prompts of different lengths, prefilled at full depth but for their last token."""
    made = []
    for index, asked in enumerate(thresholds):
        blocks = list(range(index * MAX_BLOCKS, (index + 1) * MAX_BLOCKS))
        text = Text(random_ids(3 + 4 * index), blocks[::-1], asked)
        before = range(len(text.tokens) - 1)
        work = SequenceRows(before, tuple(before), text.table, tuple(text.tokens[:-1]))
        runner.run(RunSegments(0, len(EXITS), (work,)))
        made.append(text)
    return made


def decoded(runner: Runner, text: Text, count: int) -> list[DeviceToken]:
    """The next tokens, one segment after another, K,V of skipped layers projected at once."""
    tokens, made = list(text.tokens), list[DeviceToken]()
    for index in range(count):
        head = HeadRow(0, text.sampling, index, (), 0)
        made.append(next_by_steps(runner, text.table, text.thresholds, tokens, head))
        tokens.append(made[-1].token)
    return made


def new_loop(runner: Runner) -> DeviceLoop:
    return runner.device_loop(5, MAX_BLOCKS)


def new_row(row: int, text: Text) -> NewRow:
    last = len(text.tokens) - 1
    token = text.tokens[-1]
    end = len(text.table) * BLOCK
    return NewRow(row, token, last, 0, text.table, end, text.sampling, text.thresholds)


def passes(loop: DeviceLoop, live: int) -> Iterator[dict[int, DeviceToken]]:
    """Passes one after the other, each read when the next is under way."""
    pending = loop.launch(live)
    while True:
        following = loop.launch(live)
        yield pending.result().tokens
        pending = following


def decode(loop: DeviceLoop, rows: list[int], count: int) -> dict[int, list[DeviceToken]]:
    """The first ``count`` tokens of every row."""
    made: dict[int, list[DeviceToken]] = {row: [] for row in rows}
    for number, tokens in enumerate(passes(loop, len(rows))):
        for row, token in tokens.items():
            made[row].append(token)
        if all(len(tokens) >= count for tokens in made.values()):
            return {row: tokens[:count] for row, tokens in made.items()}
        assert number < 20 * count
    raise AssertionError


def expected(runner: Runner, asked: list[Text], count: int) -> list[list[DeviceToken]]:
    """By steps, in a copy of the pages."""
    kept = runner.cache.pages.clone()
    made = [decoded(runner, text, count) for text in asked]
    runner.cache.pages.copy_(kept)
    return made


SPREAD = [(0.5, 0.5), (NEVER, NEVER), (0.0, NEVER), (NEVER, 0.2), (0.65, 0.1)]


@pytest.mark.parametrize("vocab", [None, SOME], ids=["all", "some tokens"])
def test_the_loop_makes_the_tokens_of_the_steps(
    model: Transformer, heads: list[ExitHead], vocab: torch.Tensor | None
) -> None:
    """Five texts at once, in rows of no order, each with thresholds of its own."""
    runner = Runner(model, heads, new_cache(model), 32, vocab)
    asked = texts(runner, SPREAD)
    made = expected(runner, asked, 8)
    loop = new_loop(runner)
    rows = [3, 0, 4, 1, 2]
    loop.add([new_row(row, text) for row, text in zip(rows, asked, strict=True)])
    found = decode(loop, rows, 8)
    assert [found[row] for row in rows] == made
    depths = {token.depth for tokens in made for token in tokens}
    assert depths == {*EXITS, LAYERS}


def test_holding_rows_back_changes_no_token(model: Transformer, heads: list[ExitHead]) -> None:
    """Only when they come: a token that waits above has its row wait, and no other."""
    runner = Runner(model, heads, new_cache(model), 32)
    asked = texts(runner, SPREAD)
    made = expected(runner, asked, 6)
    loop = new_loop(runner)
    loop.hold([(0.0, 0.0), (9.0, 3.0), (9.0, 2.0)])
    loop.add([new_row(row, text) for row, text in enumerate(asked)])
    counts = [len(tokens) for tokens in islice(passes(loop, 5), 12)]
    assert sum(loop.launch(5).result().waiting) == 5
    assert min(counts) < 5
    loop = new_loop(runner)
    loop.hold([(0.0, 0.0), (9.0, 3.0), (9.0, 2.0)])
    loop.add([new_row(row, text) for row, text in enumerate(asked)])
    found = decode(loop, [0, 1, 2, 3, 4], 6)
    assert [found[row] for row in range(5)] == made


def test_rows_of_exit_heads_are_counted(model: Transformer, heads: list[ExitHead]) -> None:
    """A text that always leaves runs one, one that is never checked runs none."""
    runner = Runner(model, heads, new_cache(model), 32)
    always, never = texts(runner, [(0.0, NEVER), (NEVER, NEVER)])
    loop = new_loop(runner)
    loop.add([new_row(0, always), new_row(1, never)])
    assert [loop.launch(2).result().head_rows for _ in range(2)] == [1, 1]
    loop.clear([0])
    assert loop.launch(1).result().head_rows == 0


def test_segments_are_timed_before_any_row_is_taken(
    model: Transformer, heads: list[ExitHead]
) -> None:
    """And leave nothing behind: the first requests get their own tokens."""
    runner = Runner(model, heads, new_cache(model), 32)
    loop = new_loop(runner)
    for segment, count, leaving in product(range(3), (1, 5), (False, True)):
        assert loop.seconds(segment, count, leaving=leaving) > 0
    asked = texts(runner, SPREAD)
    made = expected(runner, asked, 4)
    loop.add([new_row(row, text) for row, text in enumerate(asked)])
    found = decode(loop, [0, 1, 2, 3, 4], 4)
    assert [found[row] for row in range(5)] == made


def test_rows_come_and_go_between_passes(model: Transformer, heads: list[ExitHead]) -> None:
    """A row is freed and given to another text while its neighbour goes on."""
    runner = Runner(model, heads, new_cache(model), 32)
    asked = texts(runner, SPREAD[:3])
    made = expected(runner, asked, 4)
    loop = new_loop(runner)
    loop.add([new_row(0, asked[0]), new_row(1, asked[1])])
    first = [loop.launch(2).result().tokens for _ in range(2)]
    loop.clear([1])
    loop.add([new_row(1, asked[2])])
    second = [loop.launch(2).result().tokens for _ in range(2)]
    loop.clear([0, 1])
    assert [tokens[0] for tokens in first + second] == made[0]
    assert [tokens[1] for tokens in first] == made[1][:2]
    assert [tokens[1] for tokens in second] == made[2][:2]
    assert loop.launch(0).result() == LaunchResult({}, (0, 0, 0), 0)


def test_a_row_waits_for_its_blocks(model: Transformer, heads: list[ExitHead]) -> None:
    """It runs no further than its end; thresholds may change on the way."""
    runner = Runner(model, heads, new_cache(model), 32)
    text = texts(runner, [(NEVER, NEVER)])[0]
    made = expected(runner, [text], 2 * BLOCK)[0]
    loop = new_loop(runner)
    have = len(text.tokens) // BLOCK + 1
    loop.add([replace(new_row(2, text), table=text.table[:have], end=have * BLOCK)])
    found = []
    for _ in range(4 * BLOCK):
        made_now = loop.launch(1).result().tokens
        if made_now:
            found.append(made_now[2])
            continue
        assert (len(text.tokens) + len(found) - 1) % BLOCK == 0
        loop.grow({(2, have): text.table[have]}, {2: (have + 1) * BLOCK})
        have += 1
    assert found[: len(made)] == made
    assert len(found) >= len(made)
    loop.set_thresholds({2: (0.0, 0.0)})
    loop.grow({(2, have): text.table[have]}, {2: (have + 1) * BLOCK})
    assert loop.launch(1).result().tokens[2].depth in EXITS


def test_sampled_tokens_do_not_depend_on_company(model: Transformer, heads: list[ExitHead]) -> None:
    """A seed and an index make the draw; at full depth and at exits."""
    runner = Runner(model, heads, new_cache(model), 32)
    asked = texts(runner, SPREAD)
    warm = [replace(text, sampling=replace(HOT, seed=i - 2)) for i, text in enumerate(asked)]
    together = new_loop(runner)
    kept = runner.cache.pages.clone()
    together.add([new_row(row, text) for row, text in enumerate(warm)])
    found = decode(together, [0, 1, 2, 3, 4], 5)
    for text in warm:
        runner.cache.pages.copy_(kept)
        alone = new_loop(runner)
        alone.add([new_row(3, text)])
        assert decode(alone, [3], 5)[3] == found[warm.index(text)]
    greedy = expected(runner, asked, 5)
    assert [found[row] for row in range(5)] != greedy


@pytest.mark.skipif(not INTERPRETED or triton is None, reason="kernels are not interpreted")
def test_rehearsed_with_the_kernels(model: Transformer, heads: list[ExitHead]) -> None:
    """The same with every kernel, interpreted."""
    runner = Runner(model, heads, new_cache(model), 32)
    asked = texts(runner, SPREAD[:3])
    made = expected(runner, asked, 3)
    with rehearsal():
        loop = new_loop(runner)
        loop.add([new_row(row, text) for row, text in enumerate(asked)])
        found = decode(loop, [0, 1, 2], 3)
    assert [found[row] for row in range(3)] == made
