"""Every kernel file serves by its reference where there is no Triton."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.util import find_spec

SCRIPT = """
import importlib, pkgutil, sys
sys.modules["triton"] = None
import torch
import offramp.kernels as kernels
names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
for name in names:
    importlib.import_module(f"offramp.kernels.{name}")
from offramp.kernels.backend import jit, triton, uses_triton
from offramp.kernels.masked_linear import Rows, masked_linear
assert triton is None and jit(len) is len
assert not uses_triton(torch.device("cuda"))
out = torch.zeros(2, 3)
count = torch.tensor([1], dtype=torch.int32)
masked_linear(Rows(torch.ones(2, 4)), torch.ones(3, 4), Rows(out), count, limit=2)
assert out.tolist() == [[4.0] * 3, [0.0] * 3]
print(len(names))
"""


def test_all_kernel_files_import_and_compute() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_where_the_tests_bring_triton_it_is_there() -> None:
    """Else all that is skipped without it would be skipped unseen."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        assert find_spec("triton") is not None
