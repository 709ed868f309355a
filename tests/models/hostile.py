"""A process that loads spoilt model folders, and what a test says of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# A whole second, and what a busy machine adds.
PATIENCE_S = 5.0


class Loader:
    """The process; an answer that does not come fails the test with what it said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def load(self, folder: Path, **options: Any) -> tuple[str, Any]:
        """What became of the folder: "refused" with a line, or "answered"."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        case = json.dumps({"folder": str(folder), "options": options})
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process ended with {self._process.wait()} over {folder}"
        answer = json.loads(line)
        assert answer["seconds"] < PATIENCE_S, answer
        if answer["kind"] == "refused":
            assert "\n" not in answer["value"]
        return answer["kind"], answer["value"]

    def refusal(self, folder: Path, **options: Any) -> str:
        """The line with which it must be refused."""
        kind, value = self.load(folder, **options)
        assert kind == "refused"
        return str(value)


@contextmanager
def loader() -> Iterator[Loader]:
    """A new process; it ends with the test."""
    words = [sys.executable, "-m", "tests.models.hostile_worker"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environ["OFFRAMP_LOG_LEVEL"] = "ERROR"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words, stdin=pipe, stdout=pipe, text=True, env=environ, cwd=ROOT
    ) as process:
        try:
            yield Loader(process)
        finally:
            process.kill()


def copy_of(folder: Path, target: Path) -> Path:
    """A folder to spoil."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return target
