"""Linear products equal those in float64, on every path."""

from __future__ import annotations

import pytest
import torch

from offramp.kernels.linear import Linear, linear


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 9, 16, 17, 33, 65])
@pytest.mark.parametrize("sizes", [(5, 3), (64, 60), (576, 130)], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_equals_the_product(rows: int, sizes: tuple[int, int], biased: bool) -> None:  # noqa: FBT001
    wide, narrow = sizes
    x, weight = torch.randn(rows, wide), torch.randn(narrow, wide)
    bias = torch.randn(narrow) if biased else None
    expected = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    with torch.inference_mode():
        products = linear(x, weight, bias), Linear(weight, bias)(x)
    for got in products:
        assert got.shape == (rows, narrow)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_weights_are_not_packed() -> None:
    x, weight = torch.randn(5, 24).bfloat16(), torch.randn(7, 24).bfloat16()
    torch.testing.assert_close(Linear(weight)(x), x @ weight.t())


def test_rows_may_be_strided() -> None:
    x, weight = torch.randn(4, 20)[:, ::2], torch.randn(6, 10)
    torch.testing.assert_close(linear(x, weight), x.contiguous() @ weight.t())
