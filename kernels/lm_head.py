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
from offramp.kernels.noise import TokenNoise, native_noises
from offramp.kernels.weight_formats import ARENA, GROUP, round_to_int4

_COLUMNS_MULTIPLE = 16
# A coarse copy spares reading, so it pays for as many rows as wait for memory: by the weight's
# format. Weights of 4 bits are as small as their copy.
_MOST_COPIED = {"FORMAT_INT8": 3, "FORMAT_FP16": 6, "FORMAT_FP32": 6}
# Formats of which coarse inputs alone spare products.
_FIXED_POINT = "FORMAT_INT8", "FORMAT_INT4"
# For the rounding of bounds themselves; what else is rounded native/lm_head.h allows for.
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
        self._copy: HeadScreen | None = None
        self._coarse: HeadScreen | None = None
        form, divides = self._weights.weight.format, weight.shape[1] % GROUP == 0
        formats = {found.constant(name): most for name, most in _MOST_COPIED.items()}
        self.most_copied = formats.get(form, 0) if divides else 0
        """Rows up to which a coarse copy of the weight makes `likeliest` faster; one more counts
        where some are random."""
        fixed = form in map(found.constant, _FIXED_POINT)
        self.fewest_coarse = found.constant("FEWEST_COARSE") if fixed else 0
        """Rows from which on coarse inputs make `likeliest` faster; 0: never."""

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
        logits = torch.empty(len(places), self._kept[1].shape[0])
        return logits, self._run(hidden, places, logits, None)[0]

    def likeliest(
        self,
        hidden: Tensor,
        places: Sequence[int],
        noises: Sequence[TokenNoise | None] = (),
    ) -> list[int] | None:
        """The tokens of the largest logits of the same rows, with ``noises`` where there are any.

        None where a screen would not find them faster than all logits do. Raises the same.
        """
        # Of random rows each takes longer, which favours fewer exact products.
        count = len(places) + any(noise is not None for noise in noises)
        screen = self._coarse if 0 < self.fewest_coarse <= count else None
        if count <= self.most_copied:
            screen = self._copy
        return None if screen is None else self.screened(hidden, places, screen, noises)[0]

    @property
    def can_screen(self) -> bool:
        """Whether `screen` makes `likeliest` faster for some number of rows."""
        return self.most_copied > 0 or self.fewest_coarse > 0

    def screen(self, states: Tensor) -> None:
        """Let `likeliest` leave out most exact products, for the numbers of rows where that pays.

        ``states`` [n, d] are such as the final norm gives: the closer later ones are to the span of
        their main directions, the less is read. The tokens are the same whatever they are.
        """
        weight = self._kept[1]
        if self.most_copied:
            self._copy = HeadScreen.by_copy(self._library, weight, states)
        if self.fewest_coarse:
            self._coarse = HeadScreen.by_inputs(weight)

    def screened(
        self,
        hidden: Tensor,
        places: Sequence[int],
        screen: HeadScreen,
        noises: Sequence[TokenNoise | None] = (),
    ) -> tuple[list[int], list[int]]:
        """The same as `likeliest` by a screen, and how many sets of 32 outputs each row took."""
        return self._run(hidden, places, None, screen, noises)

    def _run(
        self,
        hidden: Tensor,
        places: Sequence[int],
        logits: Tensor | None,
        screen: HeadScreen | None,
        noises: Sequence[TokenNoise | None] = (),
    ) -> tuple[list[int], list[int]]:
        check_shape("states", hidden, (hidden.shape[0], self._kept[1].shape[1]))
        check_indices("rows", min(places), max(places), hidden.shape[0])
        noise = native_noises(noises)
        at, best, multiplied = array("q", places), array("i", places), array("i", places)
        call = HeadCall(
            len(places),
            hidden.data_ptr(),
            at.buffer_info()[0],
            None if screen is None else screen.address,
            None if noise is None else ctypes.addressof(noise),
            None if logits is None else logits.data_ptr(),
            best.buffer_info()[0],
            multiplied.buffer_info()[0],
        )
        self._library.head(self._weights, call)
        return best.tolist(), multiplied.tolist()


class HeadScreen:
    """What makes coarse logits of an LM head [vocab, d], with bounds of what it leaves out.

    native/lm_head.h says how it is used; ``address`` is that of the structure it takes.
    """

    def __init__(
        self,
        weight: Matrix,
        norms: Tensor,
        directions: Sequence[Tensor] = (),
        data: Tensor | None = None,
    ) -> None:
        # ``data`` is what ``weight`` points at, if nobody else keeps it.
        self._kept = norms, directions, data
        parts = norms, *directions
        self._structure = Screen(weight, *(part.data_ptr() for part in parts))
        self.address = ctypes.addressof(self._structure)

    @classmethod
    def by_inputs(cls, weight: Linear) -> HeadScreen | None:
        """A screen that reads all of ``weight``, in fixed point, and 8 bits of the inputs.

        None for weights that have no bounds.
        """
        blocks = torch.arange(weight.shape[0]).split(_ROWS_AT_ONCE)
        norms = torch.cat([weight.rows(ids).norm(dim=1) for ids in blocks]) * (1 + _ROUNDING)
        if weight.native is None or not bool(norms.isfinite().all()):
            return None
        return cls(weight.native, norms)

    @classmethod
    def by_copy(cls, found: Library, weight: Linear, states: Tensor) -> HeadScreen | None:
        """A screen that reads a copy of ``weight`` in 4 bits, for states like ``states`` [n, d].

        None for weights, or states, that have no bounds.
        """
        native = weight.native
        if native is None or not bool(states.isfinite().all()):
            return None
        # Eigenvalues ascend.
        basis = torch.linalg.eigh(states.T @ states).eigenvectors[:, -GROUP:].T.contiguous()
        blocks = torch.arange(native.outs).split(_ROWS_AT_ONCE)
        parts = [_coarse(weight.rows(ids), basis) for ids in blocks]
        bounds = torch.cat([bound for _, bound in parts], dim=1) * (1 + _ROUNDING)
        if not bool(bounds.isfinite().all()):
            return None
        data = ARENA.copy(torch.cat([part for part, _ in parts]))
        columns = native.columns + GROUP
        int4 = found.constant("FORMAT_INT4")
        copy = Matrix(int4, native.outs, columns, data.data_ptr(), native.bias)
        norms, along, across = bounds
        return cls(copy, norms, (basis, along, across), data)


def _coarse(rows: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, d] of an LM head in 4 bits, with columns for directions ``basis`` [GROUP, d].

    With them the norms [3, n] of the rows, and of what is left out along the directions and across
    them.
    """
    _, values = round_to_int4(rows)
    lost = (rows - values) @ basis.T
    data, values = round_to_int4(torch.cat([rows, lost], dim=1))
    kept, lost = values.split([rows.shape[1], GROUP], dim=1)
    rest = rows - kept - lost @ basis
    along = rest @ basis.T
    across = rest - along @ basis
    return data, torch.stack([each.norm(dim=1) for each in (rows, along, across)])
