"""store_kv and rope_and_store write their places and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.kernels import kv_store as module
from offramp.kernels.backend import rehearsal, triton
from offramp.kernels.kv_store import rope_and_store, store_kv
from offramp.kernels.rotary import RotaryTable
from tests.kernels.compiler import SHARED_BYTES, TARGETS, Compiler
from tests.kernels.conftest import DEVICE

pytestmark = pytest.mark.usefixtures("on_device")
BLOCKS, SIZE, HEADS, DIM = 5, 3, 2, 7
EPS = 1e-5
PLACES = [14, 0, 7, 4, 11]
GROUPS = [(1, 1), (6, 2), (8, 2), (8, 1), (9, 3)]
interpreted = pytest.mark.skipif(triton is None, reason="no triton")


def test_only_the_places_change() -> None:
    k_cache, v_cache = torch.randn(2, BLOCKS * SIZE, HEADS, DIM)
    before_k, before_v = k_cache.clone(), v_cache.clone()
    places = torch.tensor([14, 0, 7, 4])
    k, v = torch.randn(2, len(places), HEADS, DIM)
    store_kv(k, v, k_cache, v_cache, places)
    for cache, before, rows in ((k_cache, before_k, k), (v_cache, before_v, v)):
        for place in range(BLOCKS * SIZE):
            found = (places == place).nonzero()
            assert cache[place].equal(rows[found[0, 0]] if len(found) else before[place])


def test_rows_may_be_a_strided_view() -> None:
    """K and V arrive as slices of the fused projection."""
    k_cache, v_cache = torch.zeros(2, BLOCKS * SIZE, HEADS, DIM)
    fused = torch.randn(4, 3 * HEADS, DIM)
    places = torch.tensor([1, 2, 9, 10])
    store_kv(fused[:, HEADS : 2 * HEADS], fused[:, 2 * HEADS :], k_cache, v_cache, places)
    assert k_cache[places].equal(fused[:, HEADS : 2 * HEADS])
    assert v_cache[places].equal(fused[:, 2 * HEADS :])


def test_no_rows_change_nothing() -> None:
    k_cache, v_cache = torch.ones(2, BLOCKS * SIZE, HEADS, DIM)
    nothing = torch.zeros(0, HEADS, DIM)
    store_kv(nothing, nothing, k_cache, v_cache, torch.tensor([], dtype=torch.long))
    assert k_cache.eq(1).all()
    assert v_cache.eq(1).all()


Inputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]


def inputs(
    heads: tuple[int, int], dim: int, dtype: torch.dtype = torch.float32, *, normed: bool = True
) -> Inputs:
    """A projection's output, weights of the norms, and angles of scattered positions."""
    table = RotaryTable(1.0 / 100 ** (torch.arange(dim // 2) / dim), 50, 0.9, dtype, DEVICE)
    cos, sin = table.at(torch.tensor([0, 3, 49, 17, 4]))
    qkv = torch.randn(len(PLACES), (heads[0] + 2 * heads[1]) * dim).to(dtype)
    if not normed:
        return qkv, None, None, cos, sin
    return qkv, torch.randn(dim).to(dtype), torch.randn(dim).to(dtype), cos, sin


def new_caches(kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((2, BLOCKS * SIZE, kv_heads, dim), float("nan"), dtype=dtype)


def run(given: Inputs, caches: Tensor, heads: int, places: Sequence[int] = PLACES) -> Tensor:
    """The wrapper's call."""
    k_cache, v_cache = caches
    return rope_and_store(*given, k_cache, v_cache, long(places), EPS, heads=heads)


def long(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long)


def formula(given: Inputs, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the rows in float64, the rotation by complex numbers."""
    qkv, q_norm, k_norm, cos, sin = given
    every = qkv.double().view(len(qkv), -1, dim)
    kv_heads = (every.shape[1] - heads) // 2
    turned = []
    for x, norm in ((every[:, :heads], q_norm), (every[:, heads : heads + kv_heads], k_norm)):
        if norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()  # noqa: PLW2901
        angle = torch.complex(cos[..., dim // 2 :].double(), sin[..., dim // 2 :].double())
        pairs = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * angle
        turned.append(torch.cat((pairs.real, pairs.imag), dim=-1))
    return turned[0], turned[1], every[:, heads + kv_heads :]


def check(given: Inputs, q: Tensor, caches: Tensor, heads: int, tolerance: float = 1e-5) -> None:
    """Everything is where it belongs, and all other places are as they were."""
    dim, places = q.shape[-1], long(PLACES)
    expected_q, expected_k, expected_v = formula(given, heads, dim)
    torch.testing.assert_close(q.double(), expected_q, rtol=tolerance, atol=tolerance)
    found_k, found_v = caches[:, places].double()
    torch.testing.assert_close(found_k, expected_k, rtol=tolerance, atol=tolerance)
    assert found_v.equal(expected_v)
    others = [place for place in range(BLOCKS * SIZE) if place not in PLACES]
    assert caches[:, others].isnan().all()


@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_the_reference_rotates_and_stores(
    heads: tuple[int, int],
    normed: bool,  # noqa: FBT001
) -> None:
    given, caches = inputs(heads, 16, normed=normed), new_caches(heads[1], 16)
    q = run(given, caches, heads[0])
    check(given, q, caches, heads[0])


@interpreted
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_the_kernel_rotates_and_stores(
    heads: tuple[int, int],
    dim: int,
    normed: bool,  # noqa: FBT001
) -> None:
    given, caches = inputs(heads, dim, normed=normed), new_caches(heads[1], dim)
    with rehearsal():
        q = run(given, caches, heads[0])
    check(given, q, caches, heads[0])


@interpreted
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
def test_halves_are_read_and_written(
    dtype: torch.dtype,
    tolerance: float,
    normed: bool,  # noqa: FBT001
) -> None:
    """One rounding at the end, which the interpreter takes downwards for bf16."""
    given, caches = inputs((6, 2), 80, dtype, normed=normed), new_caches(2, 80, dtype)
    with rehearsal():
        q = run(given, caches, 6)
    assert q.dtype is dtype
    check(given, q, caches, 6, tolerance)


@interpreted
def test_the_kernel_takes_strides_from_the_tensors() -> None:
    """A layer's pages are a slice of all layers'; the projection may be one of a wider product."""
    given, caches = inputs((6, 2), 64), new_caches(2, 64)
    qkv = given[0]
    wide = torch.full((len(qkv), 900), float("nan"))
    wide[:, 50 : 50 + qkv.shape[1]] = qkv
    pages = torch.full((2, BLOCKS * SIZE, 3, 5, 64), float("nan"))
    slices = pages[:, :, 1, ::3]
    expected = run(given, caches, 6)
    with rehearsal():
        q = run((wide[:, 50 : 50 + qkv.shape[1]], *given[1:]), slices, 6)
    torch.testing.assert_close(q, expected)
    torch.testing.assert_close(slices, caches, equal_nan=True)
    assert pages.isfinite().sum() == slices.isfinite().sum()


@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize(
    "device", [nullcontext, pytest.param(rehearsal, marks=interpreted)], ids=["cpu", "kernel"]
)
def test_rows_behind_the_count_are_left_alone(
    device: Callable[[], AbstractContextManager[None]], kept: int
) -> None:
    """They may point anywhere: what a device counted leaves stale rows behind it."""
    given, caches = inputs((6, 2), 64), new_caches(2, 64)
    k_cache, v_cache = caches
    places = long(PLACES[:kept] + [1 << 40] * (len(PLACES) - kept))
    count = torch.tensor([kept], dtype=torch.int32)
    with device():
        q = rope_and_store(*given, k_cache, v_cache, places, EPS, heads=6, count=count)
    assert q.shape == (len(PLACES), 6, 64)
    expected_q, expected_k, expected_v = formula(given, 6, 64)
    torch.testing.assert_close(q[:kept], expected_q[:kept].float())
    torch.testing.assert_close(k_cache[places[:kept]], expected_k[:kept].float())
    assert v_cache[places[:kept]].equal(expected_v[:kept].float())
    assert caches.isfinite().sum() == 2 * kept * 2 * 64


@interpreted
def test_no_rows_need_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_rotate_and_store", None)
    caches = new_caches(2, 64)
    qkv, q_norm, k_norm, cos, sin = inputs((6, 2), 64)
    with rehearsal():
        q = run((qkv[:0], q_norm, k_norm, cos[:0], sin[:0]), caches, 6, [])
    assert q.shape == (0, 6, 64)
    assert caches.isnan().all()


@pytest.mark.parametrize("full", [True, False], ids=["normed and counted", "plain"])
@pytest.mark.parametrize(("heads", "dim"), [((9, 3), 64), ((32, 32), 80), ((32, 8), 128)], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles(
    compile_ahead: Compiler,
    target: int,
    dtype: str,
    heads: tuple[int, int],
    dim: int,
    full: bool,  # noqa: FBT001
) -> None:
    pointers = ["qkv", "cos", "sin", "k_cache", "v_cache", "q"]
    optional = {"q_norm": f"*{dtype}", "k_norm": f"*{dtype}", "count": "*i32"}
    strides = ["qkv_row", "kv_place", "kv_head"]
    types = dict.fromkeys(pointers, f"*{dtype}") | {"places": "*i64", "eps": "fp32"}
    types |= dict.fromkeys(strides, "i32") | (optional if full else {})
    left_out: dict[str, Any] = {} if full else dict.fromkeys(optional)
    made = compile_ahead(
        "kv_store",
        "_rotate_and_store",
        target,
        types,
        divisible=strides,
        heads=heads[0],
        kv_heads=heads[1],
        dim=dim,
        wide=64 if dim == 64 else 128,
        at_once=module._HEADS_AT_ONCE,
        **left_out,
    )
    assert made.shared_bytes <= SHARED_BYTES[target]
    assert made.spills == 0
