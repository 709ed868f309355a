"""Compiling the C kernels: once for a machine, and not at all where that is impossible."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offramp.kernels import native, native_build, weight_formats
from offramp.kernels import native_structures as structures
from offramp.kernels.linear import Linear
from offramp.kernels.lm_head import HeadScreen, NativeHead
from offramp.kernels.native import library
from offramp.kernels.native_build import VARIANTS, Variant, compiled
from offramp.kernels.weight_formats import GROUP, NativeWeight
from tests.kernels.test_weight_formats import MAKE, NATIVE


@pytest.fixture
def unoptimized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that are compiled in a tenth of the time, to be found or named, not run."""
    monkeypatch.setenv("CFLAGS", "-O0")


@pytest.fixture
def fresh(
    unoptimized: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[pytest.MonkeyPatch]:
    """`library` as in a process that has not asked yet, with an empty cache and no wish."""
    monkeypatch.setenv("OFFRAMP_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("OFFRAMP_SIMD", raising=False)
    library.cache_clear()
    yield monkeypatch
    library.cache_clear()


def compiler() -> list[str]:
    found = native_build.find_compiler()
    if found is None:
        pytest.skip("no C compiler")
    return found


@pytest.mark.usefixtures("unoptimized")
def test_a_second_call_takes_what_the_first_made(tmp_path: Path) -> None:
    made = compiled(compiler(), tmp_path)
    before = made.stat().st_mtime_ns
    assert compiled(compiler(), tmp_path) == made
    assert made.stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [made]


@pytest.mark.usefixtures("unoptimized")
def test_another_processor_or_source_gets_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = compiled(compiler(), tmp_path)
    monkeypatch.setattr(native_build, "_processor", lambda: "another")
    second = compiled(compiler(), tmp_path)
    made = {first, second}
    for number, name in enumerate(("decoder.c", "matmul.h")):
        sources = tmp_path / str(number)
        shutil.copytree(native_build._FOLDER, sources)
        with (sources / name).open("a", encoding="utf-8") as source:
            source.write("/* changed */\n")
        monkeypatch.setattr(native_build, "_FOLDER", sources)
        made.add(compiled(compiler(), tmp_path))
    assert len(made) == 4


@pytest.mark.usefixtures("unoptimized")
def test_what_a_killed_compile_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, new, other = tmp_path / "tmpold", tmp_path / "tmpnew", tmp_path / "kept"
    past = time.time() - 25 * 3600
    for path in (old, new, other):
        path.mkdir()
        (path / "decoder.so").write_bytes(b"half")
        if path is not new:
            os.utime(path, (past, past))
    made = compiled(compiler(), tmp_path)
    assert set(tmp_path.iterdir()) == {made, new, other}


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
    assert "no C kernels" in caplog.text
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_damaged_library_is_told(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    made = compiled(compiler(), tmp_path / "kernels")
    made.write_bytes(b"not a library")
    with caplog.at_level(logging.WARNING):
        assert library() is None
    assert made.name in caplog.text


@pytest.fixture(scope="module")
def portable_and_avx2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if native_build.ARCHITECTURE != "x86-64":
        pytest.skip("not this kind of processor")
    folder = tmp_path_factory.mktemp("variants")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFLAGS", "-O0")
        for name in ("portable", "avx2"):
            compiled(compiler(), folder, named(name)).rename(folder / f"{name}.so")
    return folder


@pytest.fixture
def prebuilt(fresh: pytest.MonkeyPatch, portable_and_avx2: Path, tmp_path: Path) -> Path:
    """A folder as in a wheel for x86-64, and no compiler."""
    folder = tmp_path / "prebuilt"
    shutil.copytree(portable_and_avx2, folder)
    fresh.setattr(native_build, "PREBUILT", folder)
    fresh.setenv("CC", "no-such-compiler")
    return folder


def named(name: str) -> Variant:
    return next(variant for variant in VARIANTS if variant.name == name)


def test_a_prebuilt_library_needs_no_compiler(
    prebuilt: Path, fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The best that the processor has; without AVX2 the portable one."""
    with caplog.at_level(logging.INFO):
        assert library() is not None
    best = "avx2" if named("avx2").needs <= native_build._features() else "portable"
    assert f"prebuilt for {best}" in caplog.text
    library.cache_clear()
    fresh.setattr(native_build, "_features", frozenset)
    with caplog.at_level(logging.INFO):
        assert library() is not None
    assert "prebuilt for portable" in caplog.text


def test_a_prebuilt_library_of_another_machine_is_not_the_end(
    prebuilt: Path, fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for path in prebuilt.iterdir():
        path.write_bytes(b"\x7fELF of another machine")
    fresh.delenv("CC")
    with caplog.at_level(logging.WARNING):
        assert library() is not None
    assert "do not load" in caplog.text


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("avx3", "is none of amx, vnni"),
        ("neon", "is for aarch64, and this is x86-64: the best for this machine"),
        ("amx", "this processor has no amx_bf16"),
        ("portable", ""),
    ],
)
def test_a_wished_instruction_set_is_taken_or_told(
    prebuilt: Path,
    fresh: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wish: str,
    said: str,
) -> None:
    lacking = native_build._features() - {"amx_bf16"}
    fresh.setattr(native_build, "_features", lambda: lacking)
    fresh.setenv("OFFRAMP_SIMD", wish)
    with caplog.at_level(logging.INFO):
        assert library() is not None
    assert said in caplog.text
    assert ("prebuilt for portable" in caplog.text) == (wish == "portable")


@pytest.fixture
def on_arm(fresh: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As on ARM, a folder as in a wheel for it, and no compiler; nothing can be loaded."""
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    for variant in native_build.ARCHITECTURES["aarch64"]:
        (folder / f"{variant.name}.so").touch()
    fresh.setattr(native_build, "ARCHITECTURE", "aarch64")
    fresh.setattr(native_build, "VARIANTS", native_build.ARCHITECTURES["aarch64"])
    fresh.setattr(native_build, "PREBUILT", folder)
    fresh.setenv("CC", "no-such-compiler")
    return folder


@pytest.mark.parametrize(
    ("features", "wish", "taken", "said"),
    [
        ("fp asimd crc32 asimddp", "", "neon", ""),
        ("fp asimd crc32", "", "portable", ""),
        ("fp asimd asimddp", "portable", "portable", ""),
        ("fp asimd", "neon", "portable", "this processor has no asimddp"),
        ("fp asimd asimddp", "avx2", "neon", "avx2 is for x86-64, and this is aarch64"),
        ("fp asimd asimddp", "avx3", "neon", "is none of neon, portable"),
    ],
)
def test_on_arm_dot_products_are_taken_where_they_are(
    on_arm: Path,
    fresh: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    features: str,
    wish: str,
    taken: str,
    said: str,
) -> None:
    cpuinfo = ["processor\t: 0", f"Features\t: {features}", "CPU part\t: 0xd0c"]
    fresh.setattr(native_build, "_cpuinfo", lambda: cpuinfo)
    fresh.setenv("OFFRAMP_SIMD", wish)
    assert next(native_build.candidates(on_arm)) == on_arm / f"{taken}.so"
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)
    before = native_build._processor()
    cpuinfo[-1] = "CPU part\t: 0xd40"
    assert native_build._processor() != before


def test_an_instruction_set_on_an_architecture_without_any_is_told(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fresh.setattr(native_build, "ARCHITECTURE", "riscv64")
    fresh.setattr(native_build, "VARIANTS", ())
    for wish, said in (
        ("portable", "is for x86-64 and aarch64, and this is riscv64"),
        ("rvv", "is none of amx, vnni, avx512, avxvnni, avx2, portable, neon"),
    ):
        fresh.setenv("OFFRAMP_SIMD", wish)
        compiled_here = next(native_build.candidates(tmp_path))
        assert compiled_here.exists()
        assert said in caplog.text


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_instruction_set_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variant: Variant
) -> None:
    """As far as this processor can run them.

    Integer products are the same bit for bit wherever there is a fused multiply-add.
    """
    fused = native_build.ARCHITECTURE == "aarch64" or "fma" in variant.needs
    if library() is None:
        pytest.skip("no C kernels on this machine")
    if not variant.needs <= native_build._features():
        pytest.skip("this processor lacks these instructions")
    weights = {form: MAKE.get(form, torch.randn)(77, 96).half().float() for form in NATIVE}
    weights |= {form: make(77, 96) for form, make in MAKE.items()}
    x = {rows: torch.randn(rows, 96) for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 40, 141)}
    for states in x.values():
        states[::3, 7] *= 20
    # Of mixed inputs most rows are coarse.
    some = {rows: torch.arange(rows) % 4 != 1 for rows in x}
    expected = {
        (form, mixed, rows): NativeWeight(weight, None, form)(
            x[rows], some[rows] if mixed else None
        )
        for form, weight in weights.items()
        for mixed in (False, True)
        for rows in x
    }
    other = native.Library(compiled(compiler(), tmp_path, variant))
    assert other.has_amx == (variant.name == "amx")
    monkeypatch.setattr(weight_formats, "library", lambda: other)
    for form in MAKE:
        weight = Linear(weights[form], None, (form,))
        head = NativeHead(other, torch.ones(96), weight, 1e-5)
        screen = HeadScreen.by_inputs(weight)
        assert screen is not None
        for rows, states in x.items():
            found, _ = head.screened(states, range(rows), screen)
            assert found == head(states, range(rows))[1]
    for (form, mixed, rows), right in expected.items():
        got = NativeWeight(weights[form], None, form)(x[rows], some[rows] if mixed else None)
        torch.testing.assert_close(got, right, rtol=0, atol=1e-4 * float(right.abs().max()))
        if form in MAKE and fused:
            assert got.equal(right)


@pytest.mark.parametrize("columns", [32, 64, 576])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32])
def test_inputs_in_fixed_point_fit_their_scratch_memory(rows: int, columns: int) -> None:
    found = library()
    assert found is not None
    numbers = -(-4 * (columns // 32) // 16) * 16
    needed = (rows | 1) * columns // 2 + rows * numbers
    assert found._function("prepared_floats")(rows, columns) >= needed


def test_the_source_has_no_warnings(tmp_path: Path) -> None:
    words = [*compiler(), "-std=gnu11", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    for tuning in {native_build._tuning(each) for each in (None, *VARIANTS[-1:])}:
        source = native_build._FOLDER / native_build._SOURCE
        command = [*words, tuning, "-c", str(source), "-o", str(tmp_path / "decoder.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
        assert done.returncode == 0, done.stderr


def test_structures_agree_with_the_source() -> None:
    """Sizes as the compiler has them; fields that change places would change results elsewhere."""
    assert shutil.which(compiler()[0])
    found = library()
    assert found is not None
    for kind in (
        structures.Matrix,
        structures.Layer,
        structures.Shape,
        structures.Batch,
        structures.Workspace,
    ):
        assert found.constant(f"struct {kind.__name__.lower()}") == ctypes.sizeof(kind)
    assert found.constant("struct screen") == ctypes.sizeof(structures.Screen)
    assert found.constant("struct choice") == ctypes.sizeof(structures.Choice)
    assert found.constant("struct sampling") == ctypes.sizeof(structures.Sampling)
    assert found.constant("struct lm_head") == ctypes.sizeof(structures.HeadWeights)
    assert found.constant("struct head_rows") == ctypes.sizeof(structures.HeadCall)
    assert found.constant("struct draft") == ctypes.sizeof(structures.DraftCall)
    # Five numbers of 64 bits, as `NativeDraft` writes them.
    assert found.constant("struct draft_span") == 5 * 8
    assert found.constant("struct draft_head") == ctypes.sizeof(structures.DraftHeadWeights)
    # A cache line each, so that threads in neighbouring phases do not slow each other down.
    assert found.constant("struct phase") == 64
    assert found.constant("GROUP") == GROUP


def test_a_constant_that_is_not_there_is_refused() -> None:
    found = library()
    if found is None:
        pytest.skip("no C compiler")
    with pytest.raises(KeyError, match="NO_SUCH"):
        found.constant("NO_SUCH")
