"""Matrix product with the weight layout of the checkpoints, [out, in].

On a CPU the fastest way depends on the number of rows. Times of all fp32 products of one step of
SmolLM2-135M, LM head included, two AVX-512 cores, milliseconds (1 / 2 / 4 / 16 / 64 rows):

    F.linear             47 / 84 / 80 / 84 / 159
    weight @ x.T          -  / 19 / 40 / 69 / 127
    packed for oneDNN    27 / 29 / 26 / 37 / 100
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

# The transposed product of two rows runs at the speed of the memory. One row alone takes a
# matrix-vector path that does not, so without packed weights it is computed twice.
_PAIR = 2
# Where weights cannot be packed, the transposed product still wins up to here.
_FEW = 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [n, in] times ``weight`` [out, in] transposed, plus ``bias`` [out]."""
    rows = x.shape[0]
    if x.device.type != "cpu" or not 0 < rows <= _FEW:
        return F.linear(x, weight, bias)
    columns = torch.cat((x, x)) if rows == 1 else x
    out = (weight @ columns.t())[:, :rows].t().contiguous()
    return out if bias is None else out + bias


class Linear:
    """A weight [out, in] with its bias [out], kept ready for products of any number of rows.

    On a CPU the fp32 weight is also kept packed (as many bytes again), where oneDNN can.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._packed = _pack(weight) if _can_pack(weight.device, weight.dtype) else None

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [n, in], contiguous, to [n, out]."""
        if self._packed is None or x.shape[0] == _PAIR:
            return linear(x, self.weight, self.bias)
        return _packed_product(x, self._packed, self.bias)


def _pack(weight: Tensor) -> Tensor:
    # The row count is a hint; layouts packed for 4 to 256 rows were equally fast at all counts.
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # noqa: SLF001
    return packed


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
        x, packed, bias, "none", [], ""
    )
    return out


@functools.cache
def _can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the packed product exists here and is right.

    Its operators are those of torch's own compiler, without a promise to outside callers.
    """
    if device.type != "cpu" or dtype is not torch.float32:
        return False
    x, weight, bias = torch.ones(3, 8), torch.arange(32.0).view(4, 8), torch.ones(4)
    try:
        with torch.inference_mode():
            out = _packed_product(x, _pack(weight), bias)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(out, F.linear(x, weight, bias))
