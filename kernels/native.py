"""The C kernels of native/decoder.c: compiled for this machine when first asked for, then kept.

Called through ctypes, which lets other Python threads run meanwhile. Where there is no C compiler
there are no such kernels, and torch's operators serve.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from offramp.paths import cache_folder

logger = logging.getLogger("offramp.kernels")

_SOURCE = Path(__file__).parent / "native" / "decoder.c"
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT_S = 120
# Rows of weights and of inputs that the source unpacks at a time (its UNIT_OUTS, UNIT_ROWS).
_PANEL_ROWS = 32
_SET_ROWS = 16
_TILE_ROWS = 4
_LAYER_PHASES, _PRODUCT_PHASES = 12, 2


class Matrix(ctypes.Structure):
    """A weight [outs, columns] in a form of the source, with its bias or NULL."""

    _fields_: ClassVar = [
        ("form", c_int32),
        ("outs", c_int32),
        ("columns", c_int32),
        ("data", c_void_p),
        ("bias", c_void_p),
    ]


class Layer(ctypes.Structure):
    """Weights of a decoder layer; ``index`` is its place among the layers of the K,V pages."""

    _fields_: ClassVar = [
        ("attn_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", Matrix),
        ("o", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("index", c_int64),
    ]


class Shape(ctypes.Structure):
    """Sizes that all layers share; ``window`` 0 stands for full attention."""

    _fields_: ClassVar = [
        ("width", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("inner", c_int32),
        ("window", c_int32),
        ("eps", c_float),
    ]


class Batch(ctypes.Structure):
    """Where the rows of a forward pass stand, and the pages they read and write."""

    _fields_: ClassVar = [
        ("rows", c_int32),
        ("block_size", c_int32),
        ("longest", c_int32),
        ("pages", c_void_p),
        ("page_size", c_int64),
        ("places", c_void_p),
        ("positions", c_void_p),
        ("first_blocks", c_void_p),
        ("blocks", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
    ]


Phase = c_int32 * 16
"""A step of a call that all threads share."""
PARTS = ("norms", "q, k, v", "positions", "attention", "attention output", "gate, up", "down")
"""What the time of layers is told apart by."""
_STRUCTURES = (Matrix, Layer, Shape, Batch, Phase)


class Library:
    """The compiled kernels; tensors are fp32 and contiguous on the CPU."""

    def __init__(self, path: Path) -> None:
        functions = ctypes.CDLL(str(path))
        self._size_of = functions.offramp_size_of
        self._product = functions.offramp_product
        self._rows = functions.offramp_rows
        self._run_layers = functions.offramp_run_layers
        for function in (self._product, self._rows, self._run_layers):
            function.restype = None
        self.has_matrix_unit = bool(functions.offramp_start())
        self._clock: ctypes.Array[c_int64] | None = None

    def size_of(self, kind: type[ctypes.Structure | ctypes.Array[c_int32]]) -> int:
        """Bytes of a structure as the compiler laid it out."""
        return int(self._size_of(_STRUCTURES.index(kind)))

    @contextmanager
    def timing(self) -> Iterator[dict[str, float]]:
        """Seconds of PARTS spent inside, filled in at the end."""
        self._clock = (c_int64 * len(PARTS))()
        spent: dict[str, float] = {}
        try:
            yield spent
        finally:
            spent.update(zip(PARTS, (each / 1e9 for each in self._clock), strict=True))
            self._clock = None

    def product(self, matrix: Matrix, x: Tensor) -> Tensor:
        """``x`` [n, columns] times the matrix transposed, plus its bias: [n, outs]."""
        threads = torch.get_num_threads()
        out = torch.empty(x.shape[0], matrix.outs)
        halves = _halves(x.shape[0], matrix.columns)
        phases = (Phase * _PRODUCT_PHASES)()
        own = torch.empty(threads, _panel(matrix.columns))
        self._product(
            ctypes.byref(matrix),
            c_void_p(x.data_ptr()),
            c_void_p(out.data_ptr()),
            x.shape[0],
            c_void_p(halves.data_ptr()),
            phases,
            c_void_p(own.data_ptr()),
            c_int64(own.shape[1]),
            threads,
        )
        return out

    def rows(self, matrix: Matrix, ids: Tensor) -> Tensor:
        """Rows ``ids`` [n] (int64) of the matrix as fp32 [n, columns]."""
        out = torch.empty(ids.shape[0], matrix.columns)
        room = torch.empty(_scale_room(matrix.columns))
        self._rows(
            ctypes.byref(matrix),
            c_void_p(ids.data_ptr()),
            ids.shape[0],
            c_void_p(out.data_ptr()),
            c_void_p(room.data_ptr()),
        )
        return out

    def run_layers(
        self, shape: Shape, layers: ctypes.Array[Layer], batch: Batch, hidden: Tensor
    ) -> None:
        """Advance ``hidden`` [T, width] through ``layers``, in place."""
        threads = torch.get_num_threads()
        queries = shape.heads * shape.head_dim
        qkv = queries + 2 * shape.kv_heads * shape.head_dim
        widest = max(shape.width, queries, shape.inner)
        panel = _panel(widest)
        group = shape.heads // shape.kv_heads
        # Scores are written 16 at a time.
        own_size = panel + group * (batch.longest + 16)
        normed = torch.empty(batch.rows, max(shape.width, queries))
        wide = torch.empty(batch.rows, max(qkv, 2 * shape.inner))
        halves = _halves(batch.rows, widest)
        own = torch.empty(threads, own_size)
        phases = (Phase * (_LAYER_PHASES * len(layers)))()
        self._run_layers(
            ctypes.byref(shape),
            layers,
            len(layers),
            ctypes.byref(batch),
            c_void_p(hidden.data_ptr()),
            c_void_p(normed.data_ptr()),
            c_void_p(wide.data_ptr()),
            c_void_p(halves.data_ptr()),
            phases,
            c_void_p(own.data_ptr()),
            c_int64(panel),
            c_int64(own_size),
            threads,
            self._clock,
        )


def _panel(columns: int) -> int:
    """Floats a thread unpacks weights into, with their scales."""
    return _PANEL_ROWS * columns + _TILE_ROWS * _scale_room(columns)


def _scale_room(columns: int) -> int:
    """Floats for the scales of a row, which are written 16 at a time."""
    return 2 * (columns // 32 + 16)


def _halves(rows: int, columns: int) -> Tensor:
    """Room for inputs as the matrix unit takes them."""
    return torch.empty(-(-rows // _SET_ROWS) * _SET_ROWS, columns)


@functools.cache
def library() -> Library | None:
    """The kernels, compiled if need be; None, and a log line that says why, if they cannot be."""
    compiler = _compiler()
    if compiler is None:
        logger.warning("no C compiler (CC, cc, gcc, clang): torch's operators serve, more slowly")
        return None
    try:
        return Library(compiled(compiler, cache_folder() / "kernels"))
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        logger.warning("C kernels do not compile, torch's operators serve: %s", told.strip())
        return None


def compiled(compiler: list[str], folder: Path) -> Path:
    """The shared library in ``folder``, made unless this machine made it before.

    Raises OSError or SubprocessError.
    """
    flags = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp", "-Wno-psabi", *_tuning()]
    words = [*compiler, *flags, *shlex.split(os.environ.get("CFLAGS", ""))]
    identity = "\n".join([_SOURCE.read_text(encoding="utf-8"), *words, _processor()])
    target = folder / f"decoder-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("compiling the C kernels for this machine, once")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch, target.name)
        # The compiler is the user's own, and no text of a request gets here.
        subprocess.run(  # noqa: S603
            [*words, str(_SOURCE), "-o", str(made), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        # Two processes may compile at once; each renames a whole file.
        made.replace(target)
    return target


def _compiler() -> list[str] | None:
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    return next(([name] for name in _COMPILERS if shutil.which(name)), None)


def _tuning() -> list[str]:
    arm = platform.machine().lower() in {"aarch64", "arm64"}
    return ["-mcpu=native"] if arm else ["-march=native"]


def _processor() -> str:
    """What the compiled code depends on: the cache folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(kept)))
