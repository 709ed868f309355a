"""The end of a pass in C, against the composition that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offramp.kernels.linear import Linear
from offramp.kernels.lm_head import NativeHead
from offramp.kernels.native import library
from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.weight_formats import WeightFormat

pytestmark = pytest.mark.skipif(library() is None, reason="no C kernels")

EPS = 1e-5
WIDTH = 64
FORMS = [WeightFormat.FP32, WeightFormat.FP16]


def made(outs: int, form: WeightFormat) -> tuple[NativeHead, Tensor, Linear]:
    torch.manual_seed(outs)
    norm, weight = torch.rand(WIDTH), Linear(torch.randn(outs, WIDTH).half().float(), None, form)
    head = NativeHead.of(norm, weight, EPS)
    assert head is not None
    return head, norm, weight


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("outs", [5, 200, 1003])
@pytest.mark.parametrize("rows", [1, 2, 6, 33])
def test_it_is_the_composition(form: WeightFormat, outs: int, rows: int) -> None:
    head, norm, weight = made(outs, form)
    hidden = torch.randn(50, WIDTH)
    places = torch.randperm(50)[:rows].tolist()
    logits, best = head(hidden, places)
    expected = weight(rms_norm(hidden[places], norm, EPS))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert best == logits.argmax(dim=-1).tolist()


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    head, _, _ = made(300, WeightFormat.FP32)
    hidden = torch.randn(9, WIDTH)
    together, best = head(hidden, range(9))
    for row in range(9):
        alone, own = head(hidden, [row])
        assert alone[0].equal(together[row])
        assert own == best[row : row + 1]


@pytest.mark.parametrize("twins", [(0, 1), (3, 299), (16, 17), (287, 290)])
def test_of_equal_logits_the_first_is_taken(twins: tuple[int, int]) -> None:
    weight = torch.zeros(300, WIDTH)
    weight[twins, :] = 1
    head = NativeHead.of(torch.ones(WIDTH), Linear(weight, None, WeightFormat.FP32), EPS)
    assert head is not None
    assert head(torch.ones(1, WIDTH), [0])[1] == [twins[0]]
    assert head(-torch.ones(1, WIDTH), [0])[1] == [2 if twins == (0, 1) else int(0 in twins)]


def test_what_does_not_fit_is_refused() -> None:
    head, norm, weight = made(200, WeightFormat.FP32)
    with pytest.raises(ValueError, match="norm"):
        NativeHead.of(norm[:32], weight, EPS)
    with pytest.raises(ValueError, match="eps"):
        NativeHead.of(norm, weight, 0.0)
    with pytest.raises(ValueError, match="states"):
        head(torch.randn(3, 32), [0])
    for place in (-1, 3):
        with pytest.raises(IndexError, match="rows"):
            head(torch.randn(3, WIDTH), [0, place])
    plain = Linear(torch.randn(200, WIDTH), None, WeightFormat.PLAIN)
    assert NativeHead.of(norm, plain, EPS) is None


SCREENED = [WeightFormat.INT8, WeightFormat.FP16, WeightFormat.FP32]


def screened(outs: int, form: WeightFormat, weight: Tensor | None = None) -> NativeHead:
    """A head with a screen fitted to states in a few directions."""
    torch.manual_seed(outs)
    if weight is None:
        weight = torch.randn(outs, WIDTH)
    if form is WeightFormat.INT8:
        weight = on_the_grid(weight)
    head = NativeHead.of(torch.rand(WIDTH) + 0.5, Linear(weight, None, form), EPS)
    assert head is not None
    assert head.most_screened >= 2
    head.screen(torch.randn(100, 8) @ torch.randn(8, WIDTH))
    return head


def on_the_grid(weight: Tensor) -> Tensor:
    """The nearest weights that INT8 holds."""
    groups = weight.view(len(weight), -1, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 127).half().float()
    return ((groups / scale).round().clamp(-127, 127) * scale).view_as(weight)


@pytest.mark.parametrize("form", SCREENED, ids=str)
@pytest.mark.parametrize("outs", [5, 200, 1024, 5003])
@pytest.mark.parametrize("spread", [0.0, 0.3, 10.0])
def test_screened_tokens_are_the_likeliest(form: WeightFormat, outs: int, spread: float) -> None:
    head = screened(outs, form)
    hidden = torch.randn(40, 8) @ torch.randn(8, WIDTH) + spread * torch.randn(40, WIDTH)
    for rows in range(1, head.most_screened + 1):
        for first in range(0, 40 - rows, rows):
            places = range(first, first + rows)
            logits, best = head(hidden, places)
            assert head.likeliest(hidden, places) == best == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("form", SCREENED, ids=str)
def test_a_screen_spares_most_of_the_weight_and_bounds_the_rest(form: WeightFormat) -> None:
    torch.manual_seed(1)
    directions = torch.randn(8, WIDTH)
    hidden = torch.randn(60, 8) @ directions + 0.02 * torch.randn(60, WIDTH)
    weight = on_the_grid(torch.randn(8000, WIDTH))
    norm = torch.ones(WIDTH)
    head = NativeHead.of(norm, Linear(weight, None, form), EPS)
    assert head is not None
    head.screen(rms_norm(hidden[:30], norm, EPS))
    spared = 0.0
    for row in range(30, 60):
        exact = head(hidden, [row])[0]
        coarse, best = head._run(hidden, [row], screened=True)
        assert best == exact.argmax(dim=-1).tolist()
        spared += float((coarse != exact).float().mean()) / 30
        # Whatever was not computed is certainly below the largest.
        assert (coarse <= exact.max() + 1e-6).all()
    assert spared > 0.8


@pytest.mark.parametrize("form", SCREENED, ids=str)
@pytest.mark.parametrize("twins", [(0, 1), (3, 2999), (16, 17), (1500, 2990)])
def test_of_equal_logits_a_screen_gives_the_first(
    form: WeightFormat, twins: tuple[int, int]
) -> None:
    torch.manual_seed(2)
    weight = torch.randn(3000, WIDTH)
    weight[twins, :] = 127 / 32
    head = screened(3000, form, weight)
    hidden = torch.ones(2, WIDTH) * torch.tensor([[1.0], [3.0]])
    assert head(hidden, [0])[1] == head.likeliest(hidden, [0]) == [twins[0]]
    assert head.likeliest(hidden, [0, 1]) == [twins[0]] * 2


@pytest.mark.parametrize("form", SCREENED, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, 0.0, 1e-38])
def test_a_screen_is_not_misled_by_states_that_are_hardly_numbers(
    form: WeightFormat, value: float
) -> None:
    head = screened(300, form)
    hidden = torch.randn(3, WIDTH)
    hidden[1, 7] = value
    hidden[2] = value
    for places in ([0], [1], [2], [0, 1], [2, 0]):
        assert head.likeliest(hidden, places) == head(hidden, places)[1]


def test_a_screen_holds_with_weights_that_four_bits_hardly_hold() -> None:
    torch.manual_seed(3)
    weight = torch.randn(2000, WIDTH)
    weight[::3] *= torch.logspace(-6, 3, 667).unsqueeze(1)
    weight[::7, 5] = 1e4
    weight[100:200] = 1 + 1e-4 * torch.randn(100, WIDTH)
    weight[300:310] = 0
    head = screened(2000, WeightFormat.FP32, weight)
    hidden = torch.randn(200, WIDTH)
    for row in range(200):
        assert head.likeliest(hidden, [row]) == head(hidden, [row])[1]


def test_where_there_are_no_bounds_nothing_is_screened() -> None:
    weight = torch.randn(100, WIDTH)
    head = NativeHead.of(torch.ones(WIDTH), Linear(weight, None, WeightFormat.FP32), EPS)
    assert head is not None
    hidden = torch.randn(2, WIDTH)
    expected = head(hidden, [0, 1])[1]
    head.screen(torch.full((4, WIDTH), torch.nan))
    assert head.likeliest(hidden, [0, 1]) == expected
    huge = NativeHead.of(torch.ones(WIDTH), Linear(weight * 1e36, None, WeightFormat.FP32), EPS)
    assert huge is not None
    huge.screen(torch.randn(50, WIDTH))
    assert huge.likeliest(hidden, [0, 1]) == huge(hidden, [0, 1])[1]


def test_weights_of_four_bits_are_not_screened() -> None:
    levels = torch.arange(32 * WIDTH).view(32, WIDTH) * 7 % 16
    weight = Linear(levels / 8.0 - 1, None, WeightFormat.INT4)
    head = NativeHead.of(torch.ones(WIDTH), weight, EPS)
    assert head is not None
    assert head.most_screened == 0
    head.screen(torch.randn(50, WIDTH))
    hidden = torch.randn(1, WIDTH)
    assert head.likeliest(hidden, [0]) == head(hidden, [0])[1]
