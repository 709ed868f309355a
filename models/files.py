"""Files that others wrote, read with bounds: no pipe is waited for, and no number is infinite."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any, NoReturn

SINGLE = "model.safetensors"
"""The weights of a model folder, where they are one file."""
LARGEST_JSON = 64 * 1024**2
"""Bytes; the index of a model of many hundred gigabytes takes a sixth."""
# Weight files name each tensor once, in about a hundred bytes; the format's own bound is 100 MB.
_LARGEST_HEADER = 16 * 1024**2
_LENGTH_BYTES = 8
_SHOWN = 60


def check_plain(path: Path) -> None:
    """Raise OSError for what is no file, or one that is not there: opening a pipe would wait."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is no plain file")


def check_safetensors(path: Path) -> None:
    """Raise OSError for no plain file, ValueError for a header that no file of weights has.

    What is inside the header the format's own library checks, which takes memory of several times
    its length.
    """
    check_plain(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    room = path.stat().st_size - _LENGTH_BYTES
    if length > min(room, _LARGEST_HEADER):
        raise ValueError(f"its header has {length} bytes, of {max(room, 0)} behind the length")


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises OSError, or ValueError for what is none."""
    check_plain(path)
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"it has more than {LARGEST_JSON} bytes")
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str, *, finite: bool = True) -> Any:
    """The value of a JSON text; raises ValueError for what is none.

    NaN and Infinity are none, unless numbers need not be ``finite``, nor is what is nested deeper
    than Python's stack.
    """
    try:
        return json.loads(text, parse_constant=_refuse if finite else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number, which true and false are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_whole(value: object, least: int, most: int) -> bool:
    """Whether a JSON value is a whole number from ``least`` to ``most``, written without a dot."""
    return type(value) is int and least <= value <= most


def shown(value: object) -> str:
    """A value of unknown length for a message of one line."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")
