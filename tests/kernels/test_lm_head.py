"""The end of a pass in C, against the composition that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from offramp.kernels.linear import Linear
from offramp.kernels.lm_head import HeadScreen, NativeHead
from offramp.kernels.native import library
from offramp.kernels.noise import TokenNoise
from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.sampling import TokenDraw, draw_tokens
from offramp.kernels.weight_formats import WeightFormat, round_to_int4

pytestmark = pytest.mark.skipif(library() is None, reason="no C kernels")

EPS = 1e-5
WIDTH = 64
FORMS = [WeightFormat.FP32, WeightFormat.FP16]


def made(outs: int, form: WeightFormat) -> tuple[NativeHead, Tensor, Linear]:
    torch.manual_seed(outs)
    norm, weight = torch.rand(WIDTH), Linear(torch.randn(outs, WIDTH).half().float(), None, (form,))
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
    head = NativeHead.of(torch.ones(WIDTH), Linear(weight, None, (WeightFormat.FP32,)), EPS)
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
    plain = Linear(torch.randn(200, WIDTH), None, (WeightFormat.PLAIN,))
    assert NativeHead.of(norm, plain, EPS) is None


COPIED = [WeightFormat.INT8, WeightFormat.FP16, WeightFormat.FP32]
FIXED_POINT = [WeightFormat.INT8, WeightFormat.INT4]
SCREENS = [*(("copy", form) for form in COPIED), *(("inputs", form) for form in FIXED_POINT)]


def screened(
    kind: str, form: WeightFormat, weight: Tensor, states: Tensor, norm: Tensor | None = None
) -> tuple[NativeHead, HeadScreen]:
    """A head with a screen of one kind, whose copy is fitted to ``states``."""
    if norm is None:
        norm = torch.rand(WIDTH) + 0.5
    weight = on_the_grid(weight, form)
    packed, found = Linear(weight, None, (form,)), library()
    head = NativeHead.of(norm, packed, EPS)
    assert head is not None
    assert found is not None
    by_copy = kind == "copy"
    made = HeadScreen.by_copy(found, packed, states) if by_copy else HeadScreen.by_inputs(packed)
    assert made is not None
    return head, made


def on_the_grid(weight: Tensor, form: WeightFormat) -> Tensor:
    """The nearest weights that a format holds, or nearly."""
    if form is WeightFormat.INT4:
        return round_to_int4(weight)[1]
    if form is WeightFormat.FP16:
        return weight.half().float()
    groups = weight.view(len(weight), -1, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 127).half().float()
    levels = (groups / scale.clamp_min(1e-20)).round().clamp(-127, 127)
    return (levels * scale).view_as(weight) if form is WeightFormat.INT8 else weight


def in_few_directions(count: int) -> Tensor:
    return torch.randn(count, 8) @ torch.randn(8, WIDTH)


@pytest.mark.parametrize(("kind", "form"), SCREENS)
@pytest.mark.parametrize("outs", [5, 200, 1024, 5003])
@pytest.mark.parametrize("spread", [0.0, 0.3, 10.0])
def test_screened_tokens_are_the_likeliest(
    kind: str, form: WeightFormat, outs: int, spread: float
) -> None:
    torch.manual_seed(outs)
    weight, states = torch.randn(outs, WIDTH), in_few_directions(100)
    head, screen = screened(kind, form, weight, states)
    hidden = in_few_directions(100) + spread * torch.randn(100, WIDTH)
    for rows in (1, 2, 3, 6) if kind == "copy" else (1, 2, 4, 5, 7, 33, 97):
        for first in range(0, 101 - rows, rows):
            places = range(first, first + rows)
            logits, best = head(hidden, places)
            assert head.screened(hidden, places, screen)[0] == best
            assert best == logits.argmax(dim=-1).tolist()


def noises_of(rows: int, temperature: float) -> list[TokenNoise | None]:
    """Every third row is greedy."""
    return [TokenNoise(temperature, 9 - row, row) if row % 3 else None for row in range(rows)]


def drawn(
    head: NativeHead, hidden: Tensor, places: Sequence[int], noises: Sequence[TokenNoise | None]
) -> list[int]:
    """Of all logits."""
    logits, best = head(hidden, places)
    pairs = enumerate(noises)
    draws = [TokenDraw(row, noise, 0, 1.0, 0.0) for row, noise in pairs if noise is not None]
    for draw, token in zip(draws, draw_tokens(logits, draws, native=True), strict=True):
        best[draw.row] = token
    return best


@pytest.mark.parametrize(("kind", "form"), SCREENS)
@pytest.mark.parametrize("outs", [5, 200, 1024, 5003])
@pytest.mark.parametrize("temperature", [1e-12, 0.3, 1.0, 30.0])
def test_screened_random_tokens_are_those_of_the_largest_keys(
    kind: str, form: WeightFormat, outs: int, temperature: float
) -> None:
    torch.manual_seed(outs)
    head, screen = screened(kind, form, torch.randn(outs, WIDTH), in_few_directions(100))
    hidden = in_few_directions(100) + 0.3 * torch.randn(100, WIDTH)
    for rows in (2, 3, 6) if kind == "copy" else (2, 4, 5, 33, 97):
        for first in range(0, 101 - rows, rows):
            places, noises = range(first, first + rows), noises_of(rows, temperature)
            expected = drawn(head, hidden, places, noises)
            assert head.screened(hidden, places, screen, noises)[0] == expected


@pytest.mark.parametrize("form", [*COPIED, WeightFormat.INT4], ids=str)
def test_random_tokens_are_the_same_screened_or_not(form: WeightFormat) -> None:
    torch.manual_seed(8)
    head, _ = screened("copy", form, torch.randn(700, WIDTH), torch.randn(50, WIDTH))
    hidden = torch.randn(9, WIDTH)
    case = [(hidden, range(rows), noises_of(rows, 1.0)) for rows in range(1, 10)]
    assert [head.likeliest(*each) for each in case] == [None] * 9
    head.screen(torch.randn(50, WIDTH))
    found = [head.likeliest(*each) for each in case]
    assert (found == [None] * 9) == (not head.can_screen)
    for own, each in zip(found, case, strict=True):
        assert own in (None, drawn(head, *each))


@pytest.mark.parametrize("form", [*COPIED, WeightFormat.INT4], ids=str)
def test_where_screens_pay_they_are_used(form: WeightFormat) -> None:
    torch.manual_seed(7)
    weight = torch.randn(300, WIDTH)
    head, _ = screened("copy", form, weight, torch.randn(50, WIDTH))
    assert head.can_screen == (head.most_copied > 0 or head.fewest_coarse > 0)
    assert (head.most_copied > 0) == (form is not WeightFormat.INT4)
    used = []
    hidden = torch.randn(9, WIDTH)
    expected = [head(hidden, range(rows))[1] for rows in range(1, 10)]
    head.screen(torch.randn(50, WIDTH))
    for rows in range(1, 10):
        with patch.object(head, "screened", wraps=head.screened) as call:
            found = head.likeliest(hidden, range(rows))
        used.append(call.called)
        assert found == (expected[rows - 1] if call.called else None)
    coarse = head.fewest_coarse or 10
    assert used == [rows <= head.most_copied or rows >= coarse for rows in range(1, 10)]


@pytest.mark.parametrize(("kind", "form"), SCREENS)
def test_a_screen_spares_most_exact_products(kind: str, form: WeightFormat) -> None:
    torch.manual_seed(1)
    directions, norm = torch.randn(8, WIDTH), torch.ones(WIDTH)
    hidden = torch.randn(60, 8) @ directions + 0.02 * torch.randn(60, WIDTH)
    states = rms_norm(hidden[:30], norm, EPS)
    head, screen = screened(kind, form, torch.randn(8000, WIDTH), states, norm)
    for places in (range(30, 36), range(36, 60)):
        tokens, sets = head.screened(hidden, places, screen)
        assert tokens == head(hidden, places)[1]
        # Of 250; one is always multiplied, and again among those that may have the largest logit.
        assert min(sets) >= 2
        assert max(sets) < 50


@pytest.mark.parametrize(("kind", "form"), SCREENS)
@pytest.mark.parametrize("twins", [(0, 1), (3, 2999), (16, 17), (1500, 2990)])
def test_of_equal_logits_a_screen_gives_the_first(
    kind: str, form: WeightFormat, twins: tuple[int, int]
) -> None:
    torch.manual_seed(2)
    weight = torch.randn(3000, WIDTH)
    weight[twins, :] = 127 / 32
    head, screen = screened(kind, form, weight, in_few_directions(100))
    hidden = torch.ones(2, WIDTH) * torch.tensor([[1.0], [3.0]])
    assert head(hidden, [0])[1] == head.screened(hidden, [0], screen)[0] == [twins[0]]
    assert head.screened(hidden, [0, 1], screen)[0] == [twins[0]] * 2


@pytest.mark.parametrize(("kind", "form"), SCREENS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, 0.0, 1e-38])
def test_a_screen_is_not_misled_by_states_that_are_hardly_numbers(
    kind: str, form: WeightFormat, value: float
) -> None:
    torch.manual_seed(300)
    head, screen = screened(kind, form, torch.randn(300, WIDTH), in_few_directions(100))
    hidden = torch.randn(3, WIDTH)
    hidden[1, 7] = value
    hidden[2] = value
    for places in ([0], [1], [2], [0, 1], [2, 0], [0, 1, 2, 0, 1, 2]):
        assert head.screened(hidden, places, screen)[0] == head(hidden, places)[1]
        noises = [TokenNoise(0.8, 1, index) for index in range(len(places))]
        expected = drawn(head, hidden, places, noises)
        assert head.screened(hidden, places, screen, noises)[0] == expected


@pytest.mark.parametrize(("kind", "form"), SCREENS)
def test_a_screen_holds_with_weights_that_few_bits_hardly_hold(
    kind: str, form: WeightFormat
) -> None:
    torch.manual_seed(3)
    weight = torch.randn(2000, WIDTH)
    weight[1::3] *= torch.logspace(-1, 1, 667).unsqueeze(1)
    if form not in FIXED_POINT:  # which holds less itself
        weight[::3] *= torch.logspace(-6, 3, 667).unsqueeze(1)
        weight[::7, 5] = 1e4
        weight[100:200] = 1 + 1e-4 * torch.randn(100, WIDTH)
    weight[300:310] = 0
    head, screen = screened(kind, form, weight, in_few_directions(100))
    hidden = torch.randn(200, WIDTH)
    hidden[:, 9] *= torch.logspace(-3, 3, 200)
    for row in range(200):
        assert head.screened(hidden, [row], screen)[0] == head(hidden, [row])[1]


def test_where_there_are_no_bounds_nothing_is_screened() -> None:
    weight, found = Linear(torch.randn(100, WIDTH), None, (WeightFormat.FP32,)), library()
    assert found is not None
    assert HeadScreen.by_copy(found, weight, torch.full((4, WIDTH), torch.nan)) is None
    huge = Linear(1e36 * torch.randn(100, WIDTH), None, (WeightFormat.FP32,))
    assert HeadScreen.by_copy(found, huge, torch.randn(50, WIDTH)) is None
    head = NativeHead.of(torch.ones(WIDTH), huge, EPS)
    assert head is not None
    head.screen(torch.randn(50, WIDTH))
    hidden = torch.randn(2, WIDTH)
    assert head.likeliest(hidden, [0, 1]) is None
