"""Freed memory stays with the process while it serves, and leaves it after loading."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# In a process of its own: what the allocator holds depends on all that ran before.
_CODE = """
from pathlib import Path
import torch
from offramp.server.engine.process import keep_freed_memory, return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

assert keep_freed_memory()
before = resident()
pieces = [torch.ones(1 << 20) for _ in range(50)]
held = resident()
del pieces
kept = resident()
assert return_freed_memory()
print(held - before, held - kept, kept - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_until_it_is_returned() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], check=True, capture_output=True, text=True)
    used, freed, returned = map(int, done.stdout.split())
    assert used > 150
    assert freed < 20
    assert returned > 150
