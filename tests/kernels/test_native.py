"""Compiling the C kernels: once for a machine, and not at all where that is impossible."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from offramp.kernels import native
from offramp.kernels.native import compiled, library


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """`library` as in a process that has not asked yet, with an empty cache."""
    monkeypatch.setenv("OFFRAMP_CACHE_DIR", str(tmp_path))
    library.cache_clear()
    yield monkeypatch
    library.cache_clear()


def compiler() -> list[str]:
    found = native._compiler()
    if found is None:
        pytest.skip("no C compiler")
    return found


def test_a_second_call_takes_what_the_first_made(tmp_path: Path) -> None:
    made = compiled(compiler(), tmp_path)
    before = made.stat().st_mtime_ns
    assert compiled(compiler(), tmp_path) == made
    assert made.stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [made]


def test_another_processor_or_source_gets_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = compiled(compiler(), tmp_path)
    monkeypatch.setattr(native, "_processor", lambda: "another")
    second = compiled(compiler(), tmp_path)
    source = tmp_path / "decoder.c"
    source.write_text(native._SOURCE.read_text(encoding="utf-8") + "/* changed */\n")
    monkeypatch.setattr(native, "_SOURCE", source)
    assert len({first, second, compiled(compiler(), tmp_path)}) == 3


def test_without_a_compiler_there_are_no_kernels(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert library() is None
    assert "no C compiler" in caplog.text


def test_a_compiler_that_fails_is_told_and_leaves_nothing(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fresh.setenv("CC", "false")
    with caplog.at_level(logging.WARNING):
        assert library() is None
    assert "do not compile" in caplog.text
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_damaged_library_is_told(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    made = compiled(compiler(), tmp_path / "kernels")
    made.write_bytes(b"not a library")
    with caplog.at_level(logging.WARNING):
        assert library() is None
    assert made.name in caplog.text


def test_the_source_has_no_warnings(tmp_path: Path) -> None:
    words = [*compiler(), "-std=gnu11", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    for tuning in (native._tuning(), ["-O1"]):
        command = [*words, *tuning, "-c", str(native._SOURCE), "-o", str(tmp_path / "decoder.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
        assert done.returncode == 0, done.stderr


def test_structures_agree_with_the_source() -> None:
    """Sizes as the compiler has them; fields that change places would change results elsewhere."""
    assert shutil.which(compiler()[0])
    found = library()
    assert found is not None
    for kind in (native.Matrix, native.Layer, native.Shape, native.Batch, native.Scratch):
        assert found.size_of(kind) == ctypes.sizeof(kind)
