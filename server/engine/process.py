"""Settings of the process that serve speed and nothing else."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# The largest the allocator takes; above it, memory comes from the system and goes back to it.
_MMAP_BYTES = 32 << 20
_TRIM_BYTES = 256 << 20


def keep_freed_memory() -> bool:
    """Let the C library keep what a step frees for the next step; False where it is not glibc.

    Its default returns tensors of over 128 KiB to the system at once, and each step then pays for
    fresh pages again: 5 % of a step of SmolLM2-135M.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES) and mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))
