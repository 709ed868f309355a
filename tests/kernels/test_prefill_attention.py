"""Attention of runs of rows: the kernel against the reference that test_row_attention.py covers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.kernels import prefill_attention as module
from offramp.kernels.backend import rehearsal, triton
from offramp.kernels.decode_attention import decode_attention_reference
from offramp.kernels.prefill_attention import _PRODUCT_ROWS, _sizes, prefill_attention, tiles_of
from offramp.kernels.rows import RowTable, Span
from tests.kernels.compiler import SHARED_BYTES, TARGETS, Compiler
from tests.kernels.conftest import DEVICE

Run = Sequence[int]
Case = tuple[Tensor, Tensor, Tensor, RowTable]
pytestmark = pytest.mark.usefixtures("on_device")
BLOCK = 4
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS = {"one": (2, 2), "three share": (6, 2), "four share": (8, 2), "eight share": (8, 1)}
RUNS: dict[str, list[Run]] = {
    "a first token": [[0]],
    "one late token": [[96]],
    "a prompt": [range(37)],
    "many tiles of rows and of keys": [range(131)],
    "behind what is there": [range(59, 72)],
    "ends with its page": [range(60, 64)],
    "with gaps": [[0, 3, 4, 17, 40], [5, 90]],
    "sparse": [range(2, 140, 30)],
    "texts side by side": [range(5), [70], range(30, 47), [1, 2, 64, 66]],
}


def case(
    runs: Sequence[Run],
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
) -> Case:
    """Queries and caches, blocks scattered and out of order, NaN wherever no row may look."""
    sizes = [positions[-1] // BLOCK + 1 for positions in runs]
    blocks = torch.randperm(sum(sizes) + 3)[: sum(sizes)]
    k, v = torch.full((2, (sum(sizes) + 3) * BLOCK, heads[1], dim), float("nan"), dtype=dtype)
    starts: list[int] = []
    for positions, begin in zip(runs, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False):
        starts += [begin] * len(positions)
        seen = {
            p for last in positions for p in range(max(0, last + 1 - (window or 999)), last + 1)
        }
        at = torch.tensor(sorted(seen))
        used = blocks[begin + at // BLOCK] * BLOCK + at % BLOCK
        k[used], v[used] = torch.randn(2, len(at), heads[1], dim).to(dtype)
    every = torch.tensor([position for positions in runs for position in positions])
    none = torch.empty(0)
    longest = int(every.max()) + 1
    spans = [Span(positions, ()) for positions in runs]
    first_blocks = torch.tensor(starts)
    rows = RowTable(none, every, first_blocks, blocks, BLOCK, longest, none, none, spans=spans)
    q = torch.randn(len(every), heads[0], dim).to(dtype)
    return q, k, v, rows


@pytest.fixture
def rehearsed() -> Iterator[None]:
    if triton is None:
        pytest.skip("no triton")
    with rehearsal():
        yield


@pytest.mark.usefixtures("rehearsed")
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
def test_the_kernel_is_the_reference(heads: tuple[int, int], dim: int) -> None:
    q, k, v, rows = case([run for runs in RUNS.values() for run in runs], heads, dim)
    expected = decode_attention_reference(q, k, v, rows, None)
    torch.testing.assert_close(prefill_attention(q, k, v, rows, None), expected)


@pytest.mark.usefixtures("rehearsed")
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("runs", RUNS.values(), ids=list(RUNS))
def test_runs_of_all_kinds(runs: list[Run], window: int | None) -> None:
    q, k, v, rows = case(runs, (6, 2), 64, window=window)
    expected = decode_attention_reference(q, k, v, rows, window)
    assert expected.isfinite().all()
    torch.testing.assert_close(prefill_attention(q, k, v, rows, window), expected)


@pytest.mark.usefixtures("rehearsed")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
@pytest.mark.parametrize("window", [None, 40])
def test_halves_are_read_and_written(
    dtype: torch.dtype, tolerance: float, window: int | None
) -> None:
    q, k, v, rows = case(RUNS["texts side by side"], (6, 2), 80, dtype, window)
    expected = decode_attention_reference(q, k, v, rows, window)
    got = prefill_attention(q, k, v, rows, window)
    assert got.dtype is dtype
    torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=tolerance)


@pytest.mark.usefixtures("rehearsed")
def test_large_scores_do_not_overflow() -> None:
    """The softmax is taken from the highest score, whichever tile of keys it lies in."""
    q, k, v, rows = case([range(131)], (6, 2), 64)
    q *= 100
    expected = decode_attention_reference(q, k, v, rows, None)
    torch.testing.assert_close(
        prefill_attention(q, k, v, rows, None), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.usefixtures("rehearsed")
def test_gaps_between_heads_and_places() -> None:
    """Strides are taken from the tensors; a layer's pages are a slice of all layers'."""
    q, k, v, rows = case([range(9), range(20, 31)], (6, 2), 64)
    wide_k, wide_v = (torch.full((len(k), 5, 4, 64), float("nan")) for _ in range(2))
    wide_k[:, 3, ::2], wide_v[:, 3, ::2] = k, v
    wide_q = torch.full((len(q), 10, 64), float("nan"))
    wide_q[:, 2:8] = q
    expected = decode_attention_reference(q, k, v, rows, None)
    got = prefill_attention(wide_q[:, 2:8], wide_k[:, 3, ::2], wide_v[:, 3, ::2], rows, None)
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("rehearsed")
def test_no_rows_need_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, rows = case([[3]], (6, 2), 64)
    monkeypatch.setattr(module, "_attend_run", None)
    assert tiles_of([], 3, None, DEVICE)[0].shape == (0, 2)
    assert prefill_attention(q[:0], k, v, rows, None).shape == (0, 6, 64)


def test_without_a_gpu_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, rows = case([range(3, 8)], (6, 2), 64, window=4)
    monkeypatch.setattr(module, "_attend_run", None)
    expected = decode_attention_reference(q, k, v, rows, 4)
    assert prefill_attention(q, k, v, rows, 4).equal(expected)


@pytest.mark.parametrize("window", [None, 1, 16])
@pytest.mark.parametrize("group", [1, 3, 8, 100])
@pytest.mark.parametrize("runs", RUNS.values(), ids=list(RUNS))
def test_every_row_is_in_one_tile_of_its_run(
    runs: list[Run], group: int, window: int | None
) -> None:
    tiles, widest = tiles_of(runs, group, window, DEVICE)
    owner = [run for run, positions in enumerate(runs) for _ in positions]
    rows = [list(range(first, first + count)) for first, count in tiles.tolist()]
    assert sorted(row for tile in rows for row in tile) == list(range(len(owner)))
    assert all(len({owner[row] for row in tile}) == 1 for tile in rows)
    assert max(map(len, rows)) == widest
    assert widest == 1 or widest * group <= _PRODUCT_ROWS


def test_tiles_with_the_longest_contexts_come_first() -> None:
    tiles, widest = tiles_of([range(10), range(30, 60), [45]], 4, None, DEVICE)
    assert tiles.tolist() == [[26, 14], [40, 1], [10, 16], [0, 10]]
    assert widest == 16


def test_no_tile_spans_what_a_window_hides() -> None:
    """Of span 4, a row at 9 looks back to 6: no row sees 4 and 5."""
    assert tiles_of([[3, 9]], 1, 4, DEVICE)[0].tolist() == [[1, 1], [0, 1]]
    assert tiles_of([[3, 7]], 1, 4, DEVICE)[0].tolist() == [[0, 2]]
    assert tiles_of([[3, 9]], 1, None, DEVICE)[0].tolist() == [[0, 2]]


@pytest.mark.parametrize("queries", [16, 64], ids=["few", "many"])
@pytest.mark.parametrize(("group", "dim"), [(3, 64), (1, 80), (8, 128)], ids=str)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles(
    compile_ahead: Compiler, target: int, dtype: str, group: int, dim: int, queries: int
) -> None:
    types = dict.fromkeys(["q", "k", "v", "out"], f"*{dtype}")
    types |= dict.fromkeys(["positions", "first_blocks", "blocks"], "*i64")
    types |= {"tiles": "*i32", "scale": "fp32", "window": "i32"}
    strides = ["q_row", "q_head", "kv_place", "kv_head"]
    sizes: dict[str, Any] = _sizes(queries, TYPES[dtype])
    made = compile_ahead(
        "prefill_attention",
        "_attend_run",
        target,
        types | dict.fromkeys(strides, "i32"),
        warps=sizes.pop("num_warps"),
        stages=sizes.pop("num_stages"),
        divisible=strides,
        block_size=32,
        group=group,
        dim=dim,
        wide=64 if dim == 64 else 128,
        compute=str(TYPES[dtype]).removeprefix("torch."),
        **sizes,
    )
    assert made.shared_bytes <= SHARED_BYTES[target]
    assert dtype == "fp32" or made.spills == 0
    assert made.on_tensor_cores == (dtype != "fp32")
