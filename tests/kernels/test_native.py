"""Compiling the C kernels: once for a machine, and not at all where that is impossible."""

from __future__ import annotations

import ctypes
import logging
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offramp.kernels import native, weight_formats
from offramp.kernels.native import compiled, library
from offramp.kernels.weight_formats import GROUP, pack
from tests.kernels.test_weight_formats import MAKE, NATIVE


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
    made = {first, second}
    for number, name in enumerate(("decoder.c", "matmul.h")):
        sources = tmp_path / str(number)
        shutil.copytree(native._FOLDER, sources)
        with (sources / name).open("a", encoding="utf-8") as source:
            source.write("/* changed */\n")
        monkeypatch.setattr(native, "_FOLDER", sources)
        made.add(compiled(compiler(), tmp_path))
    assert len(made) == 4


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


@pytest.mark.parametrize("tuning", ["-march=haswell", "-march=x86-64-v2", "-march=skylake-avx512"])
def test_older_processors_compute_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tuning: str
) -> None:
    """Code for a processor without this one's instructions, as far as this one can run it.

    Integer products are the same bit for bit wherever there is a fused multiply-add.
    """
    if "x86" not in platform.machine() or library() is None:
        pytest.skip("not this kind of processor")
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    if "avx512" in tuning and "avx512vl" not in flags:
        pytest.skip("this processor lacks these instructions")
    weights = {form: MAKE.get(form, torch.randn)(77, 96).half().float() for form in NATIVE}
    weights |= {form: make(77, 96) for form, make in MAKE.items()}
    x = {rows: torch.randn(rows, 96) for rows in (1, 5, 40)}
    expected = {
        (form, rows): pack(weight, None, form)(x[rows])
        for form, weight in weights.items()
        for rows in x
    }
    monkeypatch.setattr(native, "_tuning", lambda: [tuning])
    older = native.Library(compiled(compiler(), tmp_path))
    assert not older.has_amx
    monkeypatch.setattr(weight_formats, "library", lambda: older)
    for (form, rows), right in expected.items():
        got = pack(weights[form], None, form)(x[rows])
        torch.testing.assert_close(got, right, rtol=0, atol=1e-4 * float(right.abs().max()))
        if form in MAKE and "v2" not in tuning:
            assert got.equal(right)


def test_the_source_has_no_warnings(tmp_path: Path) -> None:
    words = [*compiler(), "-std=gnu11", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    for tuning in (native._tuning(), ["-march=x86-64-v2"]):
        source = native._FOLDER / native._SOURCE
        command = [*words, *tuning, "-c", str(source), "-o", str(tmp_path / "decoder.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
        assert done.returncode == 0, done.stderr


def test_structures_agree_with_the_source() -> None:
    """Sizes as the compiler has them; fields that change places would change results elsewhere."""
    assert shutil.which(compiler()[0])
    found = library()
    assert found is not None
    for kind in (native.Matrix, native.Layer, native.Shape, native.Batch, native.Workspace):
        assert found.constant(f"struct {kind.__name__.lower()}") == ctypes.sizeof(kind)
    # A cache line each, so that threads in neighbouring phases do not slow each other down.
    assert found.constant("struct phase") == 64
    assert found.constant("GROUP") == GROUP


def test_a_constant_that_is_not_there_is_refused() -> None:
    found = library()
    if found is None:
        pytest.skip("no C compiler")
    with pytest.raises(KeyError, match="NO_SUCH"):
        found.constant("NO_SUCH")
