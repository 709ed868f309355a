"""One run: the check, the ceilings, the cases, the cuts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from offramp.server.bench.kernels.ceilings import Ceilings, measure_ceilings
from offramp.server.bench.kernels.check import check
from offramp.server.bench.kernels.cuts import compare_cuts
from offramp.server.bench.kernels.document import Report
from offramp.server.bench.kernels.ops import OPS
from offramp.server.bench.kernels.plan import Plan
from offramp.server.bench.kernels.roofline import measure_case

Say = Callable[[str], None]


def measure(plan: Plan, command: str, say: Say) -> Report:
    """Check all ops, then time them; raises Refused if one computes something else."""
    with torch.inference_mode():
        for name in plan.ops:
            say(f"checking {name}")
            for rows in plan.rows:
                check(name, OPS[name], plan.shape, rows)
        say("measuring the ceilings")
        ceilings = measure_ceilings(plan.shape.device, plan.shape.dtype, plan.seconds)
        cases, skipped = _cases(plan, ceilings, say)
        tiles = None
        if plan.tiles:
            tiles = [
                row
                for rows in plan.rows
                for row in compare_cuts(plan.setup, rows, plan.seconds, say)
            ]
    return Report(command, plan, ceilings, cases, tiles, skipped)


def _cases(
    plan: Plan, ceilings: Ceilings, say: Say
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Figures of all cases, and those that there is no memory for."""
    found: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for name in plan.ops:
        for rows in plan.rows:
            say(f"timing {name}, rows: {rows}")
            try:
                setup = plan.setup()
                found.extend(
                    measure_case(setup, case, ceilings, plan.seconds)
                    for case in OPS[name](setup, rows, rows)
                )
            except torch.OutOfMemoryError as error:
                why = str(error).partition("\n")[0]
                skipped.append({"op": name, "rows": rows, "why": why})
    return found, skipped
