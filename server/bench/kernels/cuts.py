"""Which cut of a product is the fastest, and how far the one of `tiles_for` is from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from offramp.kernels.masked_linear import Tiles, tiles_for
from offramp.server.bench.kernels.check import distance
from offramp.server.bench.kernels.clock import Clock
from offramp.server.bench.kernels.products import Inputs, Product, label, products
from offramp.server.bench.kernels.setup import Setup
from offramp.server.bench.report import Column

COLUMNS: tuple[Column, ...] = (
    ("product", "what", "{}"),
    ("rows", "rows", "{}"),
    ("tiles_for", "chosen", "{}"),
    ("us", "chosen_us", "{:.2f}"),
    ("best", "best", "{}"),
    ("us", "best_us", "{:.2f}"),
    ("ratio", "ratio", "{:.3f}"),
)
_LEAST = 16
"""Edge of the smallest tile that tensor cores multiply."""


def candidates(base: Tiles) -> list[Tiles]:
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
    # A dictionary keeps the order and each cut once.
    unique = dict.fromkeys([base, *sizes, *others])
    return [cut for cut in unique if min(cut.rows, cut.outs, cut.ins) >= _LEAST]


def compare_cuts(
    make_setup: Callable[[], Setup], rows: int, seconds: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every product with ``rows`` rows, cut in every way, for ``seconds`` each."""
    found = []
    for product in products(make_setup().config):
        say(f"cutting {label(product)}, rows: {rows}")
        found.append(_compare(make_setup(), product, rows, seconds))
    return found


def text_of(cut: Tiles) -> str:
    """A cut as reports show it."""
    return f"{cut.rows}x{cut.outs}x{cut.ins} w{cut.warps} s{cut.stages}"


def _compare(setup: Setup, product: Product, rows: int, seconds: float) -> dict[str, Any]:
    inputs = Inputs(setup, product, rows, rows)
    chosen = tiles_for(rows, product.outs, setup.dtype)
    inputs.reference()
    expected = _result(inputs).clone()
    timed: list[tuple[float, Tiles]] = []
    skipped: list[dict[str, Any]] = []
    for cut in candidates(chosen):
        try:
            seconds_taken = _time(setup, inputs, cut, expected, seconds)
        # The compiler and the driver refuse in many ways what does not fit.
        except Exception as error:  # noqa: BLE001
            _still_works(setup.device)
            why = str(error).partition("\n")[0]
            skipped.append({"cut": text_of(cut), "why": f"{type(error).__name__}: {why}"})
        else:
            timed.append((seconds_taken, cut))
    own = {cut: taken for taken, cut in timed}.get(chosen)
    best = min(timed, key=lambda pair: pair[0], default=None)
    return {
        "what": label(product),
        "rows": rows,
        "chosen": text_of(chosen),
        "chosen_us": _microseconds(own),
        "best": None if best is None else text_of(best[1]),
        "best_us": None if best is None else _microseconds(best[0]),
        "ratio": None if best is None or own is None else round(own / best[0], 4),
        "cuts": [
            {"cut": text_of(cut), **asdict(cut), "us": _microseconds(taken)} for taken, cut in timed
        ],
        "skipped": skipped,
    }


def _time(setup: Setup, inputs: Inputs, cut: Tiles, expected: Tensor, seconds: float) -> float:
    """Seconds of a launch; ValueError if it computes something else."""
    launches = inputs.launches(cut)
    _result(inputs).zero_()
    launches[0]()
    wrong = distance(_result(inputs), expected, setup.dtype)
    if wrong is not None:
        raise ValueError(f"the result {wrong}")
    return Clock(launches, setup.device).time(seconds).median


def _result(inputs: Inputs) -> Tensor:
    return inputs.results()["out"]


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e6 * seconds, 3)


def _still_works(device: torch.device) -> None:
    """Raise if a failed launch has left the device in a state in which all others fail."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
