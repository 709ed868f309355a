"""Triton, where it is installed: the kernels' side of GPUs.

Under TRITON_INTERPRET=1 kernels run on CPU tensors, slowly, to be compared with their references.
Where that variable is not set and no GPU is found, Triton's 70 MB are not loaded.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch

triton: Any = None
tl: Any = None
if "TRITON_INTERPRET" in os.environ or torch.cuda.is_available():
    with suppress(ImportError):
        triton = importlib.import_module("triton")
        tl = importlib.import_module("triton.language")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Any) -> Any:
    """The function as a kernel; as it is, never to be launched, where there is no Triton."""
    return function if triton is None else triton.jit(function)


_chosen: bool | None = None


def uses_triton(device: torch.device) -> bool:
    """Whether tensors on ``device`` are for kernels rather than for references."""
    if triton is None:
        return False
    return device.type == "cuda" if _chosen is None else _chosen


def rehearsal() -> AbstractContextManager[None]:
    """Kernels whatever the device: on a CPU interpreted, which is how they are tested there."""
    if not INTERPRETED and not torch.cuda.is_available():
        raise RuntimeError("a rehearsal needs TRITON_INTERPRET=1, set before this import")
    return _choose(kernels=True)


def references() -> AbstractContextManager[None]:
    """References whatever the device: what kernels are compared with."""
    return _choose(kernels=False)


@contextmanager
def _choose(*, kernels: bool) -> Iterator[None]:
    global _chosen  # noqa: PLW0603 (a switch of tests, which would else patch every module)
    before, _chosen = _chosen, kernels
    try:
        yield
    finally:
        _chosen = before


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def compute_type(dtype: torch.dtype) -> Any:
    """Triton's type for products of ``dtype``; in the interpreter, whose bf16 is wrong, fp32."""
    if INTERPRETED and dtype is torch.bfloat16:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]
