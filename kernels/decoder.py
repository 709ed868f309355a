"""Whole decoder layers in one call: the partial-depth forward pass of a segment on a CPU.

The reference is the composition of the other kernels in models/layers.py. No operator is called
per layer, and attention reads keys and values through the block tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.linear import Linear
from offramp.kernels.native import Batch, Layer, Library, Matrix, Shape, library
from offramp.kernels.rows import RowTable


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one decoder layer; vectors as in the loader, ``index`` counts from the bottom."""

    index: int
    attn_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear

    @property
    def products(self) -> tuple[Linear, ...]:
        """All matrices, in the order of native.Layer."""
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Sizes that all layers share; ``window`` is the attention span in tokens, None for all."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    eps: float
    window: int | None


@dataclass(frozen=True, slots=True)
class Taps:
    """States of a pass that are kept on the way up.

    Row i of the pass is kept in ``states[rows[i], slots[layer]]`` after each layer that has a slot:
    ``states`` [n, F, width] fp32, ``rows`` [T] int64, ``slots`` [all layers] int32 (-1: none).
    """

    states: Tensor
    rows: Tensor
    slots: Tensor

    def keep(self, layer: int, hidden: Tensor) -> None:
        """Keep ``hidden`` [T, width] after ``layer``, if that has a slot."""
        slot = int(self.slots[layer])
        if slot >= 0:
            self.states[self.rows, slot] = hidden.float()


class NativeLayers:
    """Consecutive decoder layers, all of whose matrices the C kernels hold."""

    def __init__(self, found: Library, layers: Sequence[LayerWeights], sizes: LayerSizes) -> None:
        self._library = found
        self._kept = list(layers)
        self.layers = (Layer * len(layers))(*map(_struct, layers))
        window = sizes.window or 0
        self.shape = Shape(
            sizes.width,
            sizes.heads,
            sizes.kv_heads,
            sizes.head_dim,
            sizes.inner,
            window,
            sizes.eps,
        )

    @classmethod
    def of(cls, layers: Sequence[LayerWeights], sizes: LayerSizes) -> NativeLayers | None:
        """The layers, or None where the reference must serve."""
        found = library()
        products = [each for layer in layers for each in layer.products]
        if found is None or any(product.native is None for product in products):
            return None
        if sizes.head_dim % found.constant("HEAD_DIM_MULTIPLE"):
            return None
        return cls(found, layers, sizes)

    def __call__(
        self, hidden: Tensor, rows: RowTable, pages: Tensor, taps: Taps | None = None
    ) -> Tensor:
        """``hidden`` [T, width] after the layers.

        Writes the rows' K,V into ``pages`` [layers, 2, blocks, block_size, kv_heads, head_dim],
        fp32 or fp16.
        """
        out = hidden.clone()
        batch = _batch(hidden.shape[0], rows, pages, taps)
        self._library.run_layers(self.shape, self.layers, batch, out)
        return out


def _batch(count: int, rows: RowTable, pages: Tensor, taps: Taps | None) -> Batch:
    return Batch(
        count,
        rows.block_size,
        rows.longest,
        pages.dtype is torch.float16,
        pages.data_ptr(),
        pages[0, 0].numel(),
        rows.places.data_ptr(),
        rows.positions.data_ptr(),
        rows.first_blocks.data_ptr(),
        rows.blocks.data_ptr(),
        rows.cos.data_ptr(),
        rows.sin.data_ptr(),
        None,
        *_tap_pointers(taps),
    )


def _tap_pointers(taps: Taps | None) -> tuple[int | None, ...]:
    if taps is None:
        return None, 0, None, None
    stride = taps.states.stride(0)
    return taps.states.data_ptr(), stride, taps.rows.data_ptr(), taps.slots.data_ptr()


def _struct(layer: LayerWeights) -> Layer:
    norms = (layer.attn_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
    pointers = [None if norm is None else norm.data_ptr() for norm in norms]
    return Layer(*pointers, *map(matrix_of, layer.products), layer.index)


def matrix_of(product: Linear) -> Matrix:
    """A weight that the C kernels hold, as they take it."""
    assert product.native is not None
    return product.native
