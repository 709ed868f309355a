"""What the C library does with freed memory."""

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
    library = _glibc()
    if library is None:
        return False
    return bool(
        library.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        and library.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
    )


def return_freed_memory() -> bool:
    """Give what is free now back to the system; False where there is no glibc to ask."""
    library = _glibc()
    if library is None:
        return False
    library.malloc_trim(0)
    return True


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
