"""Whole decoder layers in one call: the partial-depth forward pass of a segment on a CPU.

The reference is the composition of the other kernels in models/layers.py. No operator is called
per layer, and attention reads keys and values through the block tables.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_not

import torch
from torch import Tensor

from offramp.kernels.bounds import (
    check_eps,
    check_indices,
    check_pages,
    check_shape,
    check_size,
)
from offramp.kernels.kv_formats import page_steps
from offramp.kernels.linear import Linear
from offramp.kernels.native import Library, library
from offramp.kernels.native_structures import Batch, Layer, Matrix, Shape
from offramp.kernels.rows import HostRows


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
        """All matrices, in the order of native_structures.Layer."""
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
    ``states`` [n, F, width] fp32, ``slots`` [all layers] int32 (-1: none).
    """

    states: Tensor
    rows: array[int]
    slots: Tensor

    def keep(self, layer: int, hidden: Tensor) -> None:
        """Keep ``hidden`` [T, width] after ``layer``, if that has a slot."""
        slot = int(self.slots[layer])
        if slot >= 0:
            rows = torch.tensor(self.rows, device=hidden.device)
            self.states[rows, slot] = hidden.float()


def slots_of(layers: Sequence[int], count: int) -> Tensor:
    """`Taps.slots` of a stack of ``count`` layers, for the states after ``layers`` (from 1 on)."""
    slots = torch.full((count,), -1, dtype=torch.int32)
    slots[torch.tensor(layers) - 1] = torch.arange(len(layers), dtype=torch.int32)
    return slots


class NativeLayers:
    """Consecutive decoder layers, all of whose matrices the C kernels hold.

    Raises ValueError for sizes that do not fit them or one another.
    """

    def __init__(self, found: Library, layers: Sequence[LayerWeights], sizes: LayerSizes) -> None:
        _check_sizes(sizes)
        for layer in layers:
            _check_layer(layer, sizes)
        self._library = found
        self._last = max(layer.index for layer in layers)
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
        self._known: tuple[object, ...] = ()
        self._memory = Batch()

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
        self, hidden: Tensor, rows: HostRows, pages: Tensor, taps: Taps | None = None
    ) -> Tensor:
        """``hidden`` [T, width] after the layers.

        Writes the rows' K,V into ``pages`` [layers, 2, blocks, block_size, kv_heads, head_dim],
        see kv_formats. Raises ValueError for tensors of other shapes, IndexError for blocks that
        pages do not have.
        """
        count = hidden.shape[0]
        check_shape("hidden", hidden, (count, self.shape.width))
        self._check(count, rows, pages, taps)
        out = hidden.clone()
        batch = self._batch(count, rows, taps)
        self._library.run_layers(self.shape, self.layers, batch, out)
        return out

    def from_tokens(
        self,
        ids: Sequence[int],
        embeddings: Matrix,
        rows: HostRows,
        pages: Tensor,
        taps: Taps | None = None,
    ) -> Tensor:
        """The same for tokens ``ids`` [T], which begin as rows of ``embeddings``.

        Raises as above, and IndexError for tokens that there are not.
        """
        count = len(ids)
        if embeddings.columns != self.shape.width:
            raise ValueError(f"embeddings have {embeddings.columns} columns")
        check_indices("tokens", min(ids), max(ids), embeddings.outs)
        self._check(count, rows, pages, taps)
        out = torch.empty(count, self.shape.width)
        batch, numbers = self._batch(count, rows, taps), array("q", ids)
        address = address_of(numbers)
        self._library.run_layers(self.shape, self.layers, batch, out, embeddings, address)
        return out

    def check_pages(self, pages: Tensor) -> None:
        """Raise ValueError unless ``pages`` hold K,V of the layers."""
        check_pages(pages, self._last, self.shape.kv_heads, self.shape.head_dim)

    def _batch(self, count: int, rows: HostRows, taps: Taps | None) -> Batch:
        """Rows that `_check` has seen."""
        batch = Batch.from_buffer_copy(self._memory)
        batch.rows, batch.longest = count, rows.longest
        batch.places, batch.positions = address_of(rows.places), address_of(rows.positions)
        batch.first_blocks, batch.blocks = address_of(rows.first_blocks), address_of(rows.blocks)
        batch.angles = address_of(rows.angles)
        batch.coarse = None if rows.coarse is None else address_of(rows.coarse)
        if taps is not None:
            batch.state_rows = address_of(taps.rows)
        return batch

    def _check(self, count: int, rows: HostRows, pages: Tensor, taps: Taps | None) -> None:
        if len(rows) != count:
            raise ValueError(f"{count} states; kernels take {len(rows)}, one a row")
        # The same for every pass of a model, and looking at tensors is not free.
        given = pages, rows.rotary, taps and taps.states, taps and taps.slots
        if not same(given, self._known):
            for angles in rows.rotary.angles:
                check_shape("angles", angles, (rows.rotary.length, 1, self.shape.head_dim))
            self.check_pages(pages)
            if taps is not None:
                self._check_taps(taps)
            states = None if taps is None else taps.states
            self._memory = memory_of(self._library, pages, rows.rotary.angles, states)
            if taps is not None:
                self._memory.state_slots = taps.slots.data_ptr()
            self._known = given
        if rows.block_size != pages.shape[3]:
            raise ValueError(f"blocks of {rows.block_size} tokens, pages of {pages.shape[3]}")
        check_indices("blocks", 0, rows.last_block, pages.shape[2])
        if taps is not None:
            if len(taps.rows) != count:
                raise ValueError(f"{count} states, {len(taps.rows)} rows to keep them")
            check_indices("rows of states", min(taps.rows), max(taps.rows), taps.states.shape[0])

    def _check_taps(self, taps: Taps) -> None:
        states, width = taps.states, self.shape.width
        check_shape("states", states, (*states.shape[:2], width))
        check_shape("slots", taps.slots, taps.slots.shape, torch.int32)
        check_indices("layers with slots", 0, self._last, len(taps.slots))


def _check_sizes(sizes: LayerSizes) -> None:
    for name in ("width", "heads", "kv_heads", "head_dim", "inner"):
        check_size(name, getattr(sizes, name))
    if sizes.window is not None:
        check_size("window", sizes.window)
    check_size("queries, keys and values", (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim)
    check_size("gate and up", 2 * sizes.inner)
    check_eps(sizes.eps)
    if sizes.heads % sizes.kv_heads:
        raise ValueError(f"{sizes.heads} heads do not share {sizes.kv_heads} of keys and values")


def _check_layer(layer: LayerWeights, sizes: LayerSizes) -> None:
    queries = sizes.heads * sizes.head_dim
    kv = sizes.kv_heads * sizes.head_dim
    shapes = {
        "qkv": (queries + 2 * kv, sizes.width),
        "o": (sizes.width, queries),
        "gate_up": (2 * sizes.inner, sizes.width),
        "down": (sizes.width, sizes.inner),
    }
    for name, shape in shapes.items():
        found = tuple(getattr(layer, name).shape)
        if found != shape:
            raise ValueError(f"{name} of layer {layer.index} is {found}, not {shape}")
    for name in ("attn_norm", "mlp_norm"):
        check_shape(name, getattr(layer, name), (sizes.width,))
    for name in ("q_norm", "k_norm"):
        norm = getattr(layer, name)
        if norm is not None:
            check_shape(name, norm, (sizes.head_dim,))
    check_indices("layers", layer.index, layer.index, 2**31)


def same(given: tuple[object, ...], known: tuple[object, ...]) -> bool:
    """Whether these are the very objects that are ``known``."""
    return len(given) == len(known) and not any(map(is_not, given, known))


def memory_of(
    found: Library, pages: Tensor, angles: tuple[Tensor, Tensor], states: Tensor | None
) -> Batch:
    """What passes over the same memory, and ``states`` [n, F, width] beside it, have in common."""
    layer_step, kind_step, block_step = page_steps(pages)
    cos, sin = angles
    batch = Batch(
        block_size=pages.shape[3],
        kv_format=found.kv_formats[pages.dtype],
        pages=pages.data_ptr(),
        layer_step=layer_step,
        kind_step=kind_step,
        block_step=block_step,
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
    )
    if states is not None:
        batch.states, batch.state_stride = states.data_ptr(), states.stride(0)
    return batch


def address_of(numbers: array[int] | array[float]) -> int:
    """Where the numbers lie, as long as they are kept."""
    return numbers.buffer_info()[0]


def _struct(layer: LayerWeights) -> Layer:
    norms = (layer.attn_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
    pointers = [None if norm is None else norm.data_ptr() for norm in norms]
    return Layer(*pointers, *map(matrix_of, layer.products), layer.index)


def matrix_of(product: Linear) -> Matrix:
    """A weight that the C kernels hold, as they take it."""
    assert product.native is not None
    return product.native


def rows_matrix(weight: Linear | Tensor) -> Matrix | None:
    """A weight whose rows the C kernels can read, as they take it; None where they cannot.

    The caller keeps a plain tensor as long as it is used.
    """
    if isinstance(weight, Linear):
        return weight.native
    found = library()
    plain = weight.dtype is torch.float32 and weight.is_contiguous()
    if found is None or not plain or weight.device.type != "cpu":
        return None
    if weight.shape[1] % found.constant("GROUP"):
        return None
    return Matrix(found.constant("FORMAT_FP32"), *weight.shape, weight.data_ptr(), None)
