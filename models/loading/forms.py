"""In which form a model's matrices are kept: as asked for, and as this machine is fastest with."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.linear import Linear
from offramp.kernels.packed import WeightForm, available, keeps
from offramp.models.config import Weights
from offramp.models.errors import ModelError

# Rows a form is timed with: one stream, a few, many, and a chunk of a prompt.
_ROWS = (1, 4, 16, 64)
# Matrices timed together, so that they do not fit into a cache that the whole model does not fit.
_SAMPLE_BYTES = 64 << 20
_REPEATS = 3

Forms = Callable[[Tensor], WeightForm]
"""In which form a matrix [out, in] is to be kept."""


class WeightFormError(ModelError):
    """The machine or the model has no such form; the message says what would work."""


@dataclass(frozen=True, slots=True)
class Recipes:
    """Forms of the layers' matrices, of the LM head's, and of the exits'."""

    layers: Forms
    head: Forms
    exits: Forms


def choose(wish: Weights, weights: Mapping[str, Tensor], *, native: bool = True) -> Recipes:
    """What to make of the loader's canonical ``weights``.

    Forms are for fp32 models on a CPU; elsewhere only AUTO is right, and weights stay as they are.
    AUTO keeps each matrix in the smallest form that loses nothing, 4 or 8 bits where the model was
    published in them, else in fp16. Without the C kernels, or without leave to use them
    (``native``), it is the faster of torch's fp32 and fp16 on this machine. Raises WeightFormError.
    """
    embed = weights["embed"]
    if embed.device.type != "cpu" or embed.dtype is not torch.float32:
        if wish is Weights.AUTO:
            return as_they_are()
        raise WeightFormError(f"--weights {wish} is for fp32 on a CPU; use --weights auto")
    native = native and available(WeightForm.FP32)
    spare = _first(WeightForm.ONEDNN_FP32, WeightForm.PLAIN)
    exact = WeightForm.FP32 if native else spare
    half = _first(WeightForm.FP16 if native else WeightForm.FBGEMM_FP16, exact)
    if wish is Weights.AUTO and not native:
        return _all(_fastest((exact, half), _sample(weights)))
    _refuse(wish, weights, native=native)
    whole = functools.partial(_nearest, (exact, spare))
    nearest = functools.partial(_nearest, (half, exact, spare))
    smallest = functools.partial(_nearest, (WeightForm.INT4, WeightForm.INT8, half, exact, spare))
    layers: dict[Weights, Forms] = {
        Weights.AUTO: smallest,
        Weights.FP32: whole,
        Weights.BF16: lambda _: WeightForm.ONEDNN_BF16,
        Weights.INT4: lambda _: WeightForm.INT4,
    }
    # Logits rounded to bf16 or 4 bits have ties, so a head goes below fp16 only if stored so.
    head: dict[Weights, Forms] = {
        Weights.AUTO: smallest,
        Weights.FP32: whole,
        Weights.INT4: functools.partial(_nearest, (WeightForm.INT8, half, exact, spare)),
    }
    return Recipes(layers.get(wish, nearest), head.get(wish, nearest), nearest)


def as_they_are() -> Recipes:
    """No matrix is packed: what kernels of GPUs read."""
    return _all(WeightForm.PLAIN)


def _all(form: WeightForm) -> Recipes:
    return Recipes(lambda _: form, lambda _: form, lambda _: form)


def _first(form: WeightForm, other: WeightForm) -> WeightForm:
    return form if available(form) else other


def _nearest(forms: Sequence[WeightForm], weight: Tensor) -> WeightForm:
    """The first of ``forms`` that can hold ``weight``; the last if none says so."""
    return next((form for form in forms[:-1] if keeps(form, weight)), forms[-1])


def _refuse(wish: Weights, weights: Mapping[str, Tensor], *, native: bool) -> None:
    """Raise WeightFormError if the machine or the model has no such form."""
    if wish is Weights.INT4:
        _refuse_int4(weights, native=native)
        return
    needed = {
        Weights.BF16: WeightForm.ONEDNN_BF16,
        Weights.FP16: WeightForm.FP16 if native else WeightForm.FBGEMM_FP16,
    }
    if wish in needed and not available(needed[wish]):
        raise WeightFormError(f"--weights {wish}: no such products on this machine; use auto")


def _refuse_int4(weights: Mapping[str, Tensor], *, native: bool) -> None:
    if not native:
        raise WeightFormError("--weights int4 needs the C kernels; use --weights auto")
    for name, weight in weights.items():
        if name.startswith("layers.") and weight.dim() > 1 and not keeps(WeightForm.INT4, weight):
            raise WeightFormError(
                f"--weights int4 keeps the 4-bit weights of a model published in Q4_1; {name} "
                "of this model is finer; use fp16"
            )


def _sample(weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Matrices of the MLPs, enough of them."""
    sample: list[Tensor] = []
    for name, weight in weights.items():
        if name.endswith(".gate_up"):
            sample.append(weight)
        if sum(each.nbytes for each in sample) >= _SAMPLE_BYTES:
            break
    return sample


def _fastest(forms: Sequence[WeightForm], sample: Sequence[Tensor]) -> WeightForm:
    """The form with the least time, each row count weighing the same."""
    first, *others = dict.fromkeys(forms)
    if not others:
        return first
    times = {form: _times(form, sample) for form in (first, *others)}
    return min(
        times, key=lambda form: sum(a / b for a, b in zip(times[form], times[first], strict=True))
    )


def _times(form: WeightForm, sample: Sequence[Tensor]) -> list[float]:
    """Least seconds of a product with every matrix, for each row count."""
    with torch.inference_mode():
        products = [Linear(weight, None, form) for weight in sample]
        return [_seconds(products, count) for count in _ROWS]


def _seconds(products: Sequence[Linear], rows: int) -> float:
    x = torch.ones(rows, products[0].shape[1])
    best = float("inf")
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        for product in products:
            product(x)
        best = min(best, time.perf_counter() - begun)
    return best
