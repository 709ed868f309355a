"""rms_norm against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offramp.kernels.rms_norm import rms_norm

EPS = 1e-5


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
