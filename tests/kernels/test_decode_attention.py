"""Attention through block tables: the reference against plain formulas, the kernel against it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.kernels.backend import rehearsal, triton
from offramp.kernels.decode_attention import _parts, decode_attention, decode_attention_reference
from offramp.kernels.rows import RowTable
from tests.kernels.compiler import SHARED_BYTES, TARGETS, Compiler

pytestmark = pytest.mark.usefixtures("on_device")
interpreted = pytest.mark.skipif(triton is None, reason="no triton")
BLOCK = 4
HEADS = {"one": (1, 1), "three share": (6, 2), "eight share": (8, 1), "four each": (4, 4)}


def table(contexts: list[int]) -> RowTable:
    """One row at the end of each context, its blocks scattered and out of order."""
    sizes = [-(-context // BLOCK) for context in contexts]
    blocks = torch.randperm(sum(sizes) + 3)[: sum(sizes)]
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
    positions = torch.tensor(contexts) - 1
    none = torch.empty(0)
    return RowTable(none, positions, starts, blocks, BLOCK, max(contexts, default=1), none, none)


def case(
    contexts: list[int], heads: tuple[int, int], dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, RowTable]:
    """Queries and caches, NaN wherever nothing may be read."""
    rows = table(contexts)
    places = (sum(-(-context // BLOCK) for context in contexts) + 3) * BLOCK
    k, v = torch.full((2, places, heads[1], dim), float("nan")).to(dtype)
    for row, context in enumerate(contexts):
        at = torch.arange(context)
        used = rows.blocks[rows.first_blocks[row] + at // BLOCK] * BLOCK + at % BLOCK
        k[used] = torch.randn(context, heads[1], dim).to(dtype)
        v[used] = torch.randn(context, heads[1], dim).to(dtype)
    return torch.randn(len(contexts), heads[0], dim).to(dtype), k, v, rows


def naive(q: Tensor, k: Tensor, v: Tensor, rows: RowTable, window: int | None) -> Tensor:
    """One query, one head and one key at a time, in float64."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    for row, last in enumerate(rows.positions.tolist()):
        first = max(0, last + 1 - window) if window else 0
        blocks = rows.blocks[int(rows.first_blocks[row]) :].tolist()
        places = [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(first, last + 1)]
        for head in range(q.shape[1]):
            keys = [k[place, head // group].double() for place in places]
            scores = torch.stack([key @ q[row, head].double() for key in keys])
            shares = (scores / q.shape[-1] ** 0.5).softmax(0)
            values = torch.stack([v[place, head // group].double() for place in places])
            out[row, head] = shares @ values
    return out


def kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: RowTable,
    window: int | None = None,
    parts: int | None = None,
) -> Tensor:
    with rehearsal():
        return decode_attention(q, k, v, rows, window, parts)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
def test_the_reference_is_attention(heads: tuple[int, int], window: int | None) -> None:
    q, k, v, rows = case([1, 4, 7, 13], heads, 8)
    expected = naive(q, k, v, rows, window)
    got = decode_attention_reference(q, k, v, rows, window).double()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@interpreted
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
def test_the_kernel_is_the_reference(heads: tuple[int, int], dim: int, parts: int) -> None:
    """A first token, a whole tile, the first key of the next one, a prime; some parts are empty."""
    q, k, v, rows = case([1, 32, 33, 97], heads, dim)
    expected = decode_attention_reference(q, k, v, rows, None)
    torch.testing.assert_close(kernel(q, k, v, rows, None, parts), expected)


@interpreted
@pytest.mark.parametrize("window", [1, 5, 40])
def test_a_window_hides_what_is_before_it(window: int) -> None:
    q, k, v, rows = case([1, 39, 40, 97], (6, 2), 64)
    expected = decode_attention_reference(q, k, v, rows, window)
    torch.testing.assert_close(kernel(q, k, v, rows, window, 2), expected)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
def test_halves_are_read_and_written(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v, rows = case([5, 50], (6, 2), 64, dtype)
    expected = decode_attention_reference(q, k, v, rows, None)
    got = kernel(q, k, v, rows, None, 2)
    assert got.dtype is dtype
    torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=tolerance)


@interpreted
def test_caches_with_gaps_between_heads_and_places() -> None:
    """Strides are taken from the tensors; a layer's pages are a slice of all layers'."""
    q, k, v, rows = case([17, 30], (6, 2), 64)
    wide_k, wide_v = (torch.full((len(k), 5, 2, 64), float("nan")) for _ in range(2))
    wide_k[:, 3], wide_v[:, 3] = k, v
    expected = decode_attention_reference(q, k, v, rows, None)
    torch.testing.assert_close(kernel(q, wide_k[:, 3], wide_v[:, 3], rows), expected)


@interpreted
@pytest.mark.parametrize("count", [0, 2])
def test_rows_behind_the_count_are_left_alone(count: int) -> None:
    """They may point anywhere: what a device counted leaves stale rows behind it."""
    q, k, v, rows = case([9, 33, 5, 70], (6, 2), 64)
    expected = decode_attention_reference(q[:count], k, v, rows, None) if count else q[:0]
    stale = torch.full((4,), 10**6)
    rows = replace(
        rows,
        positions=torch.cat((rows.positions[:count], stale[count:])),
        first_blocks=torch.cat((rows.first_blocks[:count], stale[count:])),
        count=torch.tensor([count], dtype=torch.int32),
    )
    torch.testing.assert_close(decode_attention(q, k, v, rows, None)[:count], expected)
    found = kernel(q, k, v, rows, None, 2)
    torch.testing.assert_close(found[:count], expected)
    assert found[count:].isnan().all()


@pytest.mark.parametrize(
    ("programs", "longest", "parts"),
    [(3, 100, 1), (3, 600, 8), (3, 9000, 32), (192, 9000, 2), (1000, 9000, 1), (0, 0, 1)],
)
def test_long_contexts_of_few_rows_are_cut(programs: int, longest: int, parts: int) -> None:
    assert _parts(programs, longest) == parts


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("group", "dim"), [(3, 64), (8, 128)], ids=["small", "large"])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "all rows"])
def test_it_compiles(
    compile_ahead: Compiler,
    target: int,
    dtype: str,
    group: int,
    dim: int,
    counted: bool,  # noqa: FBT001
    parts: int,
) -> None:
    types = dict.fromkeys(["q", "k", "v"], f"*{dtype}")
    types |= dict.fromkeys(["positions", "first_blocks", "blocks"], "*i64")
    types |= dict.fromkeys(["sums", "most", "total"], "*fp32")
    types |= {"scale": "fp32", "window": "i32"}
    optional: dict[str, Any] = {}
    if counted:
        types["count"] = "*i32"
    else:
        optional["count"] = None
    strides = ["q_row", "q_head", "kv_place", "kv_head"]
    types |= dict.fromkeys(strides, "i32")
    compute = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    if parts == 1:
        types["sums"] = f"*{dtype}"
        for name in ("most", "total"):
            del types[name]
            optional[name] = None
    sizes: dict[str, Any] = {
        "parts": parts,
        "block_size": 32,
        "group": group,
        "rows_of_product": 16,
    }
    sizes |= {"dim": dim, "wide": dim, "tile": 16 if dtype == "fp32" else 32}
    made = compile_ahead(
        "decode_attention",
        "_attend",
        target,
        types,
        divisible=strides,
        **sizes,
        **optional,
        compute=compute,
    )
    assert made.shared_bytes <= SHARED_BYTES[target]
    assert not made.spills
    assert made.on_tensor_cores == (dtype != "fp32")


@pytest.mark.parametrize("target", TARGETS)
def test_joining_parts_compiles(compile_ahead: Compiler, target: int) -> None:
    types = {"sums": "*fp32", "most": "*fp32", "total": "*fp32", "count": "*i32", "out": "*bf16"}
    made = compile_ahead("decode_attention", "_join", target, types, parts=4, dim=80, wide=128)
    assert not made.spills
