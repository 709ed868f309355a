"""What a forward pass needs besides hidden states; passed down, never global."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.paged_attention import QueryRun, query_run
from offramp.kernels.rotary import RotaryTable
from offramp.models.config import ModelConfig
from offramp.models.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Positions and pages of T rows.

    ``cos`` and ``sin`` [T, 1, head_dim // 2]; ``places`` [T] flat cache places; ``runs`` the slots'
    consecutive rows.
    """

    cos: Tensor
    sin: Tensor
    places: Tensor
    runs: tuple[QueryRun, ...]
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
    return ForwardContext(cos, sin, torch.tensor(places, device=device), tuple(runs), cache)
