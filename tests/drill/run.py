"""The fault drill: a server of the tiny model, and what may befall one, in a few minutes.

``python -m tests.drill.run`` goes through the phases with one server, prints how the requests of
each ended and what was wrong, and ends with status 1 where anything was. After each phase the
server must be at rest, holding no more than before. ``--soak SECONDS`` then loads a server for so
long and draws its memory.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.drill.ledger import Ledger
from tests.drill.phases import PHASES, Skipped
from tests.drill.server import Holdings, drill_server
from tests.drill.soak import soak


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests.drill.run", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES), metavar="PHASE")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="load a server for so long")
    parser.add_argument("--plot", type=Path, default=Path("soak.png"), help="memory over time")
    args = parser.parse_args(words)
    table = Table("phase", "s", "accepted", "ended", "what was seen", title="Fault drill")
    faults = asyncio.run(_drill(args.only, table))
    if args.soak:
        faults += asyncio.run(_soak(args.soak, args.plot, table))
    Console().print(table)
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


async def _drill(names: Sequence[str], table: Table) -> list[str]:
    faults: list[str] = []
    async with drill_server() as server:
        held = await server.at_rest(None, Ledger())
        first = held
        for name in names:
            ledger = Ledger()
            begun = time.monotonic()
            try:
                seen = await PHASES[name](server, ledger)
            except Skipped as reason:
                seen = f"not done: {reason}"
            except (TimeoutError, AssertionError) as error:
                seen = str(error) or "it took too long"
                ledger.fault(seen)
            held = await server.at_rest(first, ledger)
            server.account(ledger)
            ended = ", ".join(f"{count} {how}" for how, count in sorted(ledger.ended.items()))
            spent = f"{time.monotonic() - begun:.1f}"
            table.add_row(name, spent, str(ledger.accepted), ended, seen)
            faults += [f"{name}: {fault}" for fault in ledger.faults]
    more = held.memory_mib - first.memory_mib
    table.add_row("memory", "", "", "", f"{first.memory_mib:.0f} MiB, {more:+.0f} at the end")
    return faults


async def _soak(seconds: float, plot: Path, table: Table) -> list[str]:
    ledger = Ledger()
    async with drill_server() as server:
        before: Holdings = await server.at_rest(None, ledger)
        seen = await soak(server, ledger, seconds, plot)
        await server.at_rest(before, ledger)
    ended = ", ".join(f"{count} {how}" for how, count in sorted(ledger.ended.items()))
    table.add_row("soak", f"{seconds:.0f}", str(ledger.accepted), ended, seen)
    return [f"soak: {fault}" for fault in ledger.faults]


if __name__ == "__main__":
    sys.exit(main())
