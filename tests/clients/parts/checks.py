"""Checks of one client against a running server.

A part is a module of this folder. The client's own Python runs it as
``python -m tests.clients.parts.NAME``; it declares functions with ``check`` and ends with ``run``,
which writes one line of JSON for each to the file that RESULTS names. A check that all clients
share has the same name in all of them, so that the report can put them in one table.

The environment says where to look: BASE_URL (ends with /v1), MODEL, WORK (an empty folder), TOOLS
(the folder of the client's environment), MODEL_FOLDER and PYTHON (one with torch, transformers).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

BASE_URL = os.environ["BASE_URL"]
ORIGIN = BASE_URL.removesuffix("/v1")
MODEL = os.environ["MODEL"]
WORK = Path(os.environ["WORK"])
TOOLS = Path(os.environ["TOOLS"])
MODEL_FOLDER = Path(os.environ["MODEL_FOLDER"])
PYTHON = os.environ["PYTHON"]
RESULTS = Path(os.environ["RESULTS"])

PROMPT = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": PROMPT}]
MAX_TOKENS = 24
# A forced answer may not be cut.
FORCED_TOKENS = 200

CITIES = ("Paris", "Rome")
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": list(CITIES)},
        "days": {"type": "integer"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {
    "name": "get_forecast",
    "description": "Weather of a city for some days.",
    "parameters": PARAMETERS,
}
TOOL = {"type": "function", "function": FUNCTION}
TOOL_MESSAGES = [{"role": "user", "content": "How will the weather in Paris be for 3 days?"}]

_DETAIL_CHARS = 400

Check = Callable[[], str | None]


class Skipped(Exception):
    """What a check tests does not apply; the message says why."""


_checks: list[tuple[str, Check]] = []


def check(name: str) -> Callable[[Check], Check]:
    """Declare a check. It fails by raising, and may return a remark for the report."""

    def declare(function: Check) -> Check:
        _checks.append((name, function))
        return function

    return declare


def run() -> None:
    """Run all checks in the order they were declared."""
    for name, function in _checks:
        begun = time.monotonic()
        try:
            outcome, detail = "passed", function() or ""
        except Skipped as reason:
            outcome, detail = "skipped", str(reason)
        except Exception as fault:  # noqa: BLE001 (a client raises what it likes)
            outcome, detail = "failed", f"{type(fault).__name__}: {fault}"
        report(name, outcome, detail, time.monotonic() - begun)


def report(name: str, outcome: str, detail: str = "", seconds: float = 0.0) -> None:
    """Write a result; ``outcome`` is passed, failed, skipped, or score for a mere figure."""
    line = {
        "check": name,
        "outcome": outcome,
        "detail": " ".join(detail.split())[:_DETAIL_CHARS],
        "seconds": round(seconds, 2),
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def program(
    name: str, *words: str, timeout_s: float | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the client's environment in WORK, with ``environ`` set as well."""
    folders = (TOOLS / "bin", TOOLS / "node_modules" / ".bin")
    path = next(folder / name for folder in folders if (folder / name).exists())
    return subprocess.run(
        [str(path), *words],
        env={**os.environ, **environ},
        cwd=WORK,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def arguments(text: str | dict[str, object]) -> None:
    """Fail unless these are valid arguments of get_forecast."""
    found = json.loads(text) if isinstance(text, str) else text
    assert set(found) == {"city", "days"}, f"arguments {found}"
    assert found["city"] in CITIES, f"arguments {found}"
    assert isinstance(found["days"], int), f"arguments {found}"


def raises(
    expected: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]
) -> str:
    """Fail unless ``call`` raises ``expected``; returns what was raised."""
    try:
        call()
    except expected as fault:
        return f"{type(fault).__name__}: {fault}"
    raise AssertionError(f"nothing was raised, expected {expected}")
