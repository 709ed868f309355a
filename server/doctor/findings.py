"""What `offramp doctor` finds: a line for each thing it looked at, with what to do about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from offramp.models.errors import ModelError
from offramp.server.errors import EngineConfigError, OfframpError
from offramp.server.keys import ApiKeyError


class Level(StrEnum):
    """Whether something is as it should be, costs something, or keeps a server from starting."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line; ``advice`` is what to do about a warning or an error."""

    name: str
    text: str
    level: Level = Level.OK
    advice: str = ""


Check = Callable[[], Iterator[Finding]]

# What the server's own code raises where it would not start, or not work.
_EXPECTED = (ModelError, EngineConfigError, OfframpError, ApiKeyError, OSError)


def look(name: str, check: Check) -> list[Finding]:
    """All that ``check`` finds: an error it raises, and what it logs as a warning, are findings."""
    found: list[Finding] = []
    with _warnings() as logged:
        try:
            found += check()
        except _EXPECTED as error:
            found.append(Finding(name, " ".join(str(error).split()), Level.ERROR))
    found += (Finding(name, text, Level.WARNING) for text in dict.fromkeys(logged))
    return found


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(" ".join(record.getMessage().split()))


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the project's code logs inside as a warning, which then is not printed."""
    logger, collector = logging.getLogger("offramp"), _Collector()
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(collector)
    try:
        yield collector.texts
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagates
