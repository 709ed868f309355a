"""store_kv writes its places and nothing else."""

from __future__ import annotations

import torch

from offramp.kernels.kv_store import store_kv

BLOCKS, SIZE, HEADS, DIM = 5, 3, 2, 7


def test_only_the_places_change() -> None:
    k_cache, v_cache = torch.randn(2, BLOCKS * SIZE, HEADS, DIM)
    before_k, before_v = k_cache.clone(), v_cache.clone()
    places = torch.tensor([14, 0, 7, 4])
    k, v = torch.randn(2, len(places), HEADS, DIM)
    store_kv(k, v, k_cache, v_cache, places)
    for cache, before, rows in ((k_cache, before_k, k), (v_cache, before_v, v)):
        for place in range(BLOCKS * SIZE):
            found = (places == place).nonzero()
            assert cache[place].equal(rows[found[0, 0]] if len(found) else before[place])


def test_rows_may_be_a_strided_view() -> None:
    """K and V arrive as slices of the fused projection."""
    k_cache, v_cache = torch.zeros(2, BLOCKS * SIZE, HEADS, DIM)
    fused = torch.randn(4, 3 * HEADS, DIM)
    places = torch.tensor([1, 2, 9, 10])
    store_kv(fused[:, HEADS : 2 * HEADS], fused[:, 2 * HEADS :], k_cache, v_cache, places)
    assert k_cache[places].equal(fused[:, HEADS : 2 * HEADS])
    assert v_cache[places].equal(fused[:, 2 * HEADS :])


def test_no_rows_change_nothing() -> None:
    k_cache, v_cache = torch.ones(2, BLOCKS * SIZE, HEADS, DIM)
    nothing = torch.zeros(0, HEADS, DIM)
    store_kv(nothing, nothing, k_cache, v_cache, torch.tensor([], dtype=torch.long))
    assert k_cache.eq(1).all()
    assert v_cache.eq(1).all()
