"""Why an engine bench cannot begin."""

from __future__ import annotations


class EngineBenchError(Exception):
    """What was asked for cannot be measured here; the message says what would work."""
