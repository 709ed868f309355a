"""The server under the drill: its processes, what they hold, and when it is at rest again."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests.drill.ledger import Ledger
from tests.server.process import ServerProcess, running

PATIENCE_S = 60.0
_LOOK_S = 0.05
# offramp serve, and the number of asyncio's tasks in its log on a signal.
_COUNTING = """
import asyncio, signal, sys
from offramp.server.cli import main
from offramp.server.serve import Service
run = Service.run
def tell():
    print("tasks", len(asyncio.all_tasks()), file=sys.stderr, flush=True)
async def counting(self):
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
    return await run(self)
Service.run = counting
sys.exit(main(sys.argv[1:]))
"""
# K,V for 5,240 tokens: less than 16 of the longest answers need.
_OPTIONS = (
    *("--max-num-seqs", "16", "--max-num-queued-reqs", "64", "--engine-restarts", "100"),
    *("--step-timeout", "2", "--exits", "shared:2", "--early-exit", "adaptive"),
    *("--kv-cache-memory", "0.002"),
)
_AT_REST = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting"),
    *("vllm:kv_cache_usage_perc", "offramp:kv_debt_tokens"),
)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the server's processes hold while nothing is asked of them."""

    descriptors: int
    engine_descriptors: int
    tasks: int
    memory_mib: float


class DrillServer:
    """A server of the tiny model in processes of its own."""

    def __init__(self, process: ServerProcess, url: str) -> None:
        self.process = process
        self.url = url
        self.client = httpx2.AsyncClient(
            base_url=url,
            timeout=PATIENCE_S,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        )

    @property
    def engine(self) -> int:
        """The engine's process."""
        return int(re.findall(r"engine runs in process (\d+)", self.process.log)[-1])

    def memory(self) -> float:
        """Resident MiB of both processes."""
        return _memory(self.process.pid) + _memory(self.engine)

    async def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        text = (await self.client.get("/metrics")).text
        found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def account(self, ledger: Ledger) -> None:
        """Each request of a phase has one line in the log, which says how it ended."""
        lines = (line for line in self.process.log.splitlines() if " finished=" in line)
        ends = Counter(line.split("offramp.requests: ")[1].split()[0] for line in lines)
        for request_id in ledger.ids:
            ledger.unless(ends[request_id] == 1, f"{request_id} ended {ends[request_id]} times")
        ledger.ids.clear()

    async def ready(self) -> None:
        """Wait until requests are taken."""
        await until(self._is_ready)

    async def at_rest(self, before: Holdings | None, ledger: Ledger) -> Holdings:
        """Wait until nothing runs; what is held then must be what was held ``before``."""
        await self.ready()
        try:
            await until(self._is_at_rest)
        except TimeoutError:
            state = {name: await self.metric(name) for name in _AT_REST}
            ledger.fault(f"the server did not come to rest: {state}")
        held = await self._holdings()
        if before is None:
            return held
        for name in ("descriptors", "engine_descriptors", "tasks"):
            more = getattr(held, name) - getattr(before, name)
            ledger.unless(more <= 0, f"{more} {name} more than before")
        return held

    async def _is_ready(self) -> bool:
        return (await self.client.get("/ready")).status_code == httpx2.codes.OK

    async def _is_at_rest(self) -> bool:
        if (await self.client.get("/load")).json()["server_load"]:
            return False
        return not any([await self.metric(name) for name in _AT_REST])

    async def _holdings(self) -> Holdings:
        # Connections that are being closed, and the engine's last output, need a moment.
        held = None
        for _ in range(20):
            await asyncio.sleep(_LOOK_S)
            now = Holdings(
                _descriptors(self.process.pid),
                _descriptors(self.engine),
                await self._tasks(),
                self.memory(),
            )
            if held is not None and (now.descriptors, now.tasks) == (held.descriptors, held.tasks):
                return now
            held = now
        assert held is not None
        return held

    async def _tasks(self) -> int:
        told = self.process.log.count("\ntasks ")
        self.process.signal(signal.SIGUSR1)

        async def answered() -> bool:
            return self.process.log.count("\ntasks ") > told

        await until(answered)
        return int(re.findall(r"\ntasks (\d+)", self.process.log)[-1])


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what becomes true in the server; raises TimeoutError."""
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():  # noqa: ASYNC110 (nothing tells when another process is there)
            await asyncio.sleep(_LOOK_S)


@asynccontextmanager
async def drill_server(**environ: str) -> AsyncIterator[DrillServer]:
    """A server that is ready."""
    with running("tiny", *_OPTIONS, code=_COUNTING, environ=environ) as process:
        url = await asyncio.to_thread(process.address)
        server = DrillServer(process, url)
        try:
            yield server
        finally:
            await server.client.aclose()


def _descriptors(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))  # noqa: PTH208 (counted, not walked)


def _memory(process: int) -> float:
    """Resident MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
