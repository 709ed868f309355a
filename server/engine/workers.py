"""Where an engine runs: on a thread of the server, or in a process of its own.

A process keeps the event loop free of the engine's Python, can be killed when it hangs, and takes
nothing with it when it crashes. A thread is easier to look into.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from offramp.server.engine.frames import Beat, Ending, FrameReader, RequestWriter, frame
from offramp.server.engine.loop import EngineInput, EngineLoop, EngineProtocol, Report
from offramp.server.errors import EngineConfigError

logger = logging.getLogger("offramp.engine")

Build = Callable[[], EngineProtocol]

_CHILD = "offramp.server.engine.engine_process"
# How often a thread of GNU's OpenMP looks whether there is work, or whether the others are done,
# before it sleeps: 0.2 ms in place of several. A thread that wakes on the core of one that spins
# waits as long, which after a pause made one first token in ten take twice as long.
_OPENMP = {"GOMP_SPINCOUNT": "10000"}
# Without reports for so long a process counts as stuck; it says that it lives four times a second.
_SILENCE_S = 1.0
# What one read from a process brings at most.
_READ_BYTES = 1 << 16


class EngineDied(Exception):
    """The engine has ended by itself; the message says why."""


class Worker(Protocol):
    """Runs one engine, once."""

    def run(self) -> AsyncGenerator[Report, None]:
        """Build the engine and run it: its facts, then outputs, until `stop`.

        Raises EngineConfigError where it cannot be built as configured, and EngineDied where it
        fails or is killed.
        """
        ...

    def post(self, item: EngineInput) -> None:
        """Hand over a request or an abort."""
        ...

    def stop(self) -> None:
        """End after the step in flight."""
        ...

    def kill(self, reason: str) -> bool:
        """End at once, with ``reason`` for EngineDied; False where that is not possible."""
        ...

    @property
    def stuck_for(self) -> float:
        """Seconds for which nothing has come of the step under way; 0 while there is none."""
        ...


class ThreadWorker:
    """An engine on a thread of this process. ``build`` makes it, on that thread."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._loop = EngineLoop(self._send)
        self._reports: asyncio.Queue[Report | _End] = asyncio.Queue()
        self._events: asyncio.AbstractEventLoop | None = None

    async def run(self) -> AsyncGenerator[Report, None]:
        """See Worker."""
        self._events = asyncio.get_running_loop()
        threading.Thread(target=self._work, name="offramp-engine", daemon=True).start()
        while True:
            report = await self._reports.get()
            if isinstance(report, _End):
                break
            yield report
        if isinstance(report.error, EngineConfigError):
            raise report.error
        if report.error is not None:
            raise EngineDied(f"{type(report.error).__name__}: {report.error}") from report.error

    def post(self, item: EngineInput) -> None:
        """See Worker."""
        self._loop.post(item)

    def stop(self) -> None:
        """See Worker."""
        self._loop.stop()

    def kill(self, reason: str) -> bool:  # noqa: ARG002
        """A thread cannot be ended."""
        return False

    @property
    def stuck_for(self) -> float:
        """See Worker."""
        return self._loop.stuck_for

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            self._loop.run(self._build)
        except BaseException as raised:  # noqa: BLE001 (whatever it is, the requests have to end)
            error = raised
            # What was loaded was kept from the garbage collector, which now has to find it.
            gc.unfreeze()
            gc.collect()
        self._send(_End(error))

    def _send(self, report: Report | _End) -> None:
        assert self._events is not None
        # An event loop that is closed, maybe this moment, refuses: nobody is left to tell.
        with suppress(RuntimeError):
            self._events.call_soon_threadsafe(self._reports.put_nowait, report)


class ProcessWorker:
    """An engine in a process of its own, which ends with this one, however that ends.

    ``build`` makes the engine there: it must be picklable.
    """

    def __init__(self, build: Build) -> None:
        self._build = build
        self._requests = RequestWriter()
        self._process: Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._killed: str | None = None
        self._stopped = False
        self._beat = Beat(0.0)
        self._ending: Ending | None = None
        self._heard = 0.0

    async def run(self) -> AsyncGenerator[Report, None]:
        """See Worker."""
        reader = await self._start()
        frames = FrameReader()
        status: int | None = None
        try:
            with suppress(ConnectionError):
                while data := await reader.read(_READ_BYTES):
                    self._heard = time.monotonic()
                    for report in map(self._take, frames.feed(data)):
                        if report is not None:
                            yield report
            # The process has ended, maybe within a frame.
            status = await self._end()
        except Exception as error:
            raise EngineDied(f"the engine's process wrote nonsense: {error}") from error
        finally:
            if status is None:
                await self._end(kill=True)
        if self._killed is not None:
            raise EngineDied(self._killed)
        if self._ending is not None:
            kind = EngineConfigError if self._ending.misconfigured else EngineDied
            raise kind(self._ending.message)
        if not self._stopped:
            raise EngineDied(f"the engine's process ended {_how(status)}")

    def post(self, item: EngineInput) -> None:
        """See Worker."""
        self._write(self._requests.frame(item))

    def stop(self) -> None:
        """See Worker."""
        self._stopped = True
        self._write(frame(None))

    def kill(self, reason: str) -> bool:
        """See Worker."""
        self._killed = reason
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
        return True

    @property
    def stuck_for(self) -> float:
        """See Worker. A process that has stopped talking counts as one that is in a step."""
        silent = time.monotonic() - self._heard
        return self._beat.stuck_for + (silent if silent > _SILENCE_S else 0.0)

    def _take(self, message: Any) -> Report | None:
        """Note what the process says of itself; what its engine reports is returned."""
        if isinstance(message, Beat):
            self._beat = message
        elif isinstance(message, Ending):
            self._ending = message
        else:
            report: Report = message
            return report
        return None

    async def _start(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        # The paths of this program, and none of the folder it was started in.
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        with theirs:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", _CHILD, str(theirs.fileno())),
                    stdin=DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    # Ctrl-C is for the server alone, also while Python starts here.
                    start_new_session=True,
                    env={**_OPENMP, **os.environ, "PYTHONPATH": paths},
                )
            except OSError as error:
                # Neither processes nor memory are without end.
                ours.close()
                raise EngineDied(f"no process can be started for the engine: {error}") from error
        logger.info("the engine runs in process %d", self._process.pid)
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        self._write(frame((self._build, logging.getLogger("offramp").level)))
        self._heard = time.monotonic()
        if self._killed is not None:
            self.kill(self._killed)
        elif self._stopped:
            self.stop()
        return reader

    async def _end(self, *, kill: bool = False) -> int:
        """Wait until the process is gone, and see to it; its exit status."""
        assert self._process is not None
        assert self._writer is not None
        self._writer.close()
        if not kill:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SILENCE_S):
                    return await self._process.wait()
        with suppress(ProcessLookupError):
            self._process.kill()
        return await self._process.wait()

    def _write(self, data: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(data)


class _End:
    """The engine's thread is done, because of ``error`` if there is one."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _how(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"by {name}{hint}"
