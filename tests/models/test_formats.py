"""Which forms a model's weights take, by wish, machine and checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offramp.kernels.weight_formats import WeightFormat, available, first_to_hold
from offramp.models.config import Weights
from offramp.models.loading import formats
from offramp.models.loading.formats import RoundedWeights, WeightFormatError, choose, rounded
from tests.kernels.test_weight_formats import eight_bit, four_bit


def weights(*, four: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    make = four_bit if four else torch.randn
    return {
        "embed": torch.randn(40, 64).to(dtype),
        "layers.0.attn_norm": torch.ones(64).to(dtype),
        "layers.0.gate_up": make(128, 64).to(dtype),
        "layers.0.down": make(64, 64).to(dtype),
    }


def everywhere(monkeypatch: pytest.MonkeyPatch, *forms: WeightFormat) -> None:
    monkeypatch.setattr(formats, "available", lambda form: form in forms)


def forms_of(forms: formats.Forms, found: dict[str, Tensor]) -> dict[str, WeightFormat]:
    return {
        name: first_to_hold(forms, weight) for name, weight in found.items() if weight.dim() > 1
    }


def test_auto_keeps_each_matrix_in_the_smallest_form_that_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everywhere(monkeypatch, *WeightFormat)
    found = {
        "embed": eight_bit(40, 64),
        "layers.0.gate_up": four_bit(128, 64),
        "layers.0.down": torch.randn(64, 64),
        "layers.0.o": torch.full((64, 64), 1e6),
    }
    recipes = choose(Weights.AUTO, found)
    assert forms_of(recipes.layers, found) == {
        "embed": WeightFormat.INT8,
        "layers.0.gate_up": WeightFormat.INT4,
        "layers.0.down": WeightFormat.FP16,
        "layers.0.o": WeightFormat.FP32,
    }
    # Rows of the LM head lie on its grid, what was trained here on none.
    assert first_to_hold(recipes.exits, four_bit(32, 64)) is WeightFormat.INT4
    assert first_to_hold(recipes.exits, torch.randn(32, 64)) is WeightFormat.FP16


@pytest.mark.parametrize(
    ("has_fp16", "expected"),
    [(True, WeightFormat.FBGEMM_FP16), (False, WeightFormat.ONEDNN_FP32)],
    ids=["fp16", "no fp16"],
)
@pytest.mark.parametrize("native", [True, False], ids=["not compiled", "not allowed"])
def test_without_the_c_kernels_auto_takes_the_smallest_of_torch(
    monkeypatch: pytest.MonkeyPatch,
    has_fp16: bool,  # noqa: FBT001
    expected: WeightFormat,
    native: bool,  # noqa: FBT001
) -> None:
    forms = {form for form in WeightFormat if "-" in form or not native}
    everywhere(monkeypatch, *(forms if has_fp16 else forms - {WeightFormat.FBGEMM_FP16}))
    found = weights()
    assert (
        first_to_hold(choose(Weights.AUTO, found, native=native).layers, found["embed"]) is expected
    )
    with pytest.raises(WeightFormatError, match="int4 needs the C kernels"):
        choose(Weights.INT4, found, native=native)


def test_without_the_c_kernels_auto_keeps_what_fp16_cannot_hold_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everywhere(monkeypatch, WeightFormat.ONEDNN_FP32, WeightFormat.FBGEMM_FP16)
    layers = choose(Weights.AUTO, weights()).layers
    assert first_to_hold(layers, torch.full((64, 64), 1e6)) is WeightFormat.ONEDNN_FP32


def test_without_packed_products_weights_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch)
    for wish in (Weights.AUTO, Weights.FP32):
        found = weights()
        assert first_to_hold(choose(wish, found).layers, found["embed"]) is WeightFormat.PLAIN


def test_four_bits_are_for_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties between logits would choose tokens, so the head stays finer."""
    everywhere(monkeypatch, *WeightFormat)
    found = rounded(Weights.INT4, weights(four=False))
    recipes = choose(Weights.INT4, found)
    assert first_to_hold(recipes.layers, found["layers.0.down"]) is WeightFormat.INT4
    assert first_to_hold(recipes.head, found["embed"]) is WeightFormat.INT8


def test_what_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch, WeightFormat.ONEDNN_FP32)
    for wish in (Weights.BF16, Weights.FP16):
        with pytest.raises(WeightFormatError, match=f"--weights {wish}: no such products"):
            choose(wish, weights())


@pytest.mark.parametrize("wish", [Weights.INT8, Weights.INT4])
def test_finer_weights_are_rounded(monkeypatch: pytest.MonkeyPatch, wish: Weights) -> None:
    everywhere(monkeypatch, *WeightFormat)
    own = weights(four=False) | {"layers.0.o": four_bit(64, 64)}
    found = rounded(wish, own)
    assert isinstance(found, RoundedWeights)
    recipes = choose(wish, found)
    form = WeightFormat(wish)
    assert first_to_hold(recipes.layers, found["layers.0.down"]) is form
    assert first_to_hold(recipes.head, found["embed"]) is WeightFormat.INT8
    # Published in 4 bits, which 8 would not make finer; and vectors are no matrices.
    assert torch.equal(found["layers.0.o"], own["layers.0.o"])
    assert torch.equal(found["layers.0.attn_norm"], own["layers.0.attn_norm"])
    for name, bound in (("layers.0.down", 0.01 if wish is Weights.INT8 else 0.09), ("embed", 0.01)):
        assert 0 < (found[name] - own[name]).norm() / own[name].norm() < bound
    assert found.changed == {"layers.0.down", "embed"}
    assert 0 < found.error < 0.09


def test_other_wishes_round_nothing() -> None:
    own = weights(four=False)
    assert rounded(Weights.AUTO, own) is own
    assert rounded(Weights.FP32, own) is own


def test_columns_that_no_group_divides_are_refused() -> None:
    own = weights() | {"layers.0.down": torch.randn(64, 40)}
    with pytest.raises(WeightFormatError, match=r"--weights int8: layers\.0\.down: groups have 32"):
        rounded(Weights.INT8, own)["layers.0.down"]


@pytest.mark.parametrize(("quantized", "other"), [(False, "auto"), (True, "fp16")])
def test_the_way_out_of_rounding_is_one(
    monkeypatch: pytest.MonkeyPatch, *, quantized: bool, other: str
) -> None:
    """Files of fewer bits are rounded by default, so that auto would fail in the same way."""
    everywhere(monkeypatch, *WeightFormat)
    own = weights(four=False) | {"layers.0.down": torch.randn(64, 40)}
    for wish in (Weights.INT8, Weights.AUTO)[: 1 + quantized]:
        with pytest.raises(WeightFormatError, match=f"use --weights {other}"):
            rounded(wish, own, quantized=quantized)["layers.0.down"]
    choose(Weights(other), own)


def test_other_dtypes_are_left_alone() -> None:
    half = weights(dtype=torch.bfloat16)
    assert first_to_hold(choose(Weights.AUTO, half).layers, half["embed"]) is WeightFormat.PLAIN
    with pytest.raises(WeightFormatError, match="for fp32 on a CPU"):
        choose(Weights.FP16, half)


def test_the_choice_exists_on_this_machine() -> None:
    found = first_to_hold(choose(Weights.AUTO, weights(), native=False).layers, torch.zeros(1, 1))
    assert found in {WeightFormat.PLAIN, WeightFormat.ONEDNN_FP32, WeightFormat.FBGEMM_FP16}
    assert available(found)
