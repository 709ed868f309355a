"""A server under a mixed load for long, and its memory over time."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

from tests.drill.ledger import Ledger, ask
from tests.drill.phases import body
from tests.drill.server import DrillServer

_CLIENTS = 16
_SAMPLES = 600
# Memory may still grow while caches fill.
_SETTLING = 0.25
_GROWTH = 0.1


async def soak(server: DrillServer, ledger: Ledger, seconds: float, plot: Path) -> str:
    """Load the server for so long; memory behind the first quarter may not grow by over a tenth."""
    end = time.monotonic() + seconds
    clients = [asyncio.create_task(_client(server, ledger, seed, end)) for seed in range(_CLIENTS)]
    samples: list[tuple[float, float]] = []
    while (left := end - time.monotonic()) > 0:
        samples.append((seconds - left, server.memory()))
        await asyncio.sleep(min(left, seconds / _SAMPLES))
    await asyncio.gather(*clients)
    ledger.only("finished", "left", "refused 429")
    _draw(samples, plot)
    settled = [memory for at, memory in samples if at > _SETTLING * seconds]
    growth = sum(settled[-20:]) / sum(settled[:20]) - 1
    ledger.unless(growth < _GROWTH, f"memory grew by {growth:.0%}")
    return f"{settled[-1]:.0f} MiB at the end, {growth:+.1%} behind the first quarter; {plot}"


async def _client(server: DrillServer, ledger: Ledger, seed: int, end: float) -> None:
    chance = random.Random(seed)
    while time.monotonic() < end:
        mode = chance.choice(["off", "adaptive", "lossless"])
        length = chance.choice([1, 10, 100, 1000])
        prompt = "".join(chance.choices("abcdefghij ", k=length))
        leave = chance.randrange(1, 40) if chance.random() < 0.2 else None
        wish = body(chance.choice([1, 20, 200]), mode, prompt)
        await ask(
            server.client,
            ledger,
            {**wish, "temperature": chance.choice([0, 0.8])},
            leave_after=leave,
        )


def _draw(samples: list[tuple[float, float]], path: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415 (an optional part of the installation)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 (as above)

    figure, axes = plt.subplots(figsize=(8, 3))
    axes.plot(*zip(*samples, strict=True), color="#333333")
    top = 1.1 * max(memory for _, memory in samples)
    axes.set(xlabel="seconds", ylabel="resident MiB, both processes", ylim=(0, top))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
