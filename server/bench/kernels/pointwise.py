"""Cases of ops on activations, which a model, too, finds in the cache; the host counts rows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from offramp.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from offramp.kernels.swiglu import swiglu, swiglu_reference
from offramp.server.bench.kernels.case import Case, Work
from offramp.server.bench.kernels.setup import Setup


def rms_norm_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The norm before a product."""
    config, size, found = setup.config, setup.dtype.itemsize, {}
    width, eps = config.hidden_size, config.rms_norm_eps
    x, weight = setup.normal(count, width), setup.normal(width)

    def launch() -> None:
        found["out"] = rms_norm(x, weight, eps)

    def reference() -> None:
        found["out"] = rms_norm_reference(x, weight, eps)

    yield Case(
        op="rms_norm",
        what=f"width {width}",
        rows=rows,
        # A square, its sum, and two factors.
        work=Work((count + 1) * width * size, count * width * size, 4 * count * width),
        launches=[launch],
        reference=reference,
        results=lambda: found,
    )


def add_rms_norm_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The sum with the residual and its norm."""
    config, size = setup.config, setup.dtype.itemsize
    found: dict[str, Tensor] = {}
    width, eps = config.hidden_size, config.rms_norm_eps
    x, residual, weight = (setup.normal(*sizes) for sizes in ((count, width),) * 2 + ((width,),))

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
    size, found = setup.dtype.itemsize, {}
    width = setup.config.intermediate_size
    gate_up = setup.normal(count, 2 * width)

    def launch() -> None:
        found["out"] = swiglu(gate_up)

    def reference() -> None:
        found["out"] = swiglu_reference(gate_up)

    yield Case(
        op="swiglu",
        what=f"width {width}",
        rows=rows,
        # An exponential, a sum, a quotient and two products.
        work=Work(2 * count * width * size, count * width * size, 5 * count * width),
        launches=[launch],
        reference=reference,
        results=lambda: found,
    )
