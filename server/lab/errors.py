"""The one error of this package."""

from __future__ import annotations


class LabError(Exception):
    """A calibration or evaluation that cannot be done as asked; the message says why."""
