"""Why there is nothing to report."""

from __future__ import annotations


class LoadError(Exception):
    """A server did not start, or a request of the load failed."""


class Refused(Exception):
    """The answers are not those of the model."""


class NotQuiet(Exception):
    """The machine was too busy to measure on."""
