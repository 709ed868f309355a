"""Scores of logits: the reference against plain formulas in float64, the kernels against both."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from offramp.kernels.backend import INTERPRETED, rehearsal, triton
from offramp.kernels.logit_scores import LogitScores, _parts, score_logits
from tests.kernels.compiler import SHARED_BYTES, TARGETS, Compiler
from tests.kernels.conftest import DEVICE

pytestmark = pytest.mark.usefixtures("on_device")
interpreted = pytest.mark.skipif(triton is None or not INTERPRETED, reason="no interpreter")
either = pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=interpreted)])
TYPES = [torch.float32, torch.bfloat16, torch.float16]
NOBODY = float("-inf")


def formulas(logits: Tensor) -> LogitScores:
    """Row by row over a softmax in float64."""
    expected = LogitScores.empty(len(logits), DEVICE)
    for row, values in enumerate(logits.double()):
        weights = (values - values.max()).exp()
        ranked = (weights / weights.sum()).sort(descending=True).values
        possible = ranked[ranked > 0]
        expected.token[row] = values.tolist().index(values.max())
        expected.top[row] = ranked[0]
        expected.gap[row] = ranked[0] - ranked[1]
        expected.entropy[row] = -(possible * possible.log()).sum()
    return expected


def scored(logits: Tensor, count: int | None = None, *, kernel: bool) -> LogitScores:
    """What is there after scoring the first ``count`` rows."""
    out = LogitScores.empty(len(logits), DEVICE)
    counted = torch.tensor([len(logits) if count is None else count], dtype=torch.int32)
    if kernel:
        with rehearsal():
            score_logits(logits, counted, out)
    else:
        score_logits(logits, counted, out)
    return out


def assert_same(got: LogitScores, expected: LogitScores) -> None:
    assert got.token.tolist() == expected.token.tolist()
    for name in ("top", "gap", "entropy"):
        # The reference's sums over a large vocabulary are the least exact.
        torch.testing.assert_close(
            getattr(got, name), getattr(expected, name), rtol=3e-5, atol=2e-6
        )


def placed(vocab: int, *best: int) -> Tensor:
    """A row whose best tokens, in this order, are known."""
    row = torch.randn(vocab)
    for rank, token in enumerate(best):
        row[token] = 9.0 - rank / 4
    return row


def tied(vocab: int, *best: int) -> Tensor:
    """A row with several best tokens."""
    row = torch.randn(vocab)
    row[list(best)] = 7.5
    return row


def only(vocab: int, *tokens: int) -> Tensor:
    """A row where nothing else can come."""
    row = torch.full((vocab,), NOBODY)
    row[list(tokens)] = torch.arange(len(tokens), 0.0, -1.0)
    return row


# 3000 tokens are two parts of tiles of 1024: 5 and 1029 share a lane, 5 and 2053 share it in parts.
ROWS: dict[str, Callable[[], Tensor]] = {
    "the best first": lambda: placed(3000, 0, 1700),
    "the best last": lambda: placed(3000, 2999, 2),
    "two of a lane": lambda: placed(3000, 5, 1029),
    "two of a lane, rising": lambda: placed(3000, 1029, 5),
    "two of a lane, in two parts": lambda: placed(3000, 5, 2053),
    "in two parts, rising": lambda: placed(3000, 2053, 5),
    "neighbours": lambda: placed(3000, 1501, 1500),
    "ties in a tile": lambda: tied(3000, 900, 17),
    "ties in a lane": lambda: tied(3000, 1029, 5),
    "ties in two parts": lambda: tied(3000, 2999, 2060, 40),
    "all equal": lambda: torch.full((3000,), -2.5),
    "all zero of both signs": lambda: torch.tensor([0.0, -0.0, -0.0] * 1000),
    "one possible": lambda: only(3000, 2100),
    "two possible": lambda: only(3000, 2990, 3),
    "a far best": lambda: torch.randn(3000) * 5000,
    "far from zero": lambda: torch.randn(3000) + 10000,
    "rising": lambda: torch.linspace(-300, 300, 3000),
    "falling": lambda: torch.linspace(300, -300, 3000),
}


@either
@pytest.mark.parametrize("make", ROWS.values(), ids=list(ROWS))
def test_rows_of_every_kind(make: Callable[[], Tensor], *, kernel: bool) -> None:
    logits = make()[None]
    assert_same(scored(logits, kernel=kernel), formulas(logits))


@either
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab"), [(1, 2), (1, 7), (13, 7), (7, 1000), (3, 1024), (2, 49152), (1, 128256)]
)
def test_shapes_and_types(rows: int, vocab: int, dtype: torch.dtype, *, kernel: bool) -> None:
    """Halves have many ties in a large vocabulary, at the top too."""
    logits = (torch.randn(rows, vocab) * 4).to(dtype)
    assert_same(scored(logits, kernel=kernel), formulas(logits))


def test_all_equal_is_the_highest_entropy() -> None:
    out = scored(torch.zeros(1, 500), kernel=False)
    assert out.entropy.item() == pytest.approx(math.log(500))
    assert (out.token.item(), out.gap.item()) == (0, 0.0)


@either
@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_rows_behind_the_count_are_left_alone(count: int, *, kernel: bool) -> None:
    logits = torch.full((5, 2500), float("nan"))
    logits[:count] = torch.randn(count, 2500)
    out = scored(logits, count, kernel=kernel)
    untouched = LogitScores.empty(5 - count, DEVICE)
    for name in ("token", "top", "gap", "entropy"):
        assert torch.equal(
            getattr(out, name)[count:].nan_to_num(-1), getattr(untouched, name).nan_to_num(-1)
        )
    first = [getattr(out, name)[:count] for name in ("token", "top", "gap", "entropy")]
    assert_same(LogitScores(*first), formulas(logits[:count]))


@interpreted
def test_rows_may_lie_apart() -> None:
    wide = torch.full((4, 1300), float("nan"))
    logits = wide[:, :1100]
    logits.copy_(torch.randn(4, 1100))
    assert_same(scored(logits, kernel=True), formulas(logits))


@pytest.mark.parametrize(
    ("rows", "vocab", "parts"),
    [(1, 7, 1), (1, 2048, 2), (1, 49152, 32), (1, 128256, 64), (256, 128256, 8), (4096, 49152, 1)],
)
def test_vocabularies_of_few_rows_are_cut(rows: int, vocab: int, parts: int) -> None:
    assert _parts(rows, vocab) == parts
    assert _parts(0, vocab) == _parts(1, vocab)


SUMS = dict.fromkeys(["tops", "seconds", "weights", "moments"], "*fp32")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("divisible", [(), ("vocab", "logits_row")], ids=["odd", "even"])
@pytest.mark.parametrize(("parts", "tile"), [(1, 8), (64, 1024)])
def test_scoring_parts_compiles(
    compile_ahead: Compiler,
    target: int,
    dtype: str,
    parts: int,
    tile: int,
    divisible: tuple[str, ...],
) -> None:
    types = {"logits": f"*{dtype}", "count": "*i32", "tokens": "*i32", **SUMS}
    types |= {"vocab": "i32", "logits_row": "i32"}
    made = compile_ahead(
        "logit_scores", "_score", target, types, divisible=divisible, parts=parts, tile=tile
    )
    assert made.shared_bytes <= SHARED_BYTES[target]
    assert made.spills == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("parts", [1, 64])
def test_joining_parts_compiles(compile_ahead: Compiler, target: int, parts: int) -> None:
    types = {"count": "*i32", "tokens": "*i32", **SUMS, "best": "*i64"}
    types |= dict.fromkeys(["top_probability", "gap", "entropy"], "*fp32")
    made = compile_ahead("logit_scores", "_join", target, types, warps=1, parts=parts)
    assert made.shared_bytes <= SHARED_BYTES[target]
    assert made.spills == 0
