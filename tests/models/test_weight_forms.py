"""Which forms a model's weights take, by wish, machine and checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offramp.kernels.packed import WeightForm, available
from offramp.models.config import Weights
from offramp.models.loading import forms as weight_forms
from offramp.models.loading.forms import WeightFormError, choose
from tests.kernels.test_packed import eight_bit, four_bit


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


def times_of(monkeypatch: pytest.MonkeyPatch, seconds: dict[WeightForm, float]) -> None:
    """Let products take planted times, whatever the number of rows."""
    monkeypatch.setattr(weight_forms, "_times", lambda form, sample: [seconds[form]] * 4)


def forms_of(forms: weight_forms.Forms, found: dict[str, Tensor]) -> dict[str, WeightForm]:
    return {name: forms(weight) for name, weight in found.items() if weight.dim() > 1}


def test_auto_keeps_each_matrix_in_the_smallest_form_that_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everywhere(monkeypatch, *WeightForm)
    found = {
        "embed": eight_bit(40, 64),
        "layers.0.gate_up": four_bit(128, 64),
        "layers.0.down": torch.randn(64, 64),
        "layers.0.o": torch.full((64, 64), 1e6),
    }
    recipes = choose(Weights.AUTO, found)
    assert forms_of(recipes.layers, found) == {
        "embed": WeightForm.INT8,
        "layers.0.gate_up": WeightForm.INT4,
        "layers.0.down": WeightForm.FP16,
        "layers.0.o": WeightForm.FP32,
    }
    # Exits are trained in fp32 and stored in fp16: nothing there lies on a grid.
    assert recipes.exits(four_bit(32, 64)) is WeightForm.FP16


@pytest.mark.parametrize(
    ("fp32", "fp16", "expected"),
    [(2.0, 1.0, WeightForm.FBGEMM_FP16), (1.0, 2.0, WeightForm.ONEDNN_FP32)],
    ids=["fp16 faster", "fp32 faster"],
)
@pytest.mark.parametrize("native", [True, False], ids=["not compiled", "not allowed"])
def test_without_the_c_kernels_auto_takes_the_faster_of_torch(
    monkeypatch: pytest.MonkeyPatch,
    fp32: float,
    fp16: float,
    expected: WeightForm,
    native: bool,  # noqa: FBT001
) -> None:
    torch_only = [form for form in WeightForm if "-" in form]
    everywhere(monkeypatch, *(torch_only if native else WeightForm))
    times_of(monkeypatch, {WeightForm.ONEDNN_FP32: fp32, WeightForm.FBGEMM_FP16: fp16})
    found = weights()
    assert choose(Weights.AUTO, found, native=native).layers(found["embed"]) is expected
    with pytest.raises(WeightFormError, match="int4 needs the C kernels"):
        choose(Weights.INT4, found, native=native)


def test_without_packed_products_weights_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch)
    for wish in (Weights.AUTO, Weights.FP32):
        found = weights()
        assert choose(wish, found).layers(found["embed"]) is WeightForm.PLAIN


def test_four_bits_are_for_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties between logits would choose tokens, so the head stays finer."""
    everywhere(monkeypatch, *WeightForm)
    found = weights() | {"embed": four_bit(40, 64)}
    recipes = choose(Weights.INT4, found)
    assert recipes.layers(found["layers.0.down"]) is WeightForm.INT4
    assert recipes.head(found["embed"]) is WeightForm.FP16


def test_what_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch, WeightForm.ONEDNN_FP32)
    for wish in (Weights.BF16, Weights.FP16):
        with pytest.raises(WeightFormError, match=f"--weights {wish}: no such products"):
            choose(wish, weights())


def test_four_bits_are_for_models_published_so(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch, *WeightForm)
    with pytest.raises(WeightFormError, match=r"layers\.0\.gate_up of this model is finer"):
        choose(Weights.INT4, weights(four=False))


def test_other_dtypes_are_left_alone() -> None:
    half = weights(dtype=torch.bfloat16)
    assert choose(Weights.AUTO, half).layers(half["embed"]) is WeightForm.PLAIN
    with pytest.raises(WeightFormError, match="for fp32 on a CPU"):
        choose(Weights.FP16, half)


def test_a_real_measurement_ends_in_a_form_of_this_machine() -> None:
    found = choose(Weights.AUTO, weights(), native=False).layers(torch.zeros(1, 1))
    assert found in {WeightForm.PLAIN, WeightForm.ONEDNN_FP32, WeightForm.FBGEMM_FP16}
    assert available(found)
