"""Changed weights stay on the 4-bit grid they were published on."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.kernels.weight_formats import WeightFormat, can_hold, int4_grid
from offramp.models.exits.deltas import Grid


def on_grid(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A weight on a 4-bit grid; each group has the levels 0 and 15."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 16, (rows, columns // 32, 32), generator=generator)
    levels[..., 3], levels[..., 17] = 0, 15
    scale = (torch.rand(rows, columns // 32, 1, generator=generator) / 8 + 0.01).half().float()
    low = (-7.5 * scale * torch.rand(scale.shape, generator=generator)).half().float()
    return (levels * scale + low).view(rows, columns)


def grid_of(weight: Tensor) -> Grid:
    found = Grid.of(weight)
    assert found is not None
    return found


def test_weights_off_the_grid_have_none() -> None:
    assert Grid.of(torch.randn(4, 64)) is None
    assert Grid.of(on_grid(4, 64)[:, :40]) is None


def test_what_changes_less_than_half_a_level_stays() -> None:
    weight = on_grid(8, 96)
    scale = int4_grid(weight)[1].float().expand(8, 3, 32).reshape(8, 96)
    assert grid_of(weight).nearest(weight, torch.zeros_like(weight)).equal(weight)
    assert grid_of(weight).nearest(weight, 0.49 * scale).equal(weight)


def test_changes_are_rounded_to_levels() -> None:
    weight = on_grid(8, 96)
    levels, scale, low = int4_grid(weight)
    generator = torch.Generator().manual_seed(1)
    change = torch.randn(8, 96, generator=generator) / 8
    moved = grid_of(weight).nearest(weight, change.clone())
    after, same_scale, same_low = int4_grid(moved)
    assert same_scale.equal(scale)
    assert same_low.equal(low)
    ends = (levels == 0) | (levels == 15)
    assert after[ends].equal(levels[ends])
    wanted = (levels + (change.view(8, 3, 32) / scale.float()).round()).clamp(0, 15)
    assert after[~ends].equal(wanted[~ends])
    assert 0.2 < float((after != levels).double().mean()) < 0.95


def test_the_result_can_be_served_in_4_bits() -> None:
    weight = on_grid(64, 64, seed=2)
    moved = grid_of(weight).nearest(weight, torch.full_like(weight, 100.0))
    assert can_hold(WeightFormat.INT4, moved)
    assert (int4_grid(moved)[0] == 15).double().mean() > 0.8


def test_constant_groups_stay_constant() -> None:
    weight = torch.full((4, 32), 0.25)
    assert grid_of(weight).nearest(weight, torch.ones(4, 32)).equal(weight)
