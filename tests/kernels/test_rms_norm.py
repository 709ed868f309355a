"""rms_norm against the formula in float64, its kernel against the reference."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.kernels import rms_norm as module
from offramp.kernels.backend import next_power_of_2, rehearsal, triton
from offramp.kernels.rms_norm import (
    add_rms_norm,
    masked_rms_norm,
    rms_norm,
    rms_norm_reference,
)
from tests.kernels.compiler import SHARED_BYTES, TARGETS, Compiler

pytestmark = pytest.mark.usefixtures("on_device")
EPS = 1e-5
SHAPES = [(1, 64), (3, 576), (7, 5, 13), (2, 4096), (0, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
interpreted = pytest.mark.skipif(triton is None, reason="no triton")


def formula(x: Tensor, weight: Tensor | None) -> Tensor:
    wide = x.double()
    normed = wide / (wide.square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    return normed if weight is None else normed * weight.double()


@pytest.mark.parametrize("shape", [(1, 64), (3, 576), (7, 5, 13), (0, 64)], ids=str)
@pytest.mark.parametrize("scaled", [True, False], ids=["weight", "plain"])
def test_fp32_equals_the_formula(shape: tuple[int, ...], scaled: bool) -> None:  # noqa: FBT001
    x = torch.randn(shape) * 3
    weight = torch.randn(shape[-1]) if scaled else None
    got = rms_norm(x, weight, EPS)
    torch.testing.assert_close(got.double(), formula(x, weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_takes_its_statistics_in_fp32(dtype: torch.dtype) -> None:
    """The squares of these values overflow fp16; the norm must not."""
    x = (torch.randn(5, 60) * 1000).to(dtype)
    weight = torch.randn(60).to(dtype)
    got = rms_norm(x, weight, EPS)
    assert got.dtype is dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), formula(x, weight), rtol=2 * step, atol=step)


def test_a_row_of_zeros_stays_zero() -> None:
    assert rms_norm(torch.zeros(2, 8), torch.ones(8), EPS).eq(0).all()


def test_the_input_is_left_alone() -> None:
    x = torch.randn(3, 8)
    before = x.clone()
    rms_norm(x, torch.randn(8), EPS)
    assert x.equal(before)


def test_the_sum_is_normed_and_kept() -> None:
    x, residual, weight = torch.randn(3, 60), torch.randn(3, 60), torch.randn(60)
    total = x + residual
    normed, kept = add_rms_norm(x, residual, weight, EPS)
    assert kept.equal(total)
    assert kept is x
    torch.testing.assert_close(normed.double(), formula(total, weight), rtol=1e-5, atol=1e-6)


def assert_alike(got: Tensor, expected: Tensor) -> None:
    """Up to roundings; the interpreter cuts bf16 off where torch rounds, twice for the weight."""
    step = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(got, expected, rtol=4 * step, atol=step)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [True, False], ids=["weight", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_the_reference(
    shape: tuple[int, ...],
    scaled: bool,  # noqa: FBT001
    dtype: torch.dtype,
) -> None:
    x = (torch.randn(shape) * 300).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype) if scaled else None
    before = x.clone()
    with rehearsal():
        got = rms_norm(x, weight, EPS)
    assert_alike(got, rms_norm_reference(x, weight, EPS))
    assert x.equal(before)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_adds_too(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The norm is that of the rounded sum, which is what the next layer adds to."""
    x, residual = (torch.randn(2, *shape) * 3).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    total, before = x + residual, residual.clone()
    with rehearsal():
        normed, kept = add_rms_norm(x, residual, weight, EPS)
    assert kept is x
    assert_alike(kept, total)
    assert_alike(normed, rms_norm_reference(kept, weight, EPS))
    assert residual.equal(before)


@pytest.mark.parametrize(
    "kernel", [False, pytest.param(True, marks=interpreted)], ids=["reference", "kernel"]
)
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "in order"])
@pytest.mark.parametrize("scaled", [True, False], ids=["weight", "plain"])
@pytest.mark.parametrize(("count", "limit"), [(0, 3), (1, 1), (5, 7)])
def test_the_rows_that_the_device_chose(
    count: int,
    limit: int,
    scaled: bool,  # noqa: FBT001
    listed: bool,  # noqa: FBT001
    kernel: bool,  # noqa: FBT001
) -> None:
    """NaN in rows that nobody may read; rows behind the count keep what they hold."""
    order = torch.randperm(limit + 2)[:limit].to(torch.int32) if listed else torch.arange(limit)
    x, out = torch.full((limit + 2, 24), float("nan")), torch.full((limit, 24), 7.0)
    chosen = order[:count].long()
    x[chosen] = 3 * torch.randn(count, 24)
    weight = torch.randn(24) if scaled else None
    index, counted = order if listed else None, torch.tensor([count], dtype=torch.int32)
    with rehearsal() if kernel else nullcontext():
        masked_rms_norm(x, index, weight, out, counted, EPS, limit=limit)
    expected = formula(x[chosen], weight)
    torch.testing.assert_close(out[:count].double(), expected, rtol=1e-5, atol=1e-6)
    assert out[count:].eq(7.0).all()


@interpreted
def test_large_states_stay_in_the_range_of_fp16() -> None:
    """Some channels of a residual stream are in the ten thousands, their norm's weights over 1."""
    x, weight, out = torch.randn(2, 64), torch.full((64,), 6.0), torch.empty(2, 64).half()
    x[:, 5] = 30_000.0
    counted = torch.tensor([2], dtype=torch.int32)
    with rehearsal():
        masked_rms_norm(x.half(), None, weight.half(), out, counted, EPS, limit=2)
    torch.testing.assert_close(out.double(), formula(x, weight), rtol=1e-2, atol=2e-2)


@interpreted
def test_a_row_of_zeros_stays_zero_in_the_kernel() -> None:
    with rehearsal():
        assert rms_norm(torch.zeros(2, 8), torch.ones(8), EPS).eq(0).all()


@interpreted
def test_the_kernel_leaves_to_the_reference_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Strided rows, weights of another shape or dtype than a row's, and gradients."""
    monkeypatch.setattr(module, "_normalise", None)
    x, weight = torch.randn(3, 2, 8), torch.randn(8)
    cases: list[tuple[Tensor, Tensor]] = [
        (x[:, :1], weight),
        (x, torch.randn(2, 8)),
        (x, weight.double()),
        (x, weight.clone().requires_grad_()),
        (x.clone().requires_grad_(), weight),
    ]
    with rehearsal():
        for each, factor in cases:
            assert rms_norm(each, factor, EPS).equal(rms_norm_reference(each, factor, EPS))
        strided = torch.randn(2, 3, 8)
        total = strided[:, :2] + x[:2]
        normed, kept = add_rms_norm(strided[:, :2], x[:2], weight, EPS)
    assert kept.equal(total)
    assert normed.equal(rms_norm_reference(total, weight, EPS))


@interpreted
def test_no_rows_need_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_normalise", None)
    nothing = torch.zeros(0, 8)
    with rehearsal():
        assert rms_norm(nothing, None, EPS).shape == (0, 8)
        assert add_rms_norm(nothing, nothing, None, EPS)[0].shape == (0, 8)


@pytest.mark.parametrize("width", [80, 576, 8192])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles(compile_ahead: Compiler, target: int, dtype: str, width: int) -> None:
    names = ["x", "residual", "weight", "out"]
    made = compile_ahead(
        "rms_norm",
        "_normalise",
        target,
        dict.fromkeys(names, f"*{dtype}") | {"index": "*i32", "count": "*i32", "eps": "fp32"},
        warps=module._warps(next_power_of_2(width)),
        width=width,
        wide=next_power_of_2(width),
    )
    assert made.shared_bytes <= SHARED_BYTES[target]
    assert made.spills == 0


@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles_without_what_may_be_left_out(compile_ahead: Compiler, target: int) -> None:
    types = {"x": "*bf16", "out": "*bf16", "eps": "fp32"}
    sizes: dict[str, Any] = {"width": 576, "wide": 1024, "residual": None, "weight": None}
    sizes |= {"index": None, "count": None}
    assert compile_ahead("rms_norm", "_normalise", target, types, **sizes).spills == 0
