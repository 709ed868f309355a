"""The end of a pass in one call of the C kernels: final norm, LM head and the likeliest tokens.

The reference is the composition of the other kernels in models/transformer.py.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.kernels.bounds import check_eps, check_indices, check_shape
from offramp.kernels.linear import Linear
from offramp.kernels.native import Library, library
from offramp.kernels.native_structures import HeadCall, HeadWeights, Matrix, Screen
from offramp.kernels.weight_formats import ARENA, GROUP, round_to_int4

_COLUMNS_MULTIPLE = 16
# Screening spares reading, not multiplying, so it pays for as many rows as wait for memory: by the
# weight's format. Weights of 4 bits are as small as their screen.
_MOST_SCREENED = {"FORMAT_INT8": 2, "FORMAT_FP16": 6, "FORMAT_FP32": 6}
# What rounding may add to a logit, of the norms of state and row: inputs in fixed point (9e-5), and
# sums in fp32.
_ROUNDING = 2.0**-12
# Rows of the weight that are rounded at a time, in sets of 32: they take ten times their memory.
_ROWS_AT_ONCE = 512


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
        self._screen: HeadScreen | None = None
        formats = {found.constant(name): most for name, most in _MOST_SCREENED.items()}
        divides = weight.shape[1] % GROUP == 0
        self.most_screened = formats.get(self._weights.weight.format, 0) if divides else 0
        """Rows up to which `screen` makes `likeliest` faster."""

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
        return self._run(hidden, places, screened=False)

    def likeliest(self, hidden: Tensor, places: Sequence[int]) -> list[int]:
        """The tokens of the largest logits of the same rows. Raises the same."""
        screened = self._screen is not None and len(places) <= self.most_screened
        return self._run(hidden, places, screened=screened)[1]

    def screen(self, states: Tensor) -> None:
        """Let `likeliest` read a part of the weight alone, for up to ``most_screened`` rows.

        ``states`` [n, d] are such as the final norm gives: the closer later ones are to the span of
        their main directions, the less is read. The tokens are the same whatever they are.
        """
        if self.most_screened:
            self._screen = HeadScreen.of(self._library, self._kept[1], states)
        self._weights.screen = None if self._screen is None else self._screen.address

    def _run(
        self, hidden: Tensor, places: Sequence[int], *, screened: bool
    ) -> tuple[Tensor, list[int]]:
        outs, columns = self._kept[1].shape
        check_shape("states", hidden, (hidden.shape[0], columns))
        check_indices("rows", min(places), max(places), hidden.shape[0])
        logits = torch.empty(len(places), outs)
        at, best = array("q", places), array("i", places)
        call = HeadCall(
            len(places),
            hidden.data_ptr(),
            at.buffer_info()[0],
            screened,
            logits.data_ptr(),
            best.buffer_info()[0],
        )
        self._library.head(self._weights, call)
        return logits, best.tolist()


class HeadScreen:
    """A copy of an LM head [vocab, d] in 4 bits, with bounds of what it leaves out.

    native/lm_head.h says how it is used; ``address`` is that of the structure it takes.
    """

    def __init__(
        self, found: Library, weight: Matrix, basis: Tensor, data: Tensor, bounds: Tensor
    ) -> None:
        self._kept = basis, data, bounds
        copy = Matrix(
            found.constant("FORMAT_INT4"),
            weight.outs,
            weight.columns + GROUP,
            data.data_ptr(),
            weight.bias,
        )
        along, across = bounds
        self._structure = Screen(copy, basis.data_ptr(), along.data_ptr(), across.data_ptr())
        self.address = ctypes.addressof(self._structure)

    @classmethod
    def of(cls, found: Library, weight: Linear, states: Tensor) -> HeadScreen | None:
        """A screen of ``weight`` for states like ``states`` [n, d].

        None for weights, or states, that have no bounds.
        """
        native = weight.native
        if native is None or not bool(states.isfinite().all()):
            return None
        # Eigenvalues ascend.
        basis = torch.linalg.eigh(states.T @ states).eigenvectors[:, -GROUP:].T.contiguous()
        blocks = torch.arange(native.outs).split(_ROWS_AT_ONCE)
        parts = [_coarse(weight.rows(ids), basis) for ids in blocks]
        bounds = torch.cat([bound for _, bound in parts], dim=1).contiguous()
        if not bool(bounds.isfinite().all()):
            return None
        data = ARENA.copy(torch.cat([part for part, _ in parts]))
        return cls(found, native, basis, data, bounds)


def _coarse(rows: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, d] of an LM head, and their bounds [2, n] along ``basis`` [GROUP, d] and across."""
    _, values = round_to_int4(rows)
    lost = (rows - values) @ basis.T
    data, values = round_to_int4(torch.cat([rows, lost], dim=1))
    kept, lost = values.split([rows.shape[1], GROUP], dim=1)
    rest = rows - kept - lost @ basis
    along = rest @ basis.T
    across = rest - along @ basis
    bounds = torch.stack([along.norm(dim=1), across.norm(dim=1)])
    return data, bounds + _ROUNDING * rows.norm(dim=1)
