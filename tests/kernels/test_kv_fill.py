"""Fill of skipped layers against one layer at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offramp.kernels.kv_fill import copy_kv, project_kv
from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rotary import RotaryTable, rotate

BLOCKS, SIZE, EPS = 6, 4, 1e-5


def empty_pages(layers: int, kv_heads: int, dim: int) -> Tensor:
    return torch.full((layers, 2, BLOCKS, SIZE, kv_heads, dim), 7.0)


@pytest.mark.parametrize(("layers", "rows", "kv_heads", "dim"), [(1, 1, 1, 4), (5, 3, 3, 20)])
@pytest.mark.parametrize("extras", [True, False], ids=["bias and key norm", "plain"])
def test_projection_equals_each_layer_by_itself(
    layers: int,
    rows: int,
    kv_heads: int,
    dim: int,
    extras: bool,  # noqa: FBT001
) -> None:
    wide, width = 24, 2 * kv_heads * dim
    hidden = torch.randn(rows, wide)
    norms, weights = 1 + torch.randn(layers, wide) / 4, torch.randn(layers, width, wide)
    biases = torch.randn(layers, width) if extras else None
    key_norms = 1 + torch.randn(layers, dim) / 4 if extras else None
    places = torch.tensor([20, 2, 9])[:rows]
    table = RotaryTable(1.0 / 50 ** (torch.arange(dim // 2) / dim), 30, 1.0, hidden.dtype, _cpu())
    cos, sin = table.at(torch.tensor([11, 0, 29])[:rows])
    pages = empty_pages(layers, kv_heads, dim)
    folded = (weights * norms.unsqueeze(1)).view(-1, wide)
    flat = None if biases is None else biases.view(-1)
    project_kv(hidden, folded, flat, key_norms, pages, places, cos, sin, EPS)
    for layer, (k_cache, v_cache) in enumerate(pages):
        kv = rms_norm(hidden, norms[layer], EPS) @ weights[layer].t()
        kv = kv if biases is None else kv + biases[layer]
        k, v = kv.view(rows, 2, kv_heads, dim).unbind(1)
        k = k if key_norms is None else rms_norm(k, key_norms[layer], EPS)
        for cache, expected in ((k_cache, rotate(k, cos, sin)), (v_cache, v)):
            _only(cache, places, expected)


def test_copy_repeats_the_source_in_every_layer() -> None:
    source = torch.randn(2, BLOCKS, SIZE, 2, 8)
    pages = empty_pages(3, 2, 8)
    places = torch.tensor([23, 0, 13])
    copy_kv(source, pages, places)
    for k_cache, v_cache in pages:
        _only(k_cache, places, source[0].view(-1, 2, 8)[places])
        _only(v_cache, places, source[1].view(-1, 2, 8)[places])


def _cpu() -> torch.device:
    return torch.device("cpu")


def _only(cache: Tensor, places: Tensor, expected: Tensor) -> None:
    """``places`` of the cache hold ``expected``, all others what they held before."""
    flat = cache.view(-1, *cache.shape[2:])
    torch.testing.assert_close(flat[places], expected, rtol=1e-4, atol=1e-5)
    others = torch.ones(len(flat), dtype=torch.bool)
    others[places] = False
    assert flat[others].eq(7.0).all()
