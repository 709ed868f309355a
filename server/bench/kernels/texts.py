"""Texts whose keys and values lie in pages, block by block in no order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.rows import RowTable
from offramp.server.bench.kernels.setup import BLOCK, Setup


@dataclass(frozen=True, slots=True)
class Texts:
    """One layer's cache of some texts, and rows that stand in them.

    ``k`` and ``v`` are [places, kv_heads, head_dim]; ``positions`` those of ``rows`` as the host
    knows them, the counted ones only.
    """

    k: Tensor
    v: Tensor
    rows: RowTable
    positions: list[int]


def newest(setup: Setup, limit: int, count: int) -> Texts:
    """``limit`` texts with a row each at its newest token; ``count`` of the rows are there."""
    positions = setup.positions(count)
    owners = list(range(limit))
    return _texts(setup, limit, owners, [*positions, *[0] * (limit - count)], count)


def run(setup: Setup, number: int) -> Texts:
    """One text whose last ``number`` positions are rows."""
    first = max(0, setup.context - number)
    return _texts(setup, 1, [0] * number, list(range(first, first + number)), None)


def _texts(
    setup: Setup, texts: int, owners: list[int], positions: list[int], count: int | None
) -> Texts:
    config = setup.config
    each = -(-max(setup.context, max(positions) + 1) // BLOCK)
    blocks = setup.order(texts * each)
    owner, position = (torch.tensor(x, device=setup.device) for x in (owners, positions))
    first = owner * each
    kv = setup.normal(2, texts * each * BLOCK, config.num_kv_heads, config.head_dim)
    # Nobody rotates here; the angles are those of a table without rows.
    cos, sin = (setup.zeros(0, 1, config.head_dim) for _ in range(2))
    rows = RowTable(
        places=blocks[first + position // BLOCK] * BLOCK + position % BLOCK,
        positions=position,
        first_blocks=first,
        blocks=blocks,
        block_size=BLOCK,
        longest=each * BLOCK,
        cos=cos,
        sin=sin,
        count=None if count is None else setup.count(count),
    )
    return Texts(kv[0], kv[1], rows, positions if count is None else positions[:count])
