"""A run of decoder layers between two exit points."""

from __future__ import annotations

from torch import Tensor

from offramp.kernels.decoder import NativeLayers
from offramp.models.context import ForwardContext
from offramp.models.layers import DecoderLayer


class Segment:
    """Layers ``first .. last`` (half-open) of the stack."""

    def __init__(self, layers: list[DecoderLayer]) -> None:
        self.layers = layers
        self._native = NativeLayers.of([layer.weights for layer in layers], layers[0].sizes)

    @property
    def first(self) -> int:
        """Index of the first layer."""
        return self.layers[0].index

    @property
    def is_native(self) -> bool:
        """Whether one call of the C kernels runs all its layers."""
        return self._native is not None

    def __len__(self) -> int:
        return len(self.layers)

    def __call__(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """Advance ``hidden`` [T, d] through every layer, writing the rows' K,V into the cache."""
        if self._native is not None:
            return self._native(hidden, ctx.rows, ctx.cache.pages)
        for layer in self.layers:
            hidden = layer(hidden, ctx)
        return hidden
