"""In which format each of a model's matrices is stored, by ``--weights``, machine and model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.weight_formats import (
    INTEGERS,
    PackError,
    WeightFormat,
    available,
    can_hold,
    first_to_hold,
    nearest,
)
from offramp.models.config import Weights
from offramp.models.errors import ModelError

Forms = tuple[WeightFormat, ...]
"""Formats to store a matrix in: the first that holds it, and the last holds any."""


_MATRIX = 2
_ROUNDED = (Weights.INT8, Weights.INT4)
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


class RoundedWeights(Mapping[str, Tensor]):
    """``weights`` in fp32 whose matrices are rounded when they are asked for.

    Layers to ``form``, INT4 or INT8, embeddings and LM head to 8 bits: among logits of 4 bits there
    are ties. ``changed`` are the names of those that had to move, ``error`` is the largest move,
    relative to the matrix's norm. Where one cannot be rounded, the error names the ``other`` wish.
    """

    def __init__(self, weights: Mapping[str, Tensor], form: WeightFormat, other: Weights) -> None:
        self._weights = weights
        self.form = form
        self._other = other
        self.changed: set[str] = set()
        self.error = 0.0

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        if weight.dim() < _MATRIX or weight.dtype is not torch.float32:
            return weight
        form = self.form if name.startswith("layers.") else WeightFormat.INT8
        try:
            # What was published in 4 bits does not get finer by 8.
            if form is WeightFormat.INT8 and can_hold(WeightFormat.INT4, weight):
                return weight
            rounded = nearest(form, weight)
        except PackError as reason:
            raise WeightFormatError(
                f"--weights {self.form}: {name}: {reason}; use --weights {self._other}"
            ) from reason
        if rounded is not weight:
            error = float((rounded - weight).norm() / weight.norm())
            self.error = max(self.error, error)
            self.changed.add(name)
        return rounded

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def rounded(
    wish: Weights, weights: Mapping[str, Tensor], *, quantized: bool = False, native: bool = True
) -> Mapping[str, Tensor]:
    """``weights`` on the grids of INT8 and INT4, where these are wished for; `choose` finds them.

    Either leaves alone what 4 or its own bits hold as it is. AUTO rounds weights of ``quantized``
    files to INT8: those of 5 and 6 bits have a grid that no format here holds. ``native`` as for
    `choose`.
    """
    other = Weights.FP16 if quantized else Weights.AUTO
    if wish in _ROUNDED:
        return RoundedWeights(weights, WeightFormat(wish), other)
    if wish is Weights.AUTO and quantized and native and available(WeightFormat.INT8):
        return RoundedWeights(weights, WeightFormat.INT8, other)
    return weights


def choose(wish: Weights, weights: Mapping[str, Tensor], *, native: bool = True) -> Recipes:
    """Formats for the loader's canonical ``weights``, which `rounded` has seen.

    Formats are for fp32 models on a CPU; elsewhere only AUTO is possible, and weights stay plain.
    Each matrix is stored in the smallest format that holds it, 4 or 8 bits where the model
    was published in them or rounded to them, else in fp16. ``native`` False forbids the C kernels:
    then there are no integer formats, and fp16 and fp32 are torch's. Raises WeightFormatError.
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
    _refuse(wish, native=native)
    whole, halves = (exact, spare), (half, exact, spare)
    smallest = (*integers, *halves)
    layers: dict[Weights, Forms] = {
        Weights.FP32: whole,
        Weights.BF16: (WeightFormat.ONEDNN_BF16,),
        Weights.FP16: halves,
    }
    # Logits rounded to bf16 have ties, so a head goes below fp16 only if stored so.
    head = layers | {Weights.BF16: halves}
    # Rows of an LM head that was published in 8 bits, among others.
    exits = halves if wish in (Weights.FP32, Weights.FP16, Weights.BF16) else smallest
    return Recipes(layers.get(wish, smallest), head.get(wish, smallest), exits, smallest)


def keeps_integers(recipes: Recipes, weights: Mapping[str, Tensor]) -> bool:
    """Whether the first layer's matrices are kept in integers."""
    return all(first_to_hold(recipes.layers, weights[name]) in INTEGERS for name in _FIRST_LAYER)


def integer_recipes(wish: Weights, weights: Mapping[str, Tensor]) -> Recipes | None:
    """As `choose` says, if it keeps the first layer's matrices in integers; else None."""
    recipes = choose(wish, weights)
    return recipes if keeps_integers(recipes, weights) else None


def as_they_are() -> Recipes:
    """Plain tensors, which the kernels of GPUs read."""
    return all_in(WeightFormat.PLAIN)


def all_in(form: WeightFormat) -> Recipes:
    """The same format for all matrices."""
    return Recipes((form,), (form,), (form,), (form,))


def _first(form: WeightFormat, other: WeightFormat) -> WeightFormat:
    return form if available(form) else other


def _refuse(wish: Weights, *, native: bool) -> None:
    """Raise WeightFormatError if the machine has no such format."""
    if wish in _ROUNDED and not native:
        raise WeightFormatError(f"--weights {wish} needs the C kernels; use --weights auto")
    needed = {
        Weights.BF16: WeightFormat.ONEDNN_BF16,
        Weights.FP16: WeightFormat.FP16 if native else WeightFormat.FBGEMM_FP16,
    }
    if wish in needed and not available(needed[wish]):
        raise WeightFormatError(f"--weights {wish}: no such products on this machine; use auto")
