"""Every kernel test runs with uninitialised memory poisoned and compares against plain formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from offramp.kernels.backend import references
from offramp.kernels.kv_formats import page_parts
from tests.kernels.compiler import Compiler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels of GPUs are tested: on one, or interpreted."""

# What a default device applies to torch lists once, and by function: before some are replaced.
with DEVICE:
    torch.empty(0)

Make = Callable[..., Tensor]


def poisoned(make: Make) -> Make:
    """The same allocation, filled so that an element nobody wrote shows in any result."""

    def allocate(*args: object, **kwargs: object) -> Tensor:
        tensor = make(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-(2**15))

    return allocate


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in whatever torch.empty and its kin return."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def on_device() -> Iterator[None]:
    """Tensors are made on DEVICE, and only a rehearsal takes kernels."""
    with DEVICE, references():
        yield


@pytest.fixture(scope="session")
def compile_ahead() -> Iterator[Compiler]:
    """Compiles kernels for GPUs that are not here."""
    if find_spec("triton") is None:
        pytest.skip("no triton")
    with Compiler() as compiler:
        yield compiler


def plain_kv(pages: Tensor) -> Tensor:
    """What ``pages`` hold, as fp32 [.., blocks, block_size, kv_heads, head_dim]."""
    numbers, *scales = page_parts(pages)
    return numbers.float() * scales[0] if scales else numbers.float()
