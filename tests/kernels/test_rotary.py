"""Rotary embedding against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from offramp.kernels.rotary import RotaryTable, rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize("dim", [2, 16, 60, 128])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_equals_transformers(dim: int, scale: float) -> None:
    inv_freq = 1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim)
    positions = torch.tensor([0, 5, 5, 63, 1])
    q, k = torch.randn(5, 3, dim), torch.randn(5, 1, dim)
    angles = torch.outer(positions.float(), inv_freq)
    both = torch.cat((angles, angles), dim=-1).unsqueeze(0)
    expected_q, expected_k = apply_rotary_pos_emb(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        both.cos() * scale,
        both.sin() * scale,
    )
    cos, sin = RotaryTable(inv_freq, 64, scale, torch.float32, CPU).at(positions)
    torch.testing.assert_close(rotate(q, cos, sin), expected_q[0].transpose(0, 1))
    torch.testing.assert_close(rotate(k, cos, sin), expected_k[0].transpose(0, 1))


def test_products_depend_on_the_distance_alone() -> None:
    """What rotary embedding is for: q at p and k at p' meet by p - p'."""
    table = RotaryTable(1.0 / 100 ** (torch.arange(8) / 8), 50, 1.0, torch.float32, CPU)
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def product(query: int, key: int) -> float:
        turned_q = rotate(q, *table.at(torch.tensor([query])))
        turned_k = rotate(k, *table.at(torch.tensor([key])))
        return float((turned_q * turned_k).sum())

    assert product(7, 3) == pytest.approx(product(44, 40), rel=1e-4)


def test_no_rows() -> None:
    table = RotaryTable(torch.ones(4), 3, 1.0, torch.float32, CPU)
    nothing = torch.tensor([], dtype=torch.long)
    assert rotate(torch.randn(0, 2, 8), *table.at(nothing)).shape == (0, 2, 8)
