"""Whether ops compute what their references do; nothing is timed before."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.server.bench.errors import Refused
from offramp.server.bench.kernels.case import Case
from offramp.server.bench.kernels.ops import Maker
from offramp.server.bench.kernels.setup import Setup, Shape

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Share of a result, and of what results of the op usually are."""
_CONTEXT = 640
"""Tokens of a text at most: enough for a context that attention cuts into parts."""


def check(name: str, make: Maker, shape: Shape, rows: int) -> None:
    """Run an op's cases and their references on inputs of the model's widths; Refused if not alike.

    A quarter of the rows lies behind the count, if there are that many.
    """
    short = Shape(shape.config, shape.dtype, shape.device, min(shape.context, _CONTEXT))
    count = rows - rows // 4
    pairs = zip(*(make(Setup(short, mixed=True), rows, count) for _ in range(2)), strict=True)
    for case, model in pairs:
        where = f"{name}, {case.what}, {count} of {rows} rows"
        try:
            case.launches[0]()
            _synchronise(shape.device)
        # Whatever a compiler or a driver says, the person who runs this is told where.
        except Exception as error:
            raise Refused(f"{where}: {type(error).__name__}: {error}") from error
        model.reference()
        found = difference(case, model, shape.dtype)
        if found is not None:
            raise Refused(f"{where}: {found}")


def difference(case: Case, model: Case, dtype: torch.dtype) -> str | None:
    """What the results of a case differ in from its model's, beyond rounding of ``dtype``."""
    results, expected = case.results(), model.results()
    dtype = case.rounding or dtype
    assert results.keys() == expected.keys()
    for name, value in results.items():
        said = distance(value, expected[name], dtype)
        if said is not None:
            return f"{name} {said}"
    return None


def distance(value: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """How far ``value`` is from ``expected``; None if within the tolerance of ``dtype``."""
    if value.shape != expected.shape:
        return f"is {list(value.shape)} instead of {list(expected.shape)}"
    if not value.is_floating_point():
        wrong = int((value != expected).sum())
        return f"differs in {wrong} of {value.numel()}" if wrong else None
    error = (value.float() - expected.float()).abs()
    # Places that nothing was written to say nothing of how large results are.
    written = expected[expected != 0].float()
    usual = written.square().mean().sqrt() if len(written) else 0.0
    allowed = TOLERANCE[dtype] * (usual + expected.float().abs())
    # Written so that NaN is wrong.
    wrong = int((~(error <= allowed)).sum())
    if not wrong:
        return None
    most = float(error.nan_to_num(nan=float("inf")).max())
    return f"differs in {wrong} of {value.numel()}, by up to {most:.3g}"


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
