"""Memory in large pages, with and without a system that has them."""

from __future__ import annotations

import mmap
from itertools import pairwise

import pytest
import torch

from offramp.kernels import memory
from offramp.kernels.memory import Arena


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no such pages on this system")
@pytest.mark.parametrize("has", ["no name", "refused"])
def test_a_system_without_large_pages_gives_small_ones(
    has: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has == "no name":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # EINVAL
    assert Arena().copy(torch.arange(3)).tolist() == [0, 1, 2]


def test_copies_are_apart_and_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CHUNK", 4096)
    arena = Arena()
    given = [torch.randn(size) for size in (1, 17, 900, 5000, 3, 0, 1000)]
    given.append(torch.randn(6, 10).half().t())
    with torch.inference_mode():
        given.append(torch.arange(5, dtype=torch.uint8))
        kept = [arena.copy(tensor) for tensor in given]
    kept += [arena.copy(tensor) for tensor in given]
    for tensor, copied in zip(given * 2, kept, strict=True):
        assert copied.dtype == tensor.dtype
        assert copied.equal(tensor)
        assert copied.data_ptr() % 64 == 0
        assert not tensor.numel() or copied.data_ptr() != tensor.data_ptr()
    ends = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in kept if len(each))
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))


def test_pages_are_zeros_or_refused() -> None:
    size = 1 << 30
    pages = memory.large_pages((4, size // 4), torch.int8)
    assert pages.shape == (4, size // 4)
    assert not pages[3, -5:].any()
    with pytest.raises(MemoryError, match=r"no \d+ bytes"):
        memory.large_pages((1 << 60,), torch.int8)


def test_memory_outlives_its_arena() -> None:
    assert Arena().copy(torch.arange(10)).tolist() == list(range(10))
