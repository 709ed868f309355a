"""What a forward pass needs besides hidden states; passed down, never global."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.paged_attention import QueryRun, Window, query_run, windows_of
from offramp.kernels.rotary import RotaryTable
from offramp.models.config import ModelConfig
from offramp.models.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Positions and pages of T rows.

    ``cos`` and ``sin`` [T, 1, head_dim]; ``places`` [T] flat cache places; ``runs`` the slots'
    consecutive rows, ``windows[layer]`` what they see of a layer's K,V.
    """

    cos: Tensor
    sin: Tensor
    places: Tensor
    runs: tuple[QueryRun, ...]
    windows: tuple[tuple[Window | None, ...], ...]
    cache: KVCache


@dataclass(frozen=True, slots=True)
class Span:
    """Ascending positions of one slot under its block table."""

    positions: Sequence[int]
    table: Sequence[int]


def make_context(
    spans: Sequence[Span], config: ModelConfig, cache: KVCache, rotary: RotaryTable
) -> ForwardContext:
    """Lay the spans' rows out one after another."""
    device = cache.pages.device
    places: list[int] = []
    positions: list[int] = []
    runs: list[QueryRun] = []
    for span in spans:
        runs.append(
            query_run(
                len(places),
                span.positions,
                span.table,
                block_size=cache.block_size,
                group=config.num_heads // config.num_kv_heads,
                window=config.sliding_window,
                device=device,
            )
        )
        places += cache.places(span.table, span.positions)
        positions += span.positions
    cos, sin = rotary.at(torch.tensor(positions, device=device))
    windows = _by_layer([windows_of(cache.flat, run) for run in runs], config.num_layers)
    at = torch.tensor(places, device=device)
    return ForwardContext(cos, sin, at, tuple(runs), windows, cache)


def _by_layer(
    runs: Sequence[tuple[Window, ...] | None], layers: int
) -> tuple[tuple[Window | None, ...], ...]:
    """Windows of each run, turned into windows of each layer."""
    return tuple(zip(*(run or (None,) * layers for run in runs), strict=True))
