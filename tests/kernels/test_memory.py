"""Memory in large pages, with and without a system that has them."""

from __future__ import annotations

import mmap
from itertools import pairwise

import pytest
import torch

from offramp.kernels import memory
from offramp.kernels.memory import Arena, untouched


@pytest.mark.parametrize("shape", [(3, 5), (0,), (2, 0, 4), (3 << 20,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_it_begins_as_zeros_and_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = untouched(shape, dtype)
    assert (made.shape, made.dtype) == (shape, dtype)
    assert not made.any()
    made.fill_(1)
    assert made.all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no such pages on this system")
@pytest.mark.parametrize("has", ["no name", "refused"])
def test_a_system_without_large_pages_gives_small_ones(
    has: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has == "no name":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # EINVAL
    assert not untouched((1000,), torch.float32).any()


def test_an_arena_keeps_copies_apart_and_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CHUNK", 4096)
    arena = Arena()
    given = [torch.randn(size) for size in (1, 17, 900, 5000, 3, 1000)]
    given.append(torch.randn(6, 10).half().t())
    kept = [arena.copy(tensor) for tensor in given]
    for before in given:
        before.clone().fill_(0)
    for tensor, copied in zip(given, kept, strict=True):
        assert copied.dtype == tensor.dtype
        assert copied.equal(tensor)
        assert copied.data_ptr() != tensor.data_ptr()
        assert copied.data_ptr() % 64 == 0
    ends = sorted((copied.data_ptr(), copied.data_ptr() + copied.nbytes) for copied in kept)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))


def test_memory_of_an_arena_outlives_it() -> None:
    kept = Arena().copy(torch.arange(10))
    assert kept.tolist() == list(range(10))
