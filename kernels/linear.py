"""Matrix product with the weight layout of the checkpoints, [out, in]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.native import Matrix as NativeMatrix
from offramp.kernels.packed import Native, Plain, WeightForm, available, pack


class Linear:
    """A weight [out, in] with its bias [out], kept for products and nothing else.

    Without a ``form`` it is kept exactly: packed for oneDNN where that exists, else as it is.
    Raises PackError if the weight cannot be kept in that form.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, form: WeightForm | None = None
    ) -> None:
        self.shape = weight.shape
        self.bias = bias
        self._like = weight.new_empty(0)
        self._packed = pack(weight, bias, form or _exact(weight))

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [n, in] to [n, out]."""
        return self._packed(x)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weight."""
        return self._packed.nbytes

    @property
    def native(self) -> NativeMatrix | None:
        """The weight as the C kernels take it, if it is in one of their forms."""
        return self._packed.matrix if isinstance(self._packed, Native) else None

    @property
    def plain(self) -> Tensor | None:
        """The weight itself, if it is kept as it is."""
        return self._packed.weight if isinstance(self._packed, Plain) else None

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] as its products see it."""
        return self.rows(torch.arange(self.shape[0], device=self._like.device))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` [n] of the weight, [n, in]."""
        if isinstance(self._packed, Native):
            return self._packed.rows(ids)
        if isinstance(self._packed, Plain):
            return self._packed.weight[ids]
        # Other forms do not tell; their products of the unit vectors do.
        unit = torch.eye(self.shape[1], dtype=self._like.dtype, device=self._like.device)
        with torch.no_grad():
            columns = self._packed(unit)
        whole = columns if self.bias is None else columns - self.bias
        return whole.t()[ids].contiguous()


Matrix = Tensor | Linear
"""A weight, packed or not."""


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """``x`` [n, in] times ``weight`` [out, in] transposed, plus ``bias`` [out]."""
    if isinstance(weight, Linear):
        out = weight(x)
        return out if bias is None else out + bias
    return F.linear(x, weight, bias)


def _exact(weight: Tensor) -> WeightForm:
    packs = weight.device.type == "cpu" and weight.dtype is torch.float32
    exact = packs and available(WeightForm.ONEDNN_FP32)
    return WeightForm.ONEDNN_FP32 if exact else WeightForm.PLAIN
