"""The end of a pass in one call of the C kernels: final norm, LM head and the likeliest tokens.

The reference is the composition of the other kernels in models/transformer.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.kernels.bounds import check_eps, check_indices, check_shape
from offramp.kernels.linear import Linear
from offramp.kernels.native import Library, library
from offramp.kernels.native_structures import HeadCall, HeadWeights

_COLUMNS_MULTIPLE = 16


class NativeHead:
    """Final norm [d] and LM head [vocab, d], whose weight the C kernels hold.

    Raises ValueError for sizes that do not fit one another.
    """

    def __init__(self, found: Library, norm: Tensor, weight: Linear, eps: float) -> None:
        check_shape("norm", norm, (weight.shape[1],))
        check_eps(eps)
        self._library = found
        # The C kernels read them where they are.
        self._kept = norm, weight
        self._weights = HeadWeights(weight.native, norm.data_ptr(), eps)

    @classmethod
    def of(cls, norm: Tensor, weight: Linear, eps: float) -> NativeHead | None:
        """The head, or None where the reference must serve."""
        found = library()
        if found is None or weight.native is None or weight.shape[1] % _COLUMNS_MULTIPLE:
            return None
        return cls(found, norm, weight, eps)

    def __call__(self, hidden: Tensor, places: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Logits fp32 [n, vocab] of the rows of ``hidden`` at ``places`` [n], and their largest.

        Raises ValueError for states of another width, IndexError for rows that there are not.
        """
        outs, columns = self._kept[1].shape
        check_shape("states", hidden, (hidden.shape[0], columns))
        check_indices("rows", min(places), max(places), hidden.shape[0])
        logits = torch.empty(len(places), outs)
        at, best = array("q", places), array("i", places)
        call = HeadCall(
            len(places),
            hidden.data_ptr(),
            at.buffer_info()[0],
            logits.data_ptr(),
            best.buffer_info()[0],
        )
        self._library.head(self._weights, call)
        return logits, best.tolist()
