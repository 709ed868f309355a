"""``offramp serve`` as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue

ROOT = Path(__file__).parents[2]
START_S = 55.0
_MAIN = "import sys; from offramp.server.cli import main; sys.exit(main(sys.argv[1:]))"


class ServerProcess:
    """A started process and its log, read on a thread so that it never blocks the process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: Queue[str] = Queue()
        self.log = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait for a line of the log that has ``pattern``."""
        while True:
            try:
                line = self._lines.get(timeout=START_S)
            except Empty:
                raise AssertionError(f"no {pattern!r} in:\n{self.log}") from None
            found = re.search(pattern, line)
            if found is not None:
                return found

    def address(self) -> str:
        """Where the process serves, once it is ready."""
        return self.expect(r"ready on (http://\S+)")[1]

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def status(self) -> int:
        """Wait for the end of the process; returns its exit status."""
        code = self._process.wait(START_S)
        self._reader.join()
        return code

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log += line
            self._lines.put(line)


@contextmanager
def running(
    model: str = "tiny",
    *options: str,
    code: str = _MAIN,
    environ: Mapping[str, str] | None = None,
) -> Iterator[ServerProcess]:
    """A server of ``model`` on a free port; killed at the end if it still runs.

    ``code`` is what Python runs, if not the command.
    """
    words = [sys.executable, "-c", code, "serve", model, "--port", "0", *options]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environ or {})}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environ) as process:
        server = ServerProcess(process)
        try:
            yield server
        finally:
            process.kill()
            server.status()
