"""Matrix product with the weight layout of the checkpoints, [out, in]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.native_structures import Matrix as NativeMatrix
from offramp.kernels.weight_formats import (
    NativeWeight,
    PlainWeight,
    WeightFormat,
    available,
    pack_first,
)


class Linear:
    """A weight [out, in] with its bias [out], stored for products alone.

    In the first of ``forms`` that can store it; without any no value changes: in oneDNN's layout
    where that exists, else the tensor itself. Raises PackError if none can.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        forms: Sequence[WeightFormat] | None = None,
    ) -> None:
        self.shape = weight.shape
        self.bias = bias
        self._like = weight.new_empty(0)
        self._packed = pack_first(weight, bias, forms or (_exact(weight),))

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [n, in] to [n, out]."""
        return self._packed(x)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weight."""
        return self._packed.nbytes

    @property
    def native(self) -> NativeMatrix | None:
        """The weight as the C kernels take it, if it is in one of their formats."""
        return self._packed.matrix if isinstance(self._packed, NativeWeight) else None

    @property
    def plain(self) -> Tensor | None:
        """The weight tensor itself, if the format is PLAIN."""
        return self._packed.weight if isinstance(self._packed, PlainWeight) else None

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] as its products see it."""
        return self.rows(torch.arange(self.shape[0], device=self._like.device))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` [n] of the weight, [n, in]."""
        if isinstance(self._packed, NativeWeight):
            return self._packed.rows(ids)
        if isinstance(self._packed, PlainWeight):
            return self._packed.weight[ids]
        # oneDNN and FBGEMM do not give weights back; their products with unit vectors do.
        unit = torch.eye(self.shape[1], dtype=self._like.dtype, device=self._like.device)
        with torch.no_grad():
            columns = self._packed(unit)
        whole = columns if self.bias is None else columns - self.bias
        return whole.t()[ids].contiguous()


Matrix = Tensor | Linear
"""A weight, as a tensor or in a format for products."""


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """``x`` [n, in] times ``weight`` [out, in] transposed, plus ``bias`` [out]."""
    if isinstance(weight, Linear):
        out = weight(x)
        return out if bias is None else out + bias
    return F.linear(x, weight, bias)


def _exact(weight: Tensor) -> WeightFormat:
    packs = weight.device.type == "cpu" and weight.dtype is torch.float32
    exact = packs and available(WeightFormat.ONEDNN_FP32)
    return WeightFormat.ONEDNN_FP32 if exact else WeightFormat.PLAIN
