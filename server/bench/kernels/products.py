"""Cases of matrix products: a layer's, the head's and an exit's, and which tile sizes are fastest.

``masked_linear`` is the kernel that reads the number of active rows on the device, ``linear`` the
library's product, which it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offramp.kernels.linear import linear
from offramp.kernels.masked_linear import (
    Activation,
    Residual,
    Rows,
    Tiles,
    masked_linear,
    masked_linear_reference,
    tiles_for,
)
from offramp.models.config import ModelConfig
from offramp.models.exits.training.train import TrainOptions
from offramp.server.bench.common import Say, columns
from offramp.server.bench.device import Clock, Launch, synchronise
from offramp.server.bench.kernels.case import SHORT, Case, Setup, Work, cold_bytes, difference
from offramp.server.bench.kernels.layers import LastResult

TILES_COLUMNS = columns(
    "product {what} | rows {rows} | tiles_for {chosen} | us {chosen_us:.2f} | best {best} | "
    "us {best_us:.2f} | ratio {ratio:.3f}"
)
# Edge of the smallest tile that tensor cores multiply.
_LEAST = 16


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix of the model with its activation or residual; it writes ``outs`` columns.

    ``of_exit`` are matrices of an exit's own: their residual has a scale, and their result is not
    added to the state. What SiLU follows (the gate) has a bias.
    """

    name: str
    ins: int
    outs: int
    activation: Activation = Activation.NONE
    residual: bool = False
    scores: bool = False
    of_exit: bool = False

    @property
    def weight_rows(self) -> int:
        """Rows of the weight."""
        return self.outs * (2 if self.activation is Activation.SWIGLU else 1)

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Logits are fp32 whatever the model is."""
        return torch.float32 if self.scores else dtype

    def work(self, rows: int, dtype: torch.dtype) -> Work:
        """The weight once, vectors once, and each row's input, residual, result and places."""
        size, out = dtype.itemsize, self.out_dtype(dtype).itemsize
        matrix = self.weight_rows * self.ins
        bias = self.outs if self.activation is Activation.SILU else 0
        scale = self.outs if self.residual and self.of_exit else 0
        row = self.ins + (self.outs if self.residual else 0)
        # The state is added to through a list of rows; tensors in between need none.
        lists = int(self.residual) * (1 if self.of_exit else 2)
        return Work(
            read=size * (matrix + bias + scale + rows * row) + SHORT * (1 + rows * lists),
            written=rows * self.outs * out,
            flops=2 * rows * matrix,
        )


def products(config: ModelConfig) -> list[Product]:
    """All products of the model in order, then those of an exit as trained here."""
    hidden, inner = config.hidden_size, config.intermediate_size
    sizes = TrainOptions()
    exit_vocab = min(sizes.vocab or config.vocab_size, config.vocab_size)
    return [
        Product("qkv", hidden, config.query_size + 2 * config.kv_size),
        Product("o", config.query_size, hidden, residual=True),
        Product("gate_up", hidden, inner, Activation.SWIGLU),
        Product("down", inner, hidden, residual=True),
        Product("lm_head", hidden, config.vocab_size, scores=True),
        Product("gate", hidden, sizes.router, Activation.SILU, of_exit=True),
        Product("adapter_up", hidden, sizes.width, Activation.SWIGLU, of_exit=True),
        Product("adapter_down", sizes.width, hidden, residual=True, of_exit=True),
        Product("exit_lm_head", hidden, exit_vocab, scores=True),
    ]


class Inputs:
    """Memory of one product for ``limit`` rows, of which ``count`` are active."""

    def __init__(self, setup: Setup, product: Product, limit: int, count: int) -> None:
        self._limit = limit
        self.count = setup.count(count)
        self.weights = setup.copied(setup.weight(product.weight_rows, product.ins))
        state = setup.order(limit, torch.int32)
        self._x = Rows(setup.normal(limit, product.ins))
        bias = setup.normal(product.outs) if product.activation is Activation.SILU else None
        residual = None
        if product.residual:
            scale = setup.normal(product.outs) if product.of_exit else None
            residual = Residual(Rows(setup.normal(limit, product.outs), state), scale)
        self._around: dict[str, Any] = {
            "bias": bias,
            "activation": product.activation,
            "residual": residual,
        }
        # A layer adds to the state itself; here to a second one, or it would grow without end.
        out = setup.zeros(limit, product.outs, dtype=product.out_dtype(setup.dtype))
        to_state = product.residual and not product.of_exit
        self.out = Rows(out, state if to_state else None)

    def launches(self, tiles: Tiles | None = None) -> list[Launch]:
        """The product with each copy of its weight, in ``tiles`` (None: those of `tiles_for`)."""
        return [partial(self._launch, weight, tiles) for (weight,) in self.weights]

    def reference(self) -> None:
        """The product in plain operators."""
        ((weight,), *_) = self.weights
        masked_linear_reference(self._x, weight, self.out, self.count, **self._around)

    def _launch(self, weight: Tensor, tiles: Tiles | None) -> None:
        given = (self._x, weight, self.out, self.count)
        masked_linear(*given, limit=self._limit, tiles=tiles, **self._around)


def masked_linear_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """Each product with its activation or residual."""
    for product in products(setup.config):
        inputs = Inputs(setup, product, rows, count)
        yield Case(
            op="masked_linear",
            what=label(product),
            rows=rows,
            work=product.work(count, setup.dtype),
            launches=inputs.launches(),
            reference=inputs.reference,
            # All rows, so that one behind the count shows where it was written.
            results=partial(dict, out=inputs.out.data),
            cold=cold_bytes(inputs.weights),
            empty=inputs.count.zero_,
        )


def label(product: Product) -> str:
    """Name and weight of a product, as reports show it."""
    return f"{product.name} {product.weight_rows}x{product.ins}"


def linear_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The same matrices with the library's product alone, which kernels are compared with."""
    for product in products(setup.config):
        yield _linear_case(setup, product, rows, count)


def _linear_case(setup: Setup, product: Product, rows: int, count: int) -> Case:
    outs, ins, size = product.weight_rows, product.ins, setup.dtype.itemsize
    weights = setup.copied(setup.weight(outs, ins))
    x, kept = setup.normal(count, ins), LastResult()

    def reference() -> None:
        ((weight,), *_) = weights
        kept.out = (x.float() @ weight.float().t()).to(setup.dtype)

    return Case(
        op="linear",
        what=label(product),
        rows=rows,
        work=Work(
            read=(outs + count) * ins * size,
            written=count * outs * size,
            flops=2 * count * ins * outs,
        ),
        launches=[kept.launch(linear, x, weight) for (weight,) in weights],
        reference=reference,
        results=kept.results,
        cold=cold_bytes(weights),
    )


def tile_candidates(base: Tiles) -> list[Tiles]:
    """``base``, its neighbours in outputs and inputs together, and in one of the rest."""
    steps = (1, 2), (2, 1), (1, 1)
    sizes = [
        replace(base, outs=base.outs * a // b, ins=base.ins * c // d)
        for a, b in steps
        for c, d in steps
    ]
    others = [
        *(replace(base, rows=rows) for rows in (base.rows // 2, base.rows * 2)),
        *(replace(base, warps=warps) for warps in (4, 8)),
        *(replace(base, stages=stages) for stages in (2, 3, 5)),
    ]
    # A dictionary keeps the order and each once.
    unique = dict.fromkeys([base, *sizes, *others])
    return [each for each in unique if min(each.rows, each.outs, each.ins) >= _LEAST]


def compare_tiles(
    make_setup: Callable[[], Setup], rows: int, seconds: float, say: Say
) -> list[dict[str, Any]]:
    """Every product with ``rows`` rows, with all candidates, each timed for ``seconds``."""
    found = []
    for product in products(make_setup().config):
        say(f"tile sizes of {label(product)}, rows: {rows}")
        found.append(_compare(make_setup(), product, rows, seconds))
    return found


def tiles_text(tiles: Tiles) -> str:
    """Tile sizes as reports show them."""
    return f"{tiles.rows}x{tiles.outs}x{tiles.ins} w{tiles.warps} s{tiles.stages}"


def _compare(setup: Setup, product: Product, rows: int, seconds: float) -> dict[str, Any]:
    inputs = Inputs(setup, product, rows, rows)
    chosen = tiles_for(rows, product.outs, setup.dtype)
    inputs.reference()
    expected = inputs.out.data.clone()
    timed: dict[Tiles, float] = {}
    skipped: list[dict[str, Any]] = []
    for tiles in tile_candidates(chosen):
        try:
            timed[tiles] = _time(setup, inputs, tiles, expected, seconds)
        # The compiler and the driver refuse in many ways what does not fit.
        except Exception as error:  # noqa: BLE001
            # Raises if the failed launch left the device in a state in which all others fail.
            synchronise(setup.device)
            why = str(error).partition("\n")[0]
            skipped.append({"cut": tiles_text(tiles), "why": f"{type(error).__name__}: {why}"})
    own, best = timed.get(chosen), min(timed, key=lambda tiles: timed[tiles], default=None)
    return {
        "what": label(product),
        "rows": rows,
        "chosen": tiles_text(chosen),
        "chosen_us": _microseconds(own),
        "best": None if best is None else tiles_text(best),
        "best_us": None if best is None else _microseconds(timed[best]),
        "ratio": None if best is None or own is None else round(own / timed[best], 4),
        "cuts": [
            {"cut": tiles_text(tiles), **asdict(tiles), "us": _microseconds(taken)}
            for tiles, taken in timed.items()
        ],
        "skipped": skipped,
    }


def _time(setup: Setup, inputs: Inputs, tiles: Tiles, expected: Tensor, seconds: float) -> float:
    """Seconds of a launch; ValueError if it computes something else."""
    launches = inputs.launches(tiles)
    inputs.out.data.zero_()
    launches[0]()
    wrong = difference(inputs.out.data, expected, setup.dtype)
    if wrong is not None:
        raise ValueError(f"the result {wrong}")
    return Clock(launches, setup.device).time(seconds).median


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e6 * seconds, 3)
