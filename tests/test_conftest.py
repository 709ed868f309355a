"""The guards that other tests rely on really guard."""

from __future__ import annotations

from pathlib import Path

import pytest
from blockbuster import BlockingError

from offramp.models.shapes import write_tiny


async def test_blocking_the_event_loop_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BlockingError):
        write_tiny(tmp_path)


def test_outside_the_event_loop_blocking_is_fine(tmp_path: Path) -> None:
    write_tiny(tmp_path)
