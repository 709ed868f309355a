"""In which form a model's matrices are kept: as asked for, and as this machine is fastest with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.linear import Linear, Recipe
from offramp.kernels.packed import WeightForm, available, on_grid
from offramp.models.errors import ModelError
from offramp.models.weights import Weights

# Rows a form is timed with: one stream, a few, many, and a chunk of a prompt.
_ROWS = (1, 4, 16, 64)
_CROSSINGS = (1, 2, 4, 8, 16, 32, 64)
# Matrices timed together, so that they do not fit into a cache that the whole model does not fit.
_SAMPLE_BYTES = 64 << 20
_REPEATS = 3


class WeightFormError(ModelError):
    """The machine or the model has no such form; the message says what would work."""


@dataclass(frozen=True, slots=True)
class Recipes:
    """Forms of the layers' matrices, of the LM head's, and of the exits'."""

    layers: Recipe
    head: Recipe
    exits: Recipe

    @classmethod
    def of(cls, form: WeightForm) -> Recipes:
        """One form for everything."""
        return cls(Recipe.of(form), Recipe.of(form), Recipe.of(form))


def choose(wish: Weights, weights: Mapping[str, Tensor]) -> Recipes:
    """What to make of the loader's canonical ``weights``.

    Forms are for fp32 models on a CPU; elsewhere only AUTO is right, and weights stay as they are.
    AUTO takes the faster of fp32 and fp16, both of which keep the model's answers. Raises
    WeightFormError.
    """
    embed = weights["embed"]
    if embed.device.type != "cpu" or embed.dtype is not torch.float32:
        if wish is Weights.AUTO:
            return Recipes.of(WeightForm.PLAIN)
        raise WeightFormError(f"--weights {wish} is for fp32 on a CPU; use --weights auto")
    if wish not in {Weights.AUTO, Weights.FP32}:
        _refuse(WeightForm(wish), weights)
    half = WeightForm.FP16 if available(WeightForm.FP16) else _exact()
    match wish:
        case Weights.AUTO:
            return Recipes.of(_fastest((_exact(), half), _sample(weights), _ROWS))
        case Weights.FP32:
            return Recipes(Recipe.of(_exact()), Recipe.of(_exact()), Recipe.of(half))
        case Weights.FP16:
            return Recipes.of(half)
        case Weights.BF16:
            # Logits rounded to bf16 have ties, so the head does not go below fp16.
            return Recipes(Recipe.of(WeightForm.BF16), Recipe.of(half), Recipe.of(half))
        case Weights.INT4:
            return Recipes(_int4(_sample(weights)), Recipe.of(half), Recipe.of(half))


def _exact() -> WeightForm:
    return WeightForm.FP32 if available(WeightForm.FP32) else WeightForm.PLAIN


def _refuse(form: WeightForm, weights: Mapping[str, Tensor]) -> None:
    if not available(form):
        raise WeightFormError(f"--weights {form}: no such products on this machine; use auto")
    if form is WeightForm.INT4:
        for name, weight in weights.items():
            if name.startswith("layers.") and weight.dim() > 1 and not on_grid(weight):
                raise WeightFormError(
                    f"--weights int4 keeps the 4-bit weights of a model published in Q4_1; {name} "
                    "of this model is finer; use fp16"
                )


def _int4(sample: Sequence[Tensor]) -> Recipe:
    """4 bits where little is computed with much read; for more rows what is faster then."""
    others = [form for form in (WeightForm.BF16, WeightForm.FP16, _exact()) if available(form)]
    many = _fastest(others, sample, _CROSSINGS[-1:])
    ahead = 0
    for rows in _CROSSINGS:
        if _fastest((WeightForm.INT4, many), sample, (rows,)) is many:
            break
        ahead = rows
    return Recipe(WeightForm.INT4, many, ahead)


def _sample(weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Matrices of the MLPs, enough of them."""
    sample: list[Tensor] = []
    for name, weight in weights.items():
        if name.endswith(".gate_up"):
            sample.append(weight)
        if sum(each.nbytes for each in sample) >= _SAMPLE_BYTES:
            break
    return sample


def _fastest(
    forms: Sequence[WeightForm], sample: Sequence[Tensor], rows: Sequence[int]
) -> WeightForm:
    """The form with the least time, each row count weighing the same."""
    first, *others = dict.fromkeys(forms)
    if not others:
        return first
    times = {form: _times(form, sample, rows) for form in (first, *others)}
    return min(
        times, key=lambda form: sum(a / b for a, b in zip(times[form], times[first], strict=True))
    )


def _times(form: WeightForm, sample: Sequence[Tensor], rows: Sequence[int]) -> list[float]:
    """Least seconds of a product with every matrix, for each row count."""
    with torch.inference_mode():
        products = [Linear(weight, None, Recipe.of(form)) for weight in sample]
        return [_seconds(products, count) for count in rows]


def _seconds(products: Sequence[Linear], rows: int) -> float:
    x = torch.ones(rows, products[0].shape[1])
    best = float("inf")
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        for product in products:
            product(x)
        best = min(best, time.perf_counter() - begun)
    return best
