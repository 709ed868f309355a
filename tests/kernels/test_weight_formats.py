"""Every form of a weight: what it keeps exactly, what it rounds, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offramp.kernels.linear import Linear
from offramp.kernels.weight_formats import (
    GROUP,
    NativeWeight,
    PackError,
    WeightFormat,
    available,
    can_hold,
    nearest,
    pack,
)

TOLERANCE = dict.fromkeys(WeightFormat, 1e-5) | {
    WeightFormat.FP16: 1e-3,
    WeightFormat.FBGEMM_FP16: 1e-3,
    WeightFormat.ONEDNN_BF16: 2e-2,
    # Inputs rounded to 16 bits.
    WeightFormat.INT8: 4e-5,
    WeightFormat.INT4: 4e-5,
}
NATIVE = [WeightFormat.FP32, WeightFormat.FP16, WeightFormat.INT8, WeightFormat.INT4]


def four_bit(rows: int, columns: int) -> Tensor:
    """Weights as a Q4_1 file gives them: fp16 scale and minimum for each group, all levels used."""
    levels = torch.randint(0, 16, (rows, columns // GROUP, GROUP)).float()
    levels[..., 0], levels[..., 1] = 0, 15
    scale = (torch.rand(rows, columns // GROUP, 1) / 10 + 0.01).half().float()
    low = (torch.randn(rows, columns // GROUP, 1) / 3).half().float()
    return (levels * scale + low).view(rows, columns)


def eight_bit(rows: int, columns: int) -> Tensor:
    """Weights as a Q8_0 file gives them: fp16 scale for each group, the largest level 127."""
    levels = torch.randint(-127, 128, (rows, columns // GROUP, GROUP)).float()
    levels[..., 3] = -127
    scale = (torch.rand(rows, columns // GROUP, 1) / 100 + 0.001).half().float()
    return (levels * scale).view(rows, columns)


MAKE = {WeightFormat.INT8: eight_bit, WeightFormat.INT4: four_bit}


@pytest.mark.parametrize("form", list(WeightFormat))
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 33, 100])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_products_are_right_within_the_form(form: WeightFormat, rows: int, biased: bool) -> None:  # noqa: FBT001
    if not available(form):
        pytest.skip(f"{form} products do not exist on this machine")
    # Neither tiles nor panels of the C kernels divide these sizes.
    weight, x = MAKE.get(form, torch.randn)(77, 96), torch.randn(rows, 96)
    bias = torch.randn(77) if biased else None
    expected = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    with torch.inference_mode():
        got = pack(weight, bias, form)(x)
    assert got.dtype is torch.float32
    error = (got.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[form]


@pytest.mark.parametrize(
    "form", [WeightFormat.PLAIN, WeightFormat.ONEDNN_FP32, WeightFormat.FBGEMM_FP16, *NATIVE]
)
def test_rows_can_be_read_back(form: WeightFormat) -> None:
    if not available(form):
        pytest.skip(f"{form} products do not exist on this machine")
    weight = MAKE.get(form, torch.randn)(48, 64)
    if form in {WeightFormat.FP16, WeightFormat.FBGEMM_FP16}:
        weight = weight.half().float()
    product = Linear(weight, torch.zeros(48), (form,))
    torch.testing.assert_close(product.weight, weight, rtol=1e-6, atol=1e-7)
    ids = torch.tensor([47, 0, 5, 5])
    assert product.rows(ids).equal(product.weight[ids])


def mixed(x: Tensor) -> Tensor:
    """``x`` [n, columns] in 8 bits, but for groups whose largest is above four times their rms."""
    groups = x.double().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(dim=-1, keepdim=True) / 127
    levels = (groups / scale).round()
    peaked = levels.square().sum(dim=-1, keepdim=True) < 127**2 * GROUP / 4**2
    return torch.where(peaked, groups, levels * scale).flatten(-2)


@pytest.mark.parametrize("form", MAKE)
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 33])
def test_coarse_rows_round_all_groups_but_those_with_a_peak(form: WeightFormat, rows: int) -> None:
    """And rows beside them that are not coarse round nothing, bit for bit."""
    if not available(form):
        pytest.skip("no C kernels on this machine")
    weight, bias, x = MAKE[form](77, 96), torch.randn(77), torch.randn(rows, 96)
    # Of some rows, so that others beside them have no low bytes.
    x[::2, 40] *= 30
    product, coarse = NativeWeight(weight, bias, form), torch.arange(rows) % 5 != 2
    got = product(x, coarse)
    assert got[~coarse].equal(product(x)[~coarse])
    got, own = got[coarse].double() - bias, x[coarse]
    exact, expected = (each.double() @ weight.double().t() for each in (own, mixed(own)))
    # An input halfway between two levels may become either.
    assert (got - expected).norm() < 4e-4 * expected.norm()
    assert (got - exact).norm() > 1e-3 * exact.norm()


@pytest.mark.parametrize("form", MAKE)
def test_a_coarse_row_does_not_depend_on_the_rows_beside_it(form: WeightFormat) -> None:
    """Bit for bit, whichever of them are coarse."""
    if not available(form):
        pytest.skip("no C kernels on this machine")
    x = torch.randn(130, 96)
    x[::3, 7] *= 20
    product = NativeWeight(MAKE[form](77, 96), None, form)
    coarse = torch.arange(130) % 7 < 4
    whole = product(x, coarse)
    for first, count in ((0, 1), (3, 2), (4, 7), (5, 16), (17, 113)):
        some = slice(first, first + count)
        assert product(x[some], coarse[some]).equal(whole[some])
    assert product(x, torch.ones(130, dtype=torch.bool))[coarse].equal(whole[coarse])


@pytest.mark.parametrize("form", NATIVE)
def test_a_row_does_not_depend_on_the_rows_beside_it(form: WeightFormat) -> None:
    """Bit for bit; fp16, for which a matrix unit may serve many rows, among few and among many."""
    if not available(form):
        pytest.skip("no C kernels on this machine")
    weight, bias, x = MAKE.get(form, torch.randn)(77, 96), torch.randn(77), torch.randn(130, 96)
    x[::3, 7] *= 20
    product = pack(weight, bias, form)
    whole = product(x)
    alone = torch.cat([product(row.unsqueeze(0)) for row in x])
    if form is not WeightFormat.FP16:
        assert alone.equal(whole)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))
    for first, count in ((3, 2), (7, 5), (1, 6)):
        assert product(x[first : first + count]).equal(alone[first : first + count])
    for first, count in ((4, 7), (5, 16), (2, 40), (17, 113)):
        assert product(x[first : first + count]).equal(whole[first : first + count])


@pytest.mark.parametrize("form", [WeightFormat.INT8, WeightFormat.INT4])
def test_finer_weights_are_refused_rather_than_quantised(form: WeightFormat) -> None:
    weight = MAKE[form](64, 64)
    assert can_hold(form, weight)
    weight[5, 7] += 0.003
    assert not can_hold(form, weight)
    with pytest.raises(PackError):
        pack(weight, None, form)


@pytest.mark.parametrize("form", [WeightFormat.INT8, WeightFormat.INT4])
def test_a_group_of_equal_weights_is_on_the_grid(form: WeightFormat) -> None:
    if not available(form):
        pytest.skip("no C kernels on this machine")
    weight = MAKE[form](16, 64)
    weight[4, GROUP:] = 0.0
    if form is WeightFormat.INT4:
        weight[3, :GROUP] = 0.25
    kept = Linear(weight, None, (form,)).weight
    torch.testing.assert_close(kept, weight, rtol=1e-6, atol=1e-7)
    assert kept[4, GROUP:].eq(0.0).all()


@pytest.mark.parametrize("form", [WeightFormat.INT8, WeightFormat.INT4])
def test_columns_that_do_not_divide_are_refused(form: WeightFormat) -> None:
    assert not can_hold(form, torch.zeros(16, 40))
    with pytest.raises(PackError, match="columns in 32s"):
        pack(torch.zeros(16, 40), None, form)


@pytest.mark.parametrize("form", [WeightFormat.FP16, WeightFormat.FBGEMM_FP16])
def test_fp16_refuses_what_it_cannot_hold(form: WeightFormat) -> None:
    if not available(form):
        pytest.skip(f"{form} products do not exist on this machine")
    with pytest.raises(PackError, match="65504"):
        pack(torch.full((4, 32), 1e5), None, form)


@pytest.mark.parametrize("form", [WeightFormat.INT8, WeightFormat.INT4])
def test_inputs_without_a_scale_of_their_own(form: WeightFormat) -> None:
    """Zeros and numbers too small for a reciprocal give the bias; NaN stays in its row."""
    if not available(form):
        pytest.skip("no C kernels on this machine")
    weight, bias, x = MAKE[form](48, 96), torch.randn(48), torch.randn(4, 96)
    product = pack(weight, bias, form)
    expected = product(x)
    x[0], x[1], x[2, 40] = 0.0, 1e-38, float("nan")
    got = product(x)
    assert got[0].equal(bias)
    assert got[1].equal(bias)
    assert got[2].isnan().all()
    assert got[3].equal(expected[3])


@pytest.mark.parametrize("form", [WeightFormat.INT8, WeightFormat.INT4])
@pytest.mark.parametrize("size", [1e4, 1.0, 1e-2, 1e-4])
def test_rounded_weights_are_held_exactly(form: WeightFormat, size: float) -> None:
    """Also where scales are so small that fp16 holds few bits of them."""
    weight = torch.randn(70, 96).clamp(-4, 4) * size
    weight[5], weight[6, :GROUP] = 0, size
    found = nearest(form, weight)
    assert can_hold(form, found)
    assert torch.equal(nearest(form, found), found)
    # fp16 has two digits left of the smallest of these scales.
    bound = 0.09 if form is WeightFormat.INT4 else 0.007 if size > 1e-3 else 0.03
    assert (found - weight).norm() / weight.norm() < bound
    if available(form):
        kept = NativeWeight(found, None, form).rows(torch.arange(70))
        assert (kept - found).abs().max() <= 1e-6 * found.abs().max() + 1e-7
