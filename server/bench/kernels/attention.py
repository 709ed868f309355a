"""Cases of attention over pages: a row each of many texts, and many rows of one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from offramp.kernels.decode_attention import decode_attention, decode_attention_reference
from offramp.kernels.prefill_attention import RunTable, prefill_attention
from offramp.server.bench.kernels import texts
from offramp.server.bench.kernels.case import Case, Work
from offramp.server.bench.kernels.setup import BLOCK, Setup, cold_bytes

_LONG, _SHORT = 8, 4


def decode_attention_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The newest token of each of ``rows`` texts against all before it."""
    config, found = setup.config, {}
    made = texts.newest(setup, rows, count)
    q = setup.normal(rows, config.num_heads, config.head_dim)
    caches = setup.copied(made.k, made.v)
    window = config.sliding_window

    def launch(k: Tensor, v: Tensor) -> None:
        found["out"] = decode_attention(q, k, v, made.rows, window)

    def reference() -> None:
        found["out"] = decode_attention_reference(q, made.k, made.v, made.rows, window)

    assert made.rows.count is not None
    spans = [position + 1 for position in made.positions]
    blocks = sum(-(-span // BLOCK) for span in spans)
    pairs = sum(spans)
    work = _work(setup, count, pairs, pairs, _LONG * (2 * count + blocks) + _SHORT)
    yield Case(
        op="decode_attention",
        what=f"{config.num_heads}/{config.num_kv_heads} heads, {setup.context} tokens",
        rows=rows,
        work=work,
        launches=[partial(launch, k, v) for k, v in caches],
        reference=reference,
        results=lambda: {"out": found["out"][:count]},
        cold=cold_bytes(caches),
        empty=made.rows.count.zero_,
    )


def prefill_attention_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The last rows of one prompt against all before them; the number of rows is the host's."""
    config, found = setup.config, {}
    made = texts.run(setup, count)
    q = setup.normal(count, config.num_heads, config.head_dim)
    caches = setup.copied(made.k, made.v)
    window, group = config.sliding_window, config.num_heads // config.num_kv_heads
    tiles = RunTable.of([made.positions], group, window, setup.device)

    def launch(k: Tensor, v: Tensor) -> None:
        found["out"] = prefill_attention(q, k, v, made.rows, tiles, window)

    def reference() -> None:
        found["out"] = decode_attention_reference(q, made.k, made.v, made.rows, window)

    keys = made.positions[-1] + 1
    pairs = sum(position + 1 for position in made.positions)
    tables = _LONG * (2 * count + -(-keys // BLOCK)) + 2 * _SHORT * len(tiles.tiles)
    yield Case(
        op="prefill_attention",
        what=f"{config.num_heads}/{config.num_kv_heads} heads, {keys} tokens",
        rows=rows,
        work=_work(setup, count, keys, pairs, tables),
        launches=[partial(launch, k, v) for k, v in caches],
        reference=reference,
        results=lambda: found,
        cold=cold_bytes(caches),
    )


def _work(setup: Setup, rows: int, keys: int, pairs: int, tables: int) -> Work:
    """``keys`` that are read once, ``pairs`` of a row and a key it sees, bytes of ``tables``."""
    config, size = setup.config, setup.dtype.itemsize
    queries = rows * config.query_size * size
    return Work(
        read=queries + 2 * keys * config.kv_size * size + tables,
        written=queries,
        # Two products, a multiplication and an addition each.
        flops=4 * pairs * config.query_size,
    )
