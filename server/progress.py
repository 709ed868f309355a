"""How far something is: bars on a terminal, now and then a line in a log file.

Bars are the rich library's, which is imported for them alone: training runs on machines without it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[str, int, int, str], None]
"""Called with what is being done, steps done, steps in all and a remark (may be empty)."""

_SECONDS_A_LINE = 30.0


@contextmanager
def progress() -> Iterator[Show]:
    """Shows any number of things, each under its name, on stderr."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )

    names = TextColumn("{task.description}")
    columns = (names, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int, remark: str) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            told = f"{name} ({remark})" if remark else name
            bars.update(tasks[name], completed=done, total=total, description=told)

        yield show


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """The same for one thing; call it with steps done and steps in all."""
    with progress() as show:
        yield lambda done, total: show(what, done, total, "")


def _lines() -> Show:
    """Nothing for what is over soon, then a line every half a minute."""
    before = time.monotonic()

    def show(name: str, done: int, total: int, remark: str) -> None:
        nonlocal before
        now = time.monotonic()
        if now - before >= _SECONDS_A_LINE:
            before = now
            sys.stderr.write(f"{name}: {done} of {total}{remark and ', ' + remark}\n")
            sys.stderr.flush()

    return show
