"""Which forms a model's weights take, by wish, machine and checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from offramp.kernels.linear import Recipe
from offramp.kernels.packed import WeightForm, available
from offramp.models import weight_forms
from offramp.models.weight_forms import WeightFormError, choose
from offramp.models.weights import Weights
from tests.kernels.test_packed import four_bit


def weights(*, four: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    make = four_bit if four else torch.randn
    return {
        "embed": torch.randn(40, 64).to(dtype),
        "layers.0.attn_norm": torch.ones(64).to(dtype),
        "layers.0.gate_up": make(128, 64).to(dtype),
        "layers.0.down": make(64, 64).to(dtype),
    }


def everywhere(monkeypatch: pytest.MonkeyPatch, *forms: WeightForm) -> None:
    monkeypatch.setattr(weight_forms, "available", lambda form: form in forms)


def times_of(monkeypatch: pytest.MonkeyPatch, seconds: dict[WeightForm, list[float]]) -> None:
    """Let products take planted times; a list follows ``_CROSSINGS``."""

    def times(form: WeightForm, sample: Sequence[Tensor], rows: Sequence[int]) -> list[float]:
        return [seconds[form][weight_forms._CROSSINGS.index(count)] for count in rows]

    monkeypatch.setattr(weight_forms, "_times", times)


FAST = [1.0] * 7
SLOW = [2.0] * 7


@pytest.mark.parametrize(
    ("fp32", "fp16", "expected"),
    [(SLOW, FAST, WeightForm.FP16), (FAST, SLOW, WeightForm.FP32)],
    ids=["fp16 faster", "fp32 faster"],
)
def test_auto_takes_the_faster_exact_form(
    monkeypatch: pytest.MonkeyPatch, fp32: list[float], fp16: list[float], expected: WeightForm
) -> None:
    everywhere(monkeypatch, *WeightForm)
    times_of(monkeypatch, {WeightForm.FP32: fp32, WeightForm.FP16: fp16})
    assert choose(Weights.AUTO, weights()).layers == Recipe.of(expected)


def test_without_packed_products_weights_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch)
    for wish in (Weights.AUTO, Weights.FP32):
        assert choose(wish, weights()).layers == Recipe.of(WeightForm.PLAIN)


def test_four_bits_serve_few_rows_and_another_form_many(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch, *WeightForm)
    rising = [0.5, 0.6, 0.8, 1.5, 3.0, 6.0, 12.0]
    planted = {WeightForm.INT4: rising, WeightForm.BF16: FAST, WeightForm.FP16: SLOW}
    times_of(monkeypatch, {**planted, WeightForm.FP32: SLOW})
    recipes = choose(Weights.INT4, weights())
    assert recipes.layers == Recipe(WeightForm.INT4, WeightForm.BF16, few_rows=4)
    # Ties between logits would choose tokens, so the head stays finer.
    assert recipes.head == Recipe.of(WeightForm.FP16)


def test_what_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch, WeightForm.FP32)
    with pytest.raises(WeightFormError, match="--weights bf16: no such products"):
        choose(Weights.BF16, weights())


def test_four_bits_are_for_models_published_so() -> None:
    with pytest.raises(WeightFormError, match=r"layers\.0\.gate_up of this model is finer"):
        choose(Weights.INT4, weights(four=False))


def test_other_dtypes_are_left_alone() -> None:
    half = weights(dtype=torch.bfloat16)
    assert choose(Weights.AUTO, half).layers == Recipe.of(WeightForm.PLAIN)
    with pytest.raises(WeightFormError, match="for fp32 on a CPU"):
        choose(Weights.FP16, half)


def test_a_real_measurement_ends_in_a_form_of_this_machine() -> None:
    found = choose(Weights.AUTO, weights()).layers.many
    assert found in {WeightForm.PLAIN, WeightForm.FP32, WeightForm.FP16}
    assert available(found)
