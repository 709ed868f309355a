"""Every form of a weight: what it keeps exactly, what it rounds, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offramp.kernels.linear import Linear, Recipe
from offramp.kernels.packed import GROUP, PackError, WeightForm, available, on_grid, pack

TOLERANCE = {
    WeightForm.PLAIN: 1e-5,
    WeightForm.FP32: 1e-5,
    WeightForm.FP16: 1e-3,
    WeightForm.BF16: 2e-2,
    WeightForm.INT4: 2e-2,
}


def four_bit(rows: int, columns: int) -> Tensor:
    """Weights as a Q4_1 file gives them: fp16 scale and minimum for each group, all levels used."""
    levels = torch.randint(0, 16, (rows, columns // GROUP, GROUP)).float()
    levels[..., 0], levels[..., 1] = 0, 15
    scale = (torch.rand(rows, columns // GROUP, 1) / 10 + 0.01).half().float()
    low = (torch.randn(rows, columns // GROUP, 1) / 3).half().float()
    return (levels * scale + low).view(rows, columns)


@pytest.mark.parametrize("form", list(WeightForm))
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_products_are_right_within_the_form(form: WeightForm, rows: int, biased: bool) -> None:  # noqa: FBT001
    if not available(form):
        pytest.skip(f"{form} products do not exist on this machine")
    weight, x = four_bit(64, 96), torch.randn(rows, 96)
    bias = torch.randn(64) if biased else None
    expected = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    with torch.inference_mode():
        got = pack(weight, bias, form)(x)
    assert got.dtype is torch.float32
    error = (got.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[form]


@pytest.mark.parametrize("form", [WeightForm.PLAIN, WeightForm.FP32, WeightForm.FP16])
def test_the_weight_can_be_read_back(form: WeightForm) -> None:
    weight = torch.randn(48, 40).half().float()
    bias = torch.zeros(48)
    assert Linear(weight, bias, Recipe.of(form)).weight.equal(weight)


def test_four_bits_lose_nothing_of_four_bit_weights() -> None:
    """With inputs that bf16 holds and one column at a time, only the scale's rounding is left."""
    weight = four_bit(64, 64)
    got = Linear(weight, None, Recipe.of(WeightForm.INT4)).weight
    torch.testing.assert_close(got, weight, rtol=2e-2, atol=1e-2)
    assert on_grid(weight)


def test_finer_weights_are_refused_rather_than_quantised() -> None:
    weight = four_bit(64, 64)
    weight[5, 7] += 0.003
    assert not on_grid(weight)
    with pytest.raises(PackError, match="4-bit grid"):
        pack(weight, None, WeightForm.INT4)


def test_a_group_of_equal_weights_is_on_the_grid() -> None:
    weight = four_bit(16, 64)
    weight[3, :GROUP] = 0.25
    weight[4, GROUP:] = 0.0
    assert on_grid(weight)
    got = Linear(weight, None, Recipe.of(WeightForm.INT4)).weight
    assert got[3, :GROUP].eq(0.25).all()
    assert got[4, GROUP:].eq(0.0).all()


@pytest.mark.parametrize("shape", [(16, 40), (20, 64)], ids=str)
def test_sizes_that_do_not_divide_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(PackError, match="columns in 32s and rows in 16s"):
        pack(torch.zeros(shape), None, WeightForm.INT4)


def test_fp16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(PackError, match="65504"):
        pack(torch.full((4, 8), 1e5), None, WeightForm.FP16)


def test_a_recipe_switches_at_its_row_count() -> None:
    """fp16 rounds this weight and fp32 does not, so the result tells which one was used."""
    weight = torch.full((8, 8), 1 / 3)
    product = Linear(weight, None, Recipe(WeightForm.FP16, WeightForm.FP32, few_rows=4))
    exact = torch.full((8,), 8 / 3)
    assert not torch.allclose(product(torch.ones(4, 8))[0], exact, rtol=1e-6)
    assert torch.allclose(product(torch.ones(5, 8))[0], exact, rtol=1e-6)
