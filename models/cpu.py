"""How a CPU is used: threads of a step, and memory that steps free.

A step computes with all threads, or with one while other processes use the machine. Threads of one
step wait for each other. As soon as another process holds a core, they wait for the scheduler's
next slice: with one busy neighbour on two cores a step of SmolLM2-135M takes 3.5 times as long on
two threads at one stream and 2.1 times at 16, but 1.8 and 1.6 times on one thread. A neighbour that
takes a third of a core costs two threads less than one thread would lose.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import time
from collections.abc import Callable

logger = logging.getLogger("offramp.threads")

# Share of the CPU time its threads could have had below which the machine counts as shared. Alone,
# they take 0.98 of it and more (waiting threads spin), beside a client that streams at one token a
# step 0.85, beside one busy process on two cores 0.6.
_SHARED = 0.75
# Looks are this long, and so many in a row must agree: a scheduler's slice must not decide alone.
_LOOK_S = 0.1
_LOOKS = 2
# While nothing is amiss every so many steps are looked at: the system takes 0.05 ms to add up the
# time of a process's threads, and a look asks four times.
_EVERY = 8
# The first rest on one thread, doubled each time the machine is still shared after it.
_REST_S = 0.5
_LONGEST_REST_S = 30.0
# The kind of clock that counts the time of a process's threads on all cores.
_CPU_CLOCK = 2
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# The largest glibc takes; above it, memory comes from the system and goes back to it.
_MMAP_BYTES = 32 << 20
_TRIM_BYTES = 256 << 20


class ThreadGovernor:
    """Watches steps and changes the number of threads through ``set_threads``.

    ``most`` is how many there may be; with one there is nothing to govern. What the process
    ``server`` uses, which speaks HTTP for this one, is not taken by others.
    """

    def __init__(
        self, most: int, set_threads: Callable[[int], None], server: int | None = None
    ) -> None:
        self.threads = most
        self._server = None if server is None else _clock_of(server)
        self._most = most
        self._set = set_threads
        self._steps = 0
        self._wall = 0.0
        self._cpu = 0.0
        self._rest = _REST_S
        self._poor = 0

    def cpu_seconds(self) -> float:
        """Time of all cores that this process has used, and its server."""
        own = time.process_time()
        if self._server is None:
            return own
        with contextlib.suppress(OSError):
            return own + time.clock_gettime(self._server)
        return own

    def looks(self) -> bool:
        """Whether the coming step is one to look at."""
        self._steps += 1
        doubtful = self._poor > 0 or self._rest > _REST_S
        return self.threads > 1 and (doubtful or self._steps % _EVERY == 0)

    def observe(self, wall: float, cpu: float | None) -> None:
        """A step took ``wall`` seconds; `cpu_seconds` grew by ``cpu``, if it was looked at."""
        if self._most == 1:
            return
        if self.threads == 1:
            self._wall += wall
            if self._wall >= self._rest:
                self._go(self._most)
        elif cpu is not None:
            self._wall += wall
            self._cpu += cpu
            if self._wall >= _LOOK_S:
                self._judge(self._cpu / (self._wall * self.threads))

    def _judge(self, share: float) -> None:
        if share >= _SHARED:
            self._rest = _REST_S
            self._poor = 0
        else:
            self._poor += 1
        self._wall = self._cpu = 0.0
        if self._poor < _LOOKS:
            return
        logger.info("others use the machine (%.0f %% of it is ours): one thread", 100 * share)
        self._go(1)

    def _go(self, threads: int) -> None:
        if threads > 1:
            self._rest = min(2 * self._rest, _LONGEST_REST_S)
        self.threads = threads
        self._poor = 0
        self._wall = self._cpu = 0.0
        self._set(threads)


def _clock_of(process: int) -> int | None:
    """The clock of the time that a process uses (clock_getcpuclockid on Linux)."""
    return (~process << 3) | _CPU_CLOCK if sys.platform.startswith("linux") else None


def keep_freed_memory() -> bool:
    """Let the C library keep what a step frees for the next step; False where it is not glibc.

    Its default returns tensors of over 128 KiB to the system at once, and each step then pays for
    fresh pages again: 5 % of a step of SmolLM2-135M.
    """
    library = _glibc()
    if library is None:
        return False
    return bool(
        library.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        and library.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
    )


def return_freed_memory() -> bool:
    """Give what is free now back to the system; False where there is no glibc to ask."""
    library = _glibc()
    if library is None:
        return False
    library.malloc_trim(0)
    return True


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
