"""Matrix product with the weight layout of the checkpoints, [out, in]."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

_THIN = range(2, 9)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [n, in] times ``weight`` [out, in] transposed, plus ``bias`` [out].

    On a CPU, products of 2 to 8 fp32 rows go through ``weight @ x.T``: the BLAS takes a path that is
    2 to 4 times faster there (measured at 3072 x 576: 2 rows 0.35 against 1.3 ms, 4 rows 0.5 against
    1.0 ms).
    """
    if x.shape[0] in _THIN and x.device.type == "cpu":
        out = (weight @ x.t()).t().contiguous()
        return out if bias is None else out + bias
    return F.linear(x, weight, bias)
