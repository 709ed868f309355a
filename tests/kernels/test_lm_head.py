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
