"""Matrix product with the weight layout of the checkpoints, [out, in]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.packed import WeightForm, available, pack


@dataclass(frozen=True, slots=True)
class Recipe:
    """In which form a weight serves products of ``few_rows`` rows or less, and of more."""

    few: WeightForm
    many: WeightForm
    few_rows: int = 0

    @classmethod
    def of(cls, form: WeightForm) -> Recipe:
        """One form for any number of rows."""
        return cls(form, form)


class Linear:
    """A weight [out, in] with its bias [out], kept for products and nothing else.

    Without a ``recipe`` it is kept exactly: packed for oneDNN where that exists, else as it is.
    Raises PackError if the weight cannot be kept as the recipe says.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, recipe: Recipe | None = None
    ) -> None:
        self.shape = weight.shape
        self.bias = bias
        self._like = weight.new_empty(0)
        recipe = recipe or _exact(weight)
        self._few_rows = recipe.few_rows
        self._few = pack(weight, bias, recipe.few)
        alike = recipe.many is recipe.few
        self._many = self._few if alike else pack(weight, bias, recipe.many)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [n, in] to [n, out]."""
        return self._few(x) if x.shape[0] <= self._few_rows else self._many(x)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] as its products see it, read off those of the unit vectors."""
        unit = torch.eye(self.shape[1], dtype=self._like.dtype, device=self._like.device)
        with torch.no_grad():
            columns = self._many(unit)
        return (columns if self.bias is None else columns - self.bias).t().contiguous()


Matrix = Tensor | Linear
"""A weight, packed or not."""


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """``x`` [n, in] times ``weight`` [out, in] transposed, plus ``bias`` [out]."""
    if isinstance(weight, Linear):
        out = weight(x)
        return out if bias is None else out + bias
    return F.linear(x, weight, bias)


def _exact(weight: Tensor) -> Recipe:
    packs = weight.device.type == "cpu" and weight.dtype is torch.float32
    return Recipe.of(WeightForm.FP32 if packs and available(WeightForm.FP32) else WeightForm.PLAIN)
