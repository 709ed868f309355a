"""Cases of a layer's ops: norms, the gated unit, rotation and storing of K,V, attention, K,V fill.

Ops on activations find them in the cache, as in a model. The number of their rows is known on the
host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from offramp.kernels.active_rows import SegmentBatch
from offramp.kernels.decode_attention import decode_attention, decode_attention_reference
from offramp.kernels.kv_fill import Projection, fill_kv, project_kv
from offramp.kernels.kv_store import rope_and_store, rope_and_store_reference
from offramp.kernels.prefill_attention import prefill_attention, tiles_of
from offramp.kernels.rms_norm import add_rms_norm, masked_rms_norm, rms_norm, rms_norm_reference
from offramp.kernels.swiglu import swiglu, swiglu_reference
from offramp.server.bench.device import Launch
from offramp.server.bench.kernels.case import (
    BLOCK,
    LONG,
    SHORT,
    Case,
    Setup,
    Work,
    cold_bytes,
    last_rows,
    newest_rows,
)


class LastResult:
    """Keeps what a launch returned, for ops that make their results anew."""

    def __init__(self) -> None:
        self.out = torch.empty(0)

    def launch(self, function: Callable[..., Tensor], *given: object, **named: object) -> Launch:
        """A launch of ``function`` whose result is kept."""

        def call() -> None:
            self.out = function(*given, **named)

        return call

    def results(self, count: int | None = None) -> dict[str, Tensor]:
        """The last result's first ``count`` rows (None: all)."""
        return {"out": self.out[:count]}


def rms_norm_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The norm before a product."""
    size, width, eps = setup.dtype.itemsize, setup.config.hidden_size, setup.config.rms_norm_eps
    x, weight, kept = setup.normal(count, width), setup.normal(width), LastResult()
    yield Case(
        op="rms_norm",
        what=f"width {width}",
        rows=rows,
        # A square, its sum, and two factors.
        work=Work((count + 1) * width * size, count * width * size, 4 * count * width),
        launches=[kept.launch(rms_norm, x, weight, eps)],
        reference=kept.launch(rms_norm_reference, x, weight, eps),
        results=kept.results,
    )


def masked_rms_norm_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The norm of the active rows before a product."""
    size, width, eps = setup.dtype.itemsize, setup.config.hidden_size, setup.config.rms_norm_eps
    x, weight, out = setup.normal(rows, width), setup.normal(width), setup.zeros(rows, width)
    order, counted = setup.order(rows, torch.int32), setup.count(count)

    def reference() -> None:
        chosen = order[: int(counted)].long()
        out[: len(chosen)] = rms_norm_reference(x[chosen], weight, eps)

    yield Case(
        op="masked_rms_norm",
        what=f"width {width}",
        rows=rows,
        work=Work(
            read=(count + 1) * width * size + SHORT * (1 + count),
            written=count * width * size,
            flops=4 * count * width,
        ),
        launches=[partial(masked_rms_norm, x, order, weight, out, counted, eps, limit=rows)],
        reference=reference,
        results=partial(dict, out=out),
        empty=counted.zero_,
    )


def add_rms_norm_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The sum with the residual and its norm."""
    size, width, eps = setup.dtype.itemsize, setup.config.hidden_size, setup.config.rms_norm_eps
    x, residual, weight = (setup.normal(*sizes) for sizes in ((count, width),) * 2 + ((width,),))
    found: dict[str, Tensor] = {}

    def launch() -> None:
        found["out"], found["sum"] = add_rms_norm(x, residual, weight, eps)

    def reference() -> None:
        found["sum"] = x.add_(residual)
        found["out"] = rms_norm_reference(x, weight, eps)

    yield Case(
        op="add_rms_norm",
        what=f"width {width}",
        rows=rows,
        work=Work((2 * count + 1) * width * size, 2 * count * width * size, 5 * count * width),
        launches=[launch],
        reference=reference,
        results=lambda: found,
    )


def swiglu_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The gated unit behind a library's product."""
    size, width = setup.dtype.itemsize, setup.config.intermediate_size
    gate_up, kept = setup.normal(count, 2 * width), LastResult()
    yield Case(
        op="swiglu",
        what=f"width {width}",
        rows=rows,
        # An exponential, a sum, a quotient and two products.
        work=Work(2 * count * width * size, count * width * size, 5 * count * width),
        launches=[kept.launch(swiglu, gate_up)],
        reference=kept.launch(swiglu_reference, gate_up),
        results=kept.results,
    )


def rope_and_store_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """What the fused projection gave, split, rotated and put to its places."""
    config, size, kept = setup.config, setup.dtype.itemsize, LastResult()
    width = config.query_size + 2 * config.kv_size
    qkv = setup.normal(rows, width)
    places = setup.order(_places(rows))[:rows]
    positions = torch.tensor(setup.positions(rows), device=setup.device)
    angles = setup.rotary().at(positions)
    k, v = (setup.zeros(_places(rows), config.num_kv_heads, config.head_dim) for _ in range(2))
    number = setup.count(count)
    given = (qkv, None, None, *angles, k, v, places, config.rms_norm_eps)
    named = {"heads": config.num_heads, "count": number}
    yield Case(
        op="rope_and_store",
        what=f"{config.num_heads}+2x{config.num_kv_heads} heads of {config.head_dim}",
        rows=rows,
        work=Work(
            read=count * ((width + 2 * config.head_dim) * size + LONG) + SHORT,
            written=count * width * size,
            # Of queries and keys a number times the cosine, its partner times the sine, the sum.
            flops=3 * count * (config.query_size + config.kv_size),
        ),
        launches=[kept.launch(rope_and_store, *given, **named)],
        reference=kept.launch(rope_and_store_reference, *given, **named),
        results=lambda: {"q": kept.out[:count], "k": k, "v": v},
        empty=number.zero_,
    )


def decode_attention_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The newest token of each of ``rows`` texts against all before it."""
    config, kept = setup.config, LastResult()
    k, v, texts = newest_rows(setup, rows, count)
    q = setup.normal(rows, config.num_heads, config.head_dim)
    caches = setup.copied(k, v)
    rest = (texts, config.sliding_window)
    assert texts.count is not None
    spans = [position + 1 for position in texts.positions[:count].tolist()]
    blocks = sum(-(-span // BLOCK) for span in spans)
    tables = LONG * (2 * count + blocks) + SHORT
    yield Case(
        op="decode_attention",
        what=f"{config.num_heads}/{config.num_kv_heads} heads, {setup.context} tokens",
        rows=rows,
        work=_attention_work(setup, count, sum(spans), sum(spans), tables),
        launches=[kept.launch(decode_attention, q, *kv, *rest) for kv in caches],
        reference=kept.launch(decode_attention_reference, q, k, v, *rest),
        results=partial(kept.results, count),
        cold=cold_bytes(caches),
        empty=texts.count.zero_,
    )


def prefill_attention_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The last rows of one prompt against all before them; the host knows how many there are."""
    config, kept = setup.config, LastResult()
    k, v, texts = last_rows(setup, count)
    q = setup.normal(count, config.num_heads, config.head_dim)
    caches = setup.copied(k, v)
    window, group = config.sliding_window, config.num_heads // config.num_kv_heads
    positions = texts.positions.tolist()
    tiles, _ = tiles_of([positions], group, window, setup.device)
    rest = (texts, window)
    keys = positions[-1] + 1
    pairs = sum(position + 1 for position in positions)
    tables = LONG * (2 * count + -(-keys // BLOCK)) + 2 * SHORT * len(tiles)
    yield Case(
        op="prefill_attention",
        what=f"{config.num_heads}/{config.num_kv_heads} heads, {keys} tokens",
        rows=rows,
        work=_attention_work(setup, count, keys, pairs, tables),
        launches=[kept.launch(prefill_attention, q, *kv, *rest) for kv in caches],
        reference=kept.launch(decode_attention_reference, q, k, v, texts, window),
        results=kept.results,
        cold=cold_bytes(caches),
    )


def _attention_work(setup: Setup, rows: int, keys: int, pairs: int, tables: int) -> Work:
    """``keys`` that are read once, ``pairs`` of a row and a key it sees, bytes of ``tables``."""
    config, size = setup.config, setup.dtype.itemsize
    queries = rows * config.query_size * size
    return Work(
        read=queries + 2 * keys * config.kv_size * size + tables,
        written=queries,
        # Two products, a multiplication and an addition each.
        flops=4 * pairs * config.query_size,
    )


def fill_kv_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """K,V of the upper half of the layers for rows that left below it."""
    config, eps, size = setup.config, setup.config.rms_norm_eps, setup.dtype.itemsize
    layers = config.num_layers - config.num_layers // 2
    outs, ins = layers * 2 * config.kv_size, config.hidden_size
    weights = setup.copied(setup.weight(outs, ins))
    hidden, angles = setup.normal(rows, ins), setup.rotary().angles
    leaving = SegmentBatch.empty(rows, setup.device)
    leaving.seqs.copy_(setup.order(rows))
    leaving.positions.copy_(torch.tensor(setup.positions(rows)))
    leaving.places.copy_(setup.order(_places(rows))[:rows])
    leaving.count.fill_(count)
    blocks = _places(rows) // BLOCK
    pages = setup.zeros(layers, 2, blocks, BLOCK, config.num_kv_heads, config.head_dim)
    # Of a row its state, angles, sequence, position and place.
    row = (ins + 2 * config.head_dim) * size + SHORT + 2 * LONG

    def launch(weight: Tensor) -> None:
        fill_kv(hidden, leaving, Projection(weight, None, None), pages, angles, eps)

    def reference() -> None:
        ((weight,), *_) = weights
        seqs, places = leaving.list.chosen, leaving.places[:count]
        cos, sin = (angle[leaving.positions[:count]] for angle in angles)
        project_kv(hidden[seqs], weight, None, None, pages, places, cos, sin, eps)

    yield Case(
        op="fill_kv",
        what=f"{layers} layers, {outs}x{ins}",
        rows=rows,
        work=Work(
            read=outs * ins * size + count * row + SHORT,
            written=count * outs * size,
            flops=2 * count * outs * ins,
        ),
        launches=[partial(launch, weight) for (weight,) in weights],
        reference=reference,
        results=lambda: {"pages": pages},
        cold=cold_bytes(weights),
        empty=leaving.count.zero_,
    )


def _places(rows: int) -> int:
    """Places for ``rows`` rows, whole blocks with one to spare."""
    return (-(-rows // BLOCK) + 1) * BLOCK
