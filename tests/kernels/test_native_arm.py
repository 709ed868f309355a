"""The C kernels on ARM: compiled for it, run by an emulator, compared bit for bit.

`native_arm.c` prints results of products of every format and of a decoder layer. What an emulator
runs says nothing about speed.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from offramp.kernels import native_build
from offramp.kernels.native_build import ARCHITECTURES, Variant

COMPILER = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64"
SYSTEM = Path("/usr/aarch64-linux-gnu")
DRIVER = Path(__file__).with_name("native_arm.c")
FLAGS = [flag for flag in native_build._FLAGS if flag not in {"-shared", "-fPIC"}]
STRICT = ["-Wall", "-Wextra", "-Werror"]
# Products are not fused with sums, as on processors that cannot.
UNFUSED = ("-ffp-contract=off", "-O1")
WITH, WITHOUT = "max", "cortex-a53"
"""Processors with and without dot products."""

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR) and (SYSTEM / "include").is_dir()),
    reason="needs gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user",
)


def named(architecture: str, name: str) -> Variant:
    return next(variant for variant in ARCHITECTURES[architecture] if variant.name == name)


NEON, PORTABLE = ARCHITECTURES["aarch64"]


class Driver:
    """Builds of native_arm.c, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self.build = functools.cache(self._build)

    def on_arm(self, variant: Variant, processor: str, *flags: str) -> bytes:
        """What it prints on an ARM processor."""
        program = self.build(COMPILER, variant, *flags)
        return self.run([EMULATOR, "-L", str(SYSTEM), "-cpu", processor, program])

    def here(self, variant: Variant, *flags: str) -> bytes:
        """What it prints on this machine."""
        compiler = native_build.find_compiler()
        if compiler is None or native_build.ARCHITECTURE != "x86-64":
            pytest.skip("compares with x86-64")
        if not variant.needs <= native_build._features():
            pytest.skip(f"this processor lacks {variant.name}")
        return self.run([self.build(compiler[0], variant, *flags)])

    def run(self, command: list[str]) -> bytes:
        done = subprocess.run(command, capture_output=True, check=True, timeout=50)
        assert len(done.stdout) > 500_000
        return done.stdout

    def _build(self, compiler: str, variant: Variant, *flags: str) -> str:
        program = str(self._folder / str(next(self._numbers)))
        tuning = [f"-march={variant.march}", *flags]
        command = [compiler, *FLAGS, *STRICT, *tuning, "-I", str(native_build._FOLDER)]
        done = subprocess.run(
            [*command, str(DRIVER), "-o", program, "-lm"],
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )
        assert done.returncode == 0, done.stderr
        return program


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return Driver(tmp_path_factory.mktemp("driver"))


def test_the_library_is_compiled_without_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a wheel, down to what the linker makes of it."""
    monkeypatch.setenv("CFLAGS", " ".join(STRICT))
    made = native_build.compiled([COMPILER], tmp_path, NEON)
    machine = made.read_bytes()[18:20]
    assert int.from_bytes(machine, "little") == 183  # EM_AARCH64


def test_dot_products_change_no_bit(driver: Driver) -> None:
    """As compiled for a wheel."""
    assert driver.on_arm(NEON, WITH) == driver.on_arm(PORTABLE, WITHOUT)


def test_bits_are_those_of_x86(driver: Driver) -> None:
    """With fused products, of a processor with AVX2."""
    assert driver.on_arm(NEON, WITH) == driver.here(named("x86-64", "avx2"))


@pytest.mark.parametrize(
    ("variant", "processor"), [(NEON, WITH), (PORTABLE, WITHOUT)], ids=["neon", "portable"]
)
def test_bits_are_those_of_portable_x86(driver: Driver, variant: Variant, processor: str) -> None:
    """Which cannot fuse, so nobody may."""
    expected = driver.here(named("x86-64", "portable"), *UNFUSED)
    assert driver.on_arm(variant, processor, *UNFUSED) == expected


def test_the_variant_needs_dot_products(driver: Driver) -> None:
    """Else the other tests would compare the portable code with itself."""
    with pytest.raises(subprocess.CalledProcessError) as failed:
        driver.on_arm(NEON, WITHOUT)
    assert failed.value.returncode == -signal.SIGILL
