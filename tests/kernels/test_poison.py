"""The guard of the other tests guards."""

from __future__ import annotations

import torch


def test_uninitialised_memory_is_nan() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, 2)).isnan().all()
    assert torch.zeros(1).new_empty(4).isnan().all()
    assert (torch.empty(3, dtype=torch.long) < 0).all()
