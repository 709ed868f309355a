"""Cases of writing keys and values: those of a layer, and those that leavers owe."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from offramp.kernels.active_rows import SegmentBatch
from offramp.kernels.kv_fill import Projection, fill_kv, project_kv
from offramp.kernels.kv_store import rope_and_store, rope_and_store_reference
from offramp.server.bench.kernels.case import Case, Work
from offramp.server.bench.kernels.setup import BLOCK, Setup, cold_bytes

_LONG, _SHORT = 8, 4


def rope_and_store_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """What the fused projection gave, split, rotated and put to its places."""
    config, size, found = setup.config, setup.dtype.itemsize, {}
    width = config.query_size + 2 * config.kv_size
    qkv = setup.normal(rows, width)
    places = setup.order(_places(rows))[:rows]
    positions = torch.tensor(setup.positions(rows), device=setup.device)
    angles = setup.rotary().at(positions)
    k, v = (setup.zeros(_places(rows), config.num_kv_heads, config.head_dim) for _ in range(2))
    number = setup.count(count)
    rest = (qkv, None, None, *angles, k, v, places, config.rms_norm_eps)

    def launch() -> None:
        found["q"] = rope_and_store(*rest, heads=config.num_heads, count=number)

    def reference() -> None:
        found["q"] = rope_and_store_reference(*rest, heads=config.num_heads, count=number)

    rotated = config.query_size + config.kv_size
    yield Case(
        op="rope_and_store",
        what=f"{config.num_heads}+2x{config.num_kv_heads} heads of {config.head_dim}",
        rows=rows,
        work=Work(
            read=count * ((width + 2 * config.head_dim) * size + _LONG) + _SHORT,
            written=count * width * size,
            # A number times the cosine, its partner times the sine, and their sum.
            flops=3 * count * rotated,
        ),
        launches=[launch],
        reference=reference,
        results=lambda: {"q": found["q"][:count], "k": k, "v": v},
        empty=number.zero_,
    )


def fill_kv_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """K,V of the upper half of the layers for rows that left below it."""
    config, eps = setup.config, setup.config.rms_norm_eps
    layers = config.num_layers - config.num_layers // 2
    outs = layers * 2 * config.kv_size
    weights = setup.copied(setup.weight(outs, config.hidden_size))
    hidden, angles = setup.normal(rows, config.hidden_size), setup.rotary().angles
    leavers = _leavers(setup, rows, count)
    blocks = _places(rows) // BLOCK
    pages = setup.zeros(layers, 2, blocks, BLOCK, config.num_kv_heads, config.head_dim)

    def launch(weight: Tensor) -> None:
        fill_kv(hidden, leavers, Projection(weight, None, None), pages, angles, eps)

    def reference() -> None:
        ((weight,), *_) = weights
        slots, places = leavers.list.chosen, leavers.places[:count]
        cos, sin = (angle[leavers.positions[:count]] for angle in angles)
        project_kv(hidden[slots], weight, None, None, pages, places, cos, sin, eps)

    yield Case(
        op="fill_kv",
        what=f"{layers} layers, {outs}x{config.hidden_size}",
        rows=rows,
        work=_fill_work(setup, count, outs),
        launches=[partial(launch, weight) for (weight,) in weights],
        reference=reference,
        results=lambda: {"pages": pages},
        cold=cold_bytes(weights),
        empty=leavers.count.zero_,
    )


def _fill_work(setup: Setup, rows: int, outs: int) -> Work:
    """The weight once; of a row its state, angles, slot, position and place."""
    config, size = setup.config, setup.dtype.itemsize
    row = (config.hidden_size + 2 * config.head_dim) * size + _SHORT + 2 * _LONG
    return Work(
        read=outs * config.hidden_size * size + rows * row + _SHORT,
        written=rows * outs * size,
        flops=2 * rows * outs * config.hidden_size,
    )


def _leavers(setup: Setup, rows: int, count: int) -> SegmentBatch:
    leavers = SegmentBatch.empty(rows, setup.device)
    leavers.slots.copy_(setup.order(rows))
    leavers.positions.copy_(torch.tensor(setup.positions(rows)))
    leavers.places.copy_(setup.order(_places(rows))[:rows])
    leavers.count.fill_(count)
    return leavers


def _places(rows: int) -> int:
    """Places for ``rows`` rows, whole blocks with one to spare."""
    return (-(-rows // BLOCK) + 1) * BLOCK
