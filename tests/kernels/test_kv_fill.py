"""Fill of skipped layers against one layer at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.kernels.active_rows import SegmentBatch
from offramp.kernels.backend import rehearsal, triton
from offramp.kernels.kv_fill import Projection, clear_kv, copy_kv, fill_kv, project_kv
from offramp.kernels.kv_formats import write_kv
from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rotary import RotaryTable, rotate
from tests.kernels.compiler import SHARED_BYTES, TARGETS, Compiler
from tests.kernels.conftest import DEVICE, plain_kv

pytestmark = pytest.mark.usefixtures("on_device")
BLOCKS, SIZE, EPS = 6, 4, 1e-5


def empty_pages(layers: int, kv_heads: int, dim: int, blocks: int = BLOCKS) -> Tensor:
    return torch.full((layers, 2, blocks, SIZE, kv_heads, dim), 7.0)


@pytest.mark.parametrize(("layers", "rows", "kv_heads", "dim"), [(1, 1, 1, 4), (5, 3, 3, 20)])
@pytest.mark.parametrize("extras", [True, False], ids=["bias and key norm", "plain"])
def test_projection_equals_each_layer_by_itself(
    layers: int,
    rows: int,
    kv_heads: int,
    dim: int,
    extras: bool,  # noqa: FBT001
) -> None:
    wide, width = 24, 2 * kv_heads * dim
    hidden = torch.randn(rows, wide)
    norms, weights = 1 + torch.randn(layers, wide) / 4, torch.randn(layers, width, wide)
    biases = torch.randn(layers, width) if extras else None
    key_norms = 1 + torch.randn(layers, dim) / 4 if extras else None
    places = torch.tensor([20, 2, 9])[:rows]
    table = RotaryTable(1.0 / 50 ** (torch.arange(dim // 2) / dim), 30, 1.0, hidden.dtype, DEVICE)
    cos, sin = table.at(torch.tensor([11, 0, 29])[:rows])
    pages = empty_pages(layers, kv_heads, dim)
    folded = (weights * norms.unsqueeze(1)).view(-1, wide)
    flat = None if biases is None else biases.view(-1)
    project_kv(hidden, folded, flat, key_norms, pages, places, cos, sin, EPS)
    for layer, (k_cache, v_cache) in enumerate(pages):
        kv = rms_norm(hidden, norms[layer], EPS) @ weights[layer].t()
        kv = kv if biases is None else kv + biases[layer]
        k, v = kv.view(rows, 2, kv_heads, dim).unbind(1)
        k = k if key_norms is None else rms_norm(k, key_norms[layer], EPS)
        for cache, expected in ((k_cache, rotate(k, cos, sin)), (v_cache, v)):
            _only(cache, places, expected)


def test_copy_repeats_the_source_in_every_layer() -> None:
    source = torch.randn(2, BLOCKS, SIZE, 2, 8)
    pages = empty_pages(3, 2, 8)
    places = torch.tensor([23, 0, 13])
    copy_kv(source, pages, places)
    for k_cache, v_cache in pages:
        _only(k_cache, places, source[0].view(-1, 2, 8)[places])
        _only(v_cache, places, source[1].view(-1, 2, 8)[places])


def test_fills_of_integers() -> None:
    """They have the numbers that fills of floats have, rounded, and leave the others alone."""
    wide, layers, kv_heads, dim, places = 24, 3, 2, 16, torch.tensor([20, 2, 9])
    hidden, weight = torch.randn(3, wide), torch.randn(layers * 2 * kv_heads * dim, wide)
    table = RotaryTable(1.0 / 50 ** (torch.arange(dim // 2) / dim), 30, 1.0, hidden.dtype, DEVICE)
    angles = table.at(torch.tensor([11, 0, 29]))
    floats = empty_pages(layers, kv_heads, dim)
    integers = torch.zeros(layers, 2, BLOCKS, SIZE, kv_heads, dim + 2, dtype=torch.int16)
    everywhere = torch.arange(BLOCKS * SIZE)
    sevens = torch.full((len(everywhere), layers, 2, kv_heads, dim), 7.0)
    write_kv(sevens, integers, everywhere)
    torch.testing.assert_close(plain_kv(integers), floats)
    for pages in (floats, integers):
        project_kv(hidden, weight, None, None, pages, places, *angles, EPS)
        copy_kv(pages[0], pages[1:], places[:2])
    torch.testing.assert_close(plain_kv(integers), floats, rtol=0, atol=1e-3)
    for pages in (floats, integers):
        clear_kv(pages, places[1:])
    torch.testing.assert_close(plain_kv(integers), floats, rtol=0, atol=1e-3)
    assert not plain_kv(integers).flatten(2, 3)[:, :, places[1:]].any()


def _only(cache: Tensor, places: Tensor, expected: Tensor) -> None:
    """``places`` of the cache hold ``expected``, all others what they held before."""
    flat = cache.view(-1, *cache.shape[2:])
    torch.testing.assert_close(flat[places], expected, rtol=1e-4, atol=1e-5)
    others = torch.ones(len(flat), dtype=torch.bool)
    others[places] = False
    assert flat[others].eq(7.0).all()


class Leavers:
    """Sequences that left on the device: scattered hidden rows, NaN in all others."""

    def __init__(
        self,
        count: int,
        heads: tuple[int, int, int],
        wide: int,
        dtype: torch.dtype = torch.float32,
        *,
        extras: bool = False,
    ) -> None:
        layers, kv_heads, dim = heads
        limit = count + 3
        self.active = SegmentBatch.empty(limit, DEVICE)
        self.seqs = torch.randperm(limit)[:count]
        self.active.seqs[:count] = self.seqs.to(torch.int32)
        blocks = max(BLOCKS, -(-count // SIZE))
        self.active.places[:count] = torch.randperm(blocks * SIZE)[:count]
        self.active.positions[:count] = torch.randint(0, 30, (count,))
        self.active.count.fill_(count)
        self.hidden = torch.full((limit, wide), float("nan"), dtype=dtype)
        self.hidden[self.seqs] = (3 * torch.randn(count, wide)).to(dtype)
        out = 2 * layers * kv_heads * dim
        bias = torch.randn(out).to(dtype) if extras else None
        norm = torch.randn(layers, dim).to(dtype) if extras else None
        weight = (torch.randn(out, wide) / wide**0.5).to(dtype)
        self.projection = Projection(weight, bias, norm)
        turns = 1.0 / 50 ** (torch.arange(dim // 2) / dim)
        self.angles = RotaryTable(turns, 30, 1.0, dtype, DEVICE).angles
        self.pages = empty_pages(layers, kv_heads, dim, blocks).to(dtype)

    def fill(self) -> Tensor:
        pages = self.pages.clone()
        fill_kv(self.hidden, self.active, self.projection, pages, self.angles, EPS)
        return pages


interpreted = pytest.mark.skipif(triton is None, reason="no triton")


@interpreted
@pytest.mark.parametrize("extras", [True, False], ids=["bias and key norm", "plain"])
@pytest.mark.parametrize(
    ("count", "heads", "wide"),
    [
        (0, (2, 1, 64), 64),
        (1, (1, 3, 64), 96),
        (17, (3, 2, 80), 130),
        (2, (2, 1, 128), 40),
        (90, (1, 2, 128), 256),
    ],
)
def test_the_kernel_fills_what_the_reference_fills(
    count: int,
    heads: tuple[int, int, int],
    wide: int,
    extras: bool,  # noqa: FBT001
) -> None:
    """And nothing else: pages that nobody owes keep what they hold."""
    left = Leavers(count, heads, wide, extras=extras)
    expected = left.fill()
    with rehearsal():
        found = left.fill()
    assert torch.equal(found == 7.0, expected == 7.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 6e-2), (torch.float16, 8e-3)], ids=str
)
@pytest.mark.parametrize("count", [3, 90])
def test_the_kernel_fills_halves(count: int, dtype: torch.dtype, tolerance: float) -> None:
    """Few rows, and several tiles of them."""
    left = Leavers(count, (2, 2, 64), 96, dtype)
    expected = left.fill()
    with rehearsal():
        found = left.fill()
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("without", [(), ("bias", "k_norm")], ids=["all", "plain"])
@pytest.mark.parametrize("rows", [16, 32])
def test_the_kernel_compiles(
    compile_ahead: Compiler, target: int, dtype: str, dim: int, without: tuple[str, ...], rows: int
) -> None:
    names = {"hidden", "weight", "bias", "k_norm", "cos", "sin", "pages"} - set(without)
    types = dict.fromkeys(names, f"*{dtype}") | {"seqs": "*i32", "count": "*i32"}
    types |= {"positions": "*i64", "places": "*i64", "eps": "fp32"}
    strides = ["ins", "hidden_row", "w_row", "layer_step", "kind_step", "place_step"]
    types |= dict.fromkeys(strides, "i32")
    compute = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    wide = {64: 32, 80: 64, 128: 64}[dim]
    sizes: dict[str, Any] = dict.fromkeys(without) | {
        "kv_heads": 8,
        "dim": dim,
        "wide": wide,
        "tile_rows": rows,
        "whole": True,
    }
    made = compile_ahead(
        "kv_fill",
        "_fill",
        target,
        types,
        divisible=strides,
        **sizes,
        tile_ins=(64 if dtype == "fp32" else 128) * 16 // rows,
        compute=compute,
    )
    assert made.shared_bytes <= SHARED_BYTES[target]
    assert not made.spills
    assert made.fetches_ahead
    assert made.on_tensor_cores == (dtype != "fp32")
