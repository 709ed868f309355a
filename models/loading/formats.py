"""In which format each of a model's matrices is stored, by ``--weights``, machine and model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.weight_formats import INTEGERS, WeightFormat, available, can_hold
from offramp.models.config import Weights
from offramp.models.errors import ModelError

Forms = Callable[[Tensor], WeightFormat]
"""The format to store a matrix [out, in] in."""


_FIRST_LAYER = tuple(f"layers.0.{name}" for name in ("qkv", "o", "gate_up", "down"))


class WeightFormatError(ModelError):
    """The machine or the model has no such format; the message says what would work."""


@dataclass(frozen=True, slots=True)
class Recipes:
    """Formats of the layers' matrices, of the LM head's, of the exits' and of the draft head's."""

    layers: Forms
    head: Forms
    exits: Forms
    drafts: Forms


def choose(wish: Weights, weights: Mapping[str, Tensor], *, native: bool = True) -> Recipes:
    """Formats for the loader's canonical ``weights``.

    Formats are for fp32 models on a CPU; elsewhere only AUTO is possible, and weights stay plain.
    AUTO stores each matrix in the smallest format that loses nothing, 4 or 8 bits where the model
    was published in them, else in fp16. ``native`` False forbids the C kernels: then there are no
    integer formats, and fp16 and fp32 are torch's. Raises WeightFormatError.
    """
    embed = weights["embed"]
    if embed.device.type != "cpu" or embed.dtype is not torch.float32:
        if wish is Weights.AUTO:
            return as_they_are()
        raise WeightFormatError(f"--weights {wish} is for fp32 on a CPU; use --weights auto")
    native = native and available(WeightFormat.FP32)
    spare = _first(WeightFormat.ONEDNN_FP32, WeightFormat.PLAIN)
    exact = WeightFormat.FP32 if native else spare
    half = _first(WeightFormat.FP16 if native else WeightFormat.FBGEMM_FP16, exact)
    integers = INTEGERS if native else ()
    _refuse(wish, weights, native=native)
    whole = functools.partial(_nearest, (exact, spare))
    nearest = functools.partial(_nearest, (half, exact, spare))
    smallest = functools.partial(_nearest, (*integers, half, exact, spare))
    layers: dict[Weights, Forms] = {
        Weights.AUTO: smallest,
        Weights.FP32: whole,
        Weights.BF16: lambda _: WeightFormat.ONEDNN_BF16,
        Weights.INT4: lambda _: WeightFormat.INT4,
    }
    # Logits rounded to bf16 or 4 bits have ties, so a head goes below fp16 only if stored so.
    head: dict[Weights, Forms] = {
        Weights.AUTO: smallest,
        Weights.FP32: whole,
        Weights.INT4: functools.partial(_nearest, (WeightFormat.INT8, half, exact, spare)),
    }
    # Rows of an LM head that was published in 8 bits, among others.
    exits = smallest if wish in (Weights.AUTO, Weights.INT4) else nearest
    return Recipes(layers.get(wish, nearest), head.get(wish, nearest), exits, smallest)


def keeps_integers(recipes: Recipes, weights: Mapping[str, Tensor]) -> bool:
    """Whether the first layer's matrices are kept in integers."""
    return all(recipes.layers(weights[name]) in INTEGERS for name in _FIRST_LAYER)


def as_they_are() -> Recipes:
    """Plain tensors, which the kernels of GPUs read."""
    return all_in(WeightFormat.PLAIN)


def all_in(form: WeightFormat) -> Recipes:
    """The same format for all matrices."""

    def forms(_: Tensor) -> WeightFormat:
        return form

    return Recipes(forms, forms, forms, forms)


def _first(form: WeightFormat, other: WeightFormat) -> WeightFormat:
    return form if available(form) else other


def _nearest(forms: Sequence[WeightFormat], weight: Tensor) -> WeightFormat:
    """The first of ``forms`` that can store ``weight``; the last, which must, is not asked."""
    return next((form for form in forms[:-1] if can_hold(form, weight)), forms[-1])


def _refuse(wish: Weights, weights: Mapping[str, Tensor], *, native: bool) -> None:
    """Raise WeightFormatError if the machine or the model has no such format."""
    if wish is Weights.INT4:
        _refuse_int4(weights, native=native)
        return
    needed = {
        Weights.BF16: WeightFormat.ONEDNN_BF16,
        Weights.FP16: WeightFormat.FP16 if native else WeightFormat.FBGEMM_FP16,
    }
    if wish in needed and not available(needed[wish]):
        raise WeightFormatError(f"--weights {wish}: no such products on this machine; use auto")


def _refuse_int4(weights: Mapping[str, Tensor], *, native: bool) -> None:
    if not native:
        raise WeightFormatError("--weights int4 needs the C kernels; use --weights auto")
    for name, weight in weights.items():
        matrix = name.startswith("layers.") and weight.dim() > 1
        if matrix and not can_hold(WeightFormat.INT4, weight):
            raise WeightFormatError(
                f"--weights int4 keeps the 4-bit weights of a model published in Q4_1; {name} "
                "of this model is finer; use fp16"
            )
