"""How the C kernels of native/ become a library for this processor.

A wheel for a platform carries them compiled for the instruction sets of its architecture
(`VARIANTS`), of which the best that the processor has is taken. Elsewhere, as in a checkout, they
are compiled for this machine at the first use and kept. OFFRAMP_SIMD names another instruction set.
This module needs no torch, because building a wheel uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("offramp.kernels")

PREBUILT = Path(__file__).parent / "prebuilt"
"""Where a wheel has compiled variants, each named after its instruction set."""
_FOLDER = Path(__file__).parent / "native"
_SOURCE = "decoder.c"
_FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp", "-Wno-psabi")
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT_S = 120
_IDENTITY = ("model name", "flags", "Features", "CPU implementer", "CPU part")
# No process takes so long to make what it moves into place.
_LEFT_AFTER_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class Variant:
    """Kernels for processors that have the instructions ``needs``, as /proc/cpuinfo names them."""

    name: str
    march: str
    needs: frozenset[str]


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AMX = {"avx512_vnni", "avx512_fp16", "amx_bf16", "amx_int8"}
ARCHITECTURES = {
    "x86-64": (
        Variant("amx", "sapphirerapids", _AVX512 | _AMX),
        Variant("vnni", "cascadelake", _AVX512 | {"avx512_vnni"}),
        Variant("avx512", "skylake-avx512", _AVX512),
        Variant("avxvnni", "alderlake", _AVX2 | {"avx_vnni"}),
        Variant("avx2", "haswell", _AVX2),
        Variant("portable", "x86-64", frozenset()),
    ),
    "aarch64": (
        Variant("neon", "armv8.2-a+dotprod", frozenset({"asimddp"})),
        Variant("portable", "armv8-a", frozenset()),
    ),
}
"""The best first; the last runs on every processor of the architecture."""
_NAMES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}
ARCHITECTURE = _NAMES.get(platform.machine().lower(), platform.machine())
"""Of this machine."""
VARIANTS = ARCHITECTURES.get(ARCHITECTURE, ())
"""Those of this machine; none if its architecture is another."""


def candidates(folder: Path) -> Iterator[Path]:
    """Libraries that should work on this machine, the best first; they may fail to load.

    The last is compiled into ``folder`` unless it is there already. Raises OSError or
    SubprocessError, with a reason, where none can be had.
    """
    variant = _wished()
    prebuilt = _prebuilt(variant)
    if prebuilt is not None:
        logger.info("C kernels: prebuilt for %s", prebuilt.stem)
        yield prebuilt
    compiler = find_compiler()
    if compiler is None:
        raise OSError("no C compiler (CC, cc, gcc, clang)")
    yield compiled(compiler, folder, variant)


def at_hand(folder: Path) -> Path | None:
    """The first of `candidates` where that need not be compiled."""
    variant, compiler = _wished(), find_compiler()
    prebuilt = _prebuilt(variant)
    if prebuilt is not None or compiler is None:
        return prebuilt
    target = folder / _name(_command(compiler, variant))
    return target if target.exists() else None


def runs_here(variant: Variant) -> bool:
    """Whether this processor has the instructions of ``variant``."""
    return variant in VARIANTS and variant.needs <= _features()


def compiled(compiler: list[str], folder: Path, variant: Variant | None = None) -> Path:
    """The shared library in ``folder``, compiled unless it is there already.

    For this machine, or for ``variant``. Its name has a hash of all sources, the command and the
    processor. Raises OSError or SubprocessError.
    """
    words = _command(compiler, variant)
    target = folder / _name(words)
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    logger.info("compiling the C kernels for %s, once", variant.name if variant else "this machine")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch, target.name)
        # The compiler is the user's own, and no text of a request gets here.
        subprocess.run(  # noqa: S603
            [*words, str(_FOLDER / _SOURCE), "-o", str(made), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        # Two processes may compile at once; each renames a whole file.
        made.replace(target)
    return target


def remove_leftovers(folder: Path) -> None:
    """Remove what `tempfile` made in ``folder`` for processes that were killed a day ago."""
    oldest = time.time() - _LEFT_AFTER_S
    for path in folder.glob(f"{tempfile.gettempprefix()}*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path)


def find_compiler() -> list[str] | None:
    """Command of the C compiler: CC, or one of the usual names; None without one."""
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    return next(([name] for name in _COMPILERS if shutil.which(name)), None)


def cpuinfo(field: str) -> list[str]:
    """Values of a field of /proc/cpuinfo, one for each processor; empty where it is not known."""
    pairs = (line.partition(":") for line in _cpuinfo())
    return [value.strip() for name, _, value in pairs if name.strip() == field]


def _prebuilt(variant: Variant | None) -> Path | None:
    """The best library of a wheel for this processor, or the one of ``variant``."""
    for each in [variant] if variant else VARIANTS:
        path = PREBUILT / f"{each.name}.so"
        if each.needs <= _features() and path.exists():
            return path
    return None


def _command(compiler: list[str], variant: Variant | None) -> list[str]:
    return [*compiler, *_FLAGS, _tuning(variant), *shlex.split(os.environ.get("CFLAGS", ""))]


def _name(command: list[str]) -> str:
    """Name of the library that ``command`` makes of the sources on this processor."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(_FOLDER.glob("*.[ch]"))]
    identity = "\n".join([*sources, *command, _processor()])
    return f"decoder-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"


def _wished() -> Variant | None:
    """The variant that OFFRAMP_SIMD names; None, and a log line, if it cannot run here."""
    name = os.environ.get("OFFRAMP_SIMD", "")
    if not name:
        return None
    found = next((each for each in VARIANTS if each.name == name), None)
    if found is None:
        logger.warning("OFFRAMP_SIMD=%s is %s: the best for this machine", name, _strangeness(name))
        return None
    missing = ", ".join(sorted(found.needs - _features()))
    if missing:
        logger.warning(
            "OFFRAMP_SIMD=%s: this processor has no %s: the best for this machine", name, missing
        )
        return None
    return found


def _strangeness(name: str) -> str:
    """Why no variant of this machine is called ``name``."""
    homes = [
        architecture
        for architecture, variants in ARCHITECTURES.items()
        if any(each.name == name for each in variants)
    ]
    if homes:
        return f"for {' and '.join(homes)}, and this is {ARCHITECTURE}"
    known = VARIANTS or [each for variants in ARCHITECTURES.values() for each in variants]
    return "none of " + ", ".join(dict.fromkeys(each.name for each in known))


def _tuning(variant: Variant | None) -> str:
    if variant is not None:
        return f"-march={variant.march}"
    return "-mcpu=native" if ARCHITECTURE == "aarch64" else "-march=native"


def _features() -> frozenset[str]:
    """Instructions of this processor, as /proc/cpuinfo names them; none where that is not known."""
    if sys.platform == "darwin" and ARCHITECTURE == "aarch64":
        return frozenset({"asimddp"})  # every one that macOS runs on has it
    found = cpuinfo("flags") or cpuinfo("Features")
    return frozenset(found[0].split()) if found else frozenset()


def _processor() -> str:
    """What the compiled code depends on: the cache folder may be shared between machines."""
    kept = {f"{name}: {value}" for name in _IDENTITY for value in cpuinfo(name)}
    return "\n".join(sorted(kept)) or platform.machine() + platform.processor()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
