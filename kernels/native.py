"""The C kernels of native/, bound here; native_build.py finds or makes their library.

They are called through ctypes, which lets other Python threads run meanwhile. Where there is no C
compiler there are no such kernels, and torch's operators serve.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from offramp.kernels.bounds import check_indices, check_shape
from offramp.kernels.kv_formats import FORMATS
from offramp.kernels.native_build import candidates
from offramp.kernels.native_structures import (
    Batch,
    Choice,
    DraftCall,
    DraftHeadWeights,
    ExitCheck,
    ExitWeights,
    HeadCall,
    HeadWeights,
    Layer,
    Matrix,
    Sampling,
    Shape,
    Workspace,
)
from offramp.paths import cache_folder

logger = logging.getLogger("offramp.kernels")

T = TypeVar("T")

# Scratch memory has room for contexts of a multiple of so many tokens; so many layouts are kept.
_LONGEST_MULTIPLE = 64
_MOST_LAYOUTS = 512


class _Scratch(threading.local):
    """Memory that calls use and need not find again, kept for the next call of the same thread.

    ``layouts`` are addresses in it, by the sizes they were asked for: laying memory out takes as
    long as a small kernel. They are forgotten where memory moves.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self.layouts: dict[tuple[int | str, ...], Any] = {}

    def at(self, name: str, size: int) -> int:
        """The address of ``size`` floats."""
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size:
            kept = self._kept[name] = torch.empty(size)
            self.layouts.clear()
        return kept.data_ptr()

    def keep(self, sizes: tuple[int | str, ...], layout: T) -> T:
        """Keep the addresses laid out for ``sizes``."""
        if len(self.layouts) >= _MOST_LAYOUTS:
            self.layouts.clear()
        self.layouts[sizes] = layout
        return layout


class Library:
    """The compiled kernels; tensors are fp32 and contiguous on the CPU.

    What `run_layers`, `head`, `draft` and `check` are given is checked where it is put together
    (NativeLayers, NativeHead, NativeDraft, NativeCheck); the other functions check it here, and
    raise ValueError or IndexError.
    Raises OSError if ``path`` holds no such library.
    """

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        for name in (
            "prepared_floats",
            "matmul_floats",
            "attention_floats",
            "partial_floats",
            "screening_floats",
        ):
            self._function(name).restype = c_int64
        for name in ("run_layers", "head", "sample", "matmul", "rows", "draft", "check"):
            self._function(name).restype = None
        self._function("constant").restype = c_int64
        self._function("timer_name").restype = c_char_p
        self.has_amx = bool(self._function("initialize")())
        self._phase_floats = self.constant("struct phase") // torch.float32.itemsize
        self._embed_phases = self.constant("EMBED_PHASES")
        self._head_phases = self.constant("HEAD_PHASES")
        self._group = self.constant("GROUP")
        self._layer_phases = self.constant("LAYER_PHASES")
        self._matmul_phases = self.constant("MATMUL_PHASES")
        self._sampling_phases = self.constant("SAMPLING_PHASES")
        self._draft_phases = self.constant("DRAFT_PHASES")
        self._check_phases = self.constant("CHECK_PHASES")
        self.kv_formats = {dtype: self.constant(name) for dtype, name in FORMATS.items()}
        self._scratch = _Scratch()
        self.timers: tuple[str, ...] = tuple(self._timer_names())
        self._time: Tensor | None = None

    def constant(self, name: str) -> int:
        """A constant of the source, or the bytes of a structure (``struct batch``).

        Raises KeyError if the source exports none of this name.
        """
        found = int(self._function("constant")(name.encode()))
        if found < 0:
            raise KeyError(name)
        return found

    @contextmanager
    def timing(self) -> Iterator[dict[str, float]]:
        """Seconds by the names of `timers` that layers take inside, filled in at the end."""
        self._time = torch.zeros(len(self.timers), dtype=torch.int64)
        spent: dict[str, float] = {}
        try:
            yield spent
        finally:
            spent.update(zip(self.timers, (self._time / 1e9).tolist(), strict=True))
            self._time = None

    def matmul(self, matrix: Matrix, x: Tensor, coarse: Tensor | None = None) -> Tensor:
        """``x`` [n, columns] times the matrix transposed, plus its bias: [n, outs].

        Weights in 8 and 4 bits take 8 bits of the rows that are ``coarse`` [n] (bool).
        """
        rows, columns = x.shape[0], matrix.columns
        check_shape("inputs", x, (rows, columns))
        if coarse is not None:
            check_shape("coarse rows", coarse, (rows,), torch.bool)
        out = torch.empty(rows, matrix.outs)
        workspace = self._workspace(rows, columns, self._matmul_phases)
        self._function("matmul")(
            ctypes.byref(matrix),
            c_void_p(x.data_ptr()),
            c_void_p(out.data_ptr()),
            rows,
            None if coarse is None else c_void_p(coarse.data_ptr()),
            ctypes.byref(workspace),
        )
        return out

    def rows(self, matrix: Matrix, ids: Tensor) -> Tensor:
        """Rows ``ids`` [n] (int64) of the matrix as fp32 [n, columns]."""
        check_shape("ids", ids, (len(ids),), torch.int64)
        if len(ids):
            lowest, highest = ids.aminmax()
            check_indices("rows of a weight", int(lowest), int(highest), matrix.outs)
        out = torch.empty(ids.shape[0], matrix.columns)
        self._function("rows")(
            ctypes.byref(matrix),
            c_void_p(ids.data_ptr()),
            ids.shape[0],
            c_void_p(out.data_ptr()),
        )
        return out

    def run_layers(
        self,
        shape: Shape,
        layers: ctypes.Array[Layer],
        batch: Batch,
        hidden: Tensor,
        embeddings: Matrix | None = None,
        ids: int | None = None,
    ) -> None:
        """Advance ``hidden`` [T, width] through ``layers``, in place.

        With the address of token ``ids`` (int64 [T]) it begins as these rows of ``embeddings``.
        """
        phases = self._embed_phases + len(layers) * self._layer_phases
        workspace = self._layer_workspace(shape, batch, batch.rows, phases)
        self._function("run_layers")(
            ctypes.byref(shape),
            layers,
            len(layers),
            ctypes.byref(batch),
            c_void_p(hidden.data_ptr()),
            None if embeddings is None else ctypes.byref(embeddings),
            c_void_p(ids),
            ctypes.byref(workspace),
        )

    def head(self, weights: HeadWeights, call: HeadCall) -> None:
        """Logits of the rows of ``call``, or the largest of them alone."""
        rows, columns, wide = call.rows, weights.weight.columns, 0
        if call.screen:
            threads = torch.get_num_threads()
            wide = self._function("screening_floats")(weights.weight.outs, threads)
            columns += self._group
        workspace = self._workspace(rows, columns, self._head_phases, normed=columns, wide=wide)
        self._function("head")(ctypes.byref(weights), ctypes.byref(call), ctypes.byref(workspace))

    def sample(self, logits: Tensor, choices: Sequence[Choice]) -> list[int]:
        """The tokens that ``choices`` draw from rows of ``logits`` [n, vocab]."""
        rows, vocab = logits.shape
        check_shape("logits", logits, (rows, vocab))
        for choice in choices:
            check_indices("rows", choice.row, choice.row, rows)
        made = (Choice * len(choices))(*choices)
        call = Sampling(len(choices), vocab, logits.data_ptr(), ctypes.addressof(made))
        workspace = self._workspace(1, self._group, self._sampling_phases, attention=vocab)
        self._function("sample")(ctypes.byref(call), ctypes.byref(workspace))
        return [choice.token for choice in made]

    def draft(self, shape: Shape, head: DraftHeadWeights, batch: Batch, call: DraftCall) -> None:
        """Make the entries of ``call``, and guesses; it lacks its scratch and ``batch``."""
        call.batch = ctypes.addressof(batch)
        for name, address in self._draft_scratch(shape.width, head, call):
            setattr(call, name, address)
        phases = max(1, call.guesses) * self._draft_phases
        workspace = self._layer_workspace(shape, batch, call.entries, phases, head.fuse.columns)
        self._function("draft")(
            ctypes.byref(shape), ctypes.byref(head), ctypes.byref(call), ctypes.byref(workspace)
        )

    def _draft_scratch(
        self, width: int, head: DraftHeadWeights, call: DraftCall
    ) -> list[tuple[str, int]]:
        sequences, entries, guesses = call.sequences, call.entries, call.guesses
        columns, outs = head.fuse.columns, head.lm_head.outs
        sizes = ("draft", sequences, entries, guesses, width, columns, outs)
        found: list[tuple[str, int]] | None = self._scratch.layouts.get(sizes)
        if found is not None:
            return found
        numbers = 4 * (entries + guesses * sequences)
        floats = {
            "hidden": entries * width,
            "inputs": entries * columns,
            "logits": sequences * (outs + 16),
            "steps": (1 + guesses) * ctypes.sizeof(Batch) // 4,
            "numbers": 2 * numbers,
        } | dict.fromkeys(("alive", "ends", "best", "product", "chance"), sequences)
        at = self._scratch.at
        made = [(name, at(f"draft {name}", size)) for name, size in floats.items()]
        return self._scratch.keep(sizes, made)

    def check(self, head: ExitWeights, call: ExitCheck) -> None:
        """Check rows at an exit; ``call`` lacks its scratch."""
        rows, width = call.rows, head.layer.gate_up.columns
        inner = head.layer.down.columns
        call.states = self._scratch.at("check states", rows * width)
        wide = max(2 * inner, head.router_up.outs)
        workspace = self._workspace(
            rows, max(width, inner), self._check_phases, normed=width, wide=wide
        )
        self._function("check")(ctypes.byref(head), ctypes.byref(call), ctypes.byref(workspace))

    def _layer_workspace(
        self, shape: Shape, batch: Batch, rows: int, phases: int, columns: int = 0
    ) -> Workspace:
        """Scratch memory for layers over ``rows`` rows, with contexts as long as in ``batch``."""
        # Contexts grow with every token; room for a few more lets a layout be found again.
        longest = batch.longest + -batch.longest % _LONGEST_MULTIPLE
        heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
        width, inner, threads = shape.width, shape.inner, torch.get_num_threads()
        sizes = (
            *("layers", rows, columns, phases, longest),
            *(width, heads, kv_heads, head_dim, inner, threads),
        )
        workspace: Workspace | None = self._scratch.layouts.get(sizes)
        if workspace is None:
            queries, room = heads * head_dim, Batch(rows=rows, longest=longest)
            workspace = self._workspace(
                rows,
                max(width, queries, inner, columns),
                phases,
                normed=max(width, queries),
                wide=max(queries + 2 * kv_heads * head_dim, 2 * inner),
                attention=self._function("attention_floats")(ctypes.byref(shape)),
            )
            partials = self._function("partial_floats")(ctypes.byref(shape), ctypes.byref(room))
            workspace.partials = self._scratch.at("partials", partials)
            workspace.run_starts = self._scratch.at("run_starts", rows + 1)
            self._scratch.keep(sizes, workspace)
        workspace.timers = None if self._time is None else self._time.data_ptr()
        return workspace

    def _workspace(
        self,
        rows: int,
        columns: int,
        phases: int,
        *,
        normed: int = 0,
        wide: int = 0,
        attention: int = 0,
    ) -> Workspace:
        """Scratch memory for products of matrices up to ``columns`` wide.

        ``normed`` and ``wide`` are floats of a row, ``attention`` those of a thread.
        """
        threads, scratch = torch.get_num_threads(), self._scratch.at
        sizes = (rows, columns, phases, normed, wide, attention, threads)
        found: Workspace | None = self._scratch.layouts.get(sizes)
        if found is not None:
            return found
        per_thread = self._function("matmul_floats")(columns) + attention
        made = Workspace(
            normed=scratch("normed", rows * normed),
            wide=scratch("wide", rows * wide),
            prepared=scratch("prepared", 2 * self._function("prepared_floats")(rows, columns)),
            phases=scratch("phases", phases * self._phase_floats),
            per_thread=scratch("per_thread", threads * per_thread),
            per_thread_floats=per_thread,
            threads=threads,
            columns=columns,
        )
        return self._scratch.keep(sizes, made)

    def _function(self, name: str) -> Any:
        return getattr(self._functions, f"offramp_{name}")

    def _timer_names(self) -> Iterator[str]:
        count = 0
        while (name := self._function("timer_name")(count)) is not None:
            yield name.decode()
            count += 1


@functools.cache
def library() -> Library | None:
    """The kernels, compiled if need be; None, and a log line that says why, if they cannot be."""
    reason = ""
    try:
        for path in candidates(cache_folder() / "kernels"):
            try:
                return Library(path)
            except OSError as error:
                reason = str(error)
                logger.warning("C kernels in %s do not load: %s", path.name, reason)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
    logger.warning("no C kernels, torch's operators serve, more slowly: %s", reason.strip())
    return None
