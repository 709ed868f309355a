"""The default check of an exit in one call of the C kernels: gate, then head where it fires.

The reference is the composition of the other kernels in models/exits (ExitView and TwoKey).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offramp.kernels.bounds import check_indices, check_shape
from offramp.kernels.linear import Linear
from offramp.kernels.native import Library, library
from offramp.kernels.native_structures import ExitCheck, ExitWeights, Layer

_LANES = 16


class CheckParts(Protocol):
    """Weights of an exit but its matrices; see ExitHead in models/exits/head.py."""

    @property
    def router_up_bias(self) -> Tensor:
        """[g]."""
        ...

    @property
    def router_down(self) -> Tensor:
        """[1, g]."""
        ...

    @property
    def router_down_bias(self) -> Tensor:
        """[1]."""
        ...

    @property
    def scale(self) -> Tensor:
        """[d]."""
        ...

    @property
    def norm(self) -> Tensor:
        """[d]."""
        ...

    @property
    def floor(self) -> float:
        """Gate score below which adapter and LM head are not run."""
        ...


@dataclass(frozen=True, slots=True)
class CheckMatrices:
    """An exit's matrices: ``router_up`` [g, d], adapter, and ``lm_head`` [v, d]."""

    router_up: Linear
    gate_up: Linear
    down: Linear
    lm_head: Linear


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """Of each row the gate's score and, where that fires, the two largest probabilities.

    ``best`` is the place of the larger one in the exit's vocabulary, -1 where the gate did not
    fire. ``logits`` [n, v] are those of the rows ``fired``, in this order.
    """

    gates: Sequence[float]
    best: Sequence[int]
    tops: Sequence[float]
    seconds: Sequence[float]
    fired: Sequence[int]
    logits: Tensor


class NativeCheck:
    """An exit all of whose matrices the C kernels hold.

    Raises ValueError for sizes that do not fit one another.
    """

    def __init__(
        self, found: Library, parts: CheckParts, matrices: CheckMatrices, eps: float
    ) -> None:
        self._library = found
        # The C kernels read them where they are.
        self._vectors = [
            each.float().contiguous().view(-1)
            for each in (parts.router_up_bias, parts.router_down, parts.scale, parts.norm)
        ]
        self._matrices = matrices
        self._check(matrices)
        up_bias, down, scale, norm = (each.data_ptr() for each in self._vectors)
        assert matrices.gate_up.native is not None
        assert matrices.down.native is not None
        self._width = matrices.router_up.shape[1]
        self._weights = ExitWeights(
            layer=Layer(gate_up=matrices.gate_up.native, down=matrices.down.native),
            router_up=matrices.router_up.native,
            lm_head=matrices.lm_head.native,
            router_up_bias=up_bias,
            router_down=down,
            scale=scale,
            norm=norm,
            router_down_bias=float(parts.router_down_bias),
            floor=parts.floor,
            eps=eps,
        )

    @classmethod
    def of(cls, parts: CheckParts, matrices: CheckMatrices, eps: float) -> NativeCheck | None:
        """The check, or None where the reference must serve."""
        found = library()
        products = (matrices.router_up, matrices.gate_up, matrices.down, matrices.lm_head)
        if found is None or any(each.native is None for each in products):
            return None
        if matrices.router_up.shape[0] % _LANES or matrices.router_up.shape[1] % _LANES:
            return None
        return cls(found, parts, matrices, eps)

    def __call__(self, hidden: Tensor, places: Sequence[int]) -> CheckedRows:
        """Check the rows of ``hidden`` [n, d] at ``places``.

        Raises ValueError for states of another width, IndexError for rows that there are not.
        """
        check_shape("states", hidden, (hidden.shape[0], self._width))
        check_indices("rows", min(places), max(places), hidden.shape[0])
        rows, outs = len(places), self._matrices.lm_head.shape[0]
        at, zeros = array("q", places), [0.0] * rows
        gates, tops, seconds = array("f", zeros), array("f", zeros), array("f", zeros)
        best, fired, count = array("i", [0] * rows), array("i", [0] * rows), array("i", [0])
        logits = torch.empty(rows, -(-outs // _LANES) * _LANES)
        call = ExitCheck(
            rows=rows,
            hidden=hidden.data_ptr(),
            places=at.buffer_info()[0],
            gates=gates.buffer_info()[0],
            best=best.buffer_info()[0],
            tops=tops.buffer_info()[0],
            seconds=seconds.buffer_info()[0],
            logits=logits.data_ptr(),
            fired=fired.buffer_info()[0],
            count=count.buffer_info()[0],
        )
        self._library.check(self._weights, call)
        made = count[0]
        return CheckedRows(gates, best, tops, seconds, fired[:made], logits[:made, :outs])

    def _check(self, matrices: CheckMatrices) -> None:
        gate, width = matrices.router_up.shape
        inner = matrices.down.shape[1]
        if tuple(matrices.gate_up.shape) != (2 * inner, width):
            raise ValueError(f"gate_up is {tuple(matrices.gate_up.shape)}, down takes {inner}")
        if matrices.down.shape[0] != width or matrices.lm_head.shape[1] != width:
            raise ValueError(f"adapter and head do not have the gate's {width} columns")
        for name, vector, size in zip(
            ("router_up_bias", "router_down", "scale", "norm"),
            self._vectors,
            (gate, gate, width, width),
            strict=True,
        ):
            check_shape(name, vector, (size,))
