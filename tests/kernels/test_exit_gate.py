"""The gate's score against its formula."""

from __future__ import annotations

import pytest
import torch

from offramp.kernels.exit_gate import exit_gate

EPS = 1e-5


@pytest.mark.parametrize(("rows", "wide", "inner"), [(1, 64, 256), (5, 60, 7), (0, 8, 4)])
def test_equals_the_formula(rows: int, wide: int, inner: int) -> None:
    hidden = torch.randn(rows, wide) * 4
    up, up_bias = torch.randn(inner, wide) / wide**0.5, torch.randn(inner)
    down, down_bias = torch.randn(1, inner) / inner**0.5, torch.randn(1)
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + EPS).sqrt()
    before = normed @ up.t() + up_bias
    expected = torch.sigmoid((before * torch.sigmoid(before)) @ down.t() + down_bias)[:, 0]
    got = exit_gate(hidden, up, up_bias, down, down_bias, EPS)
    assert got.shape == (rows,)
    torch.testing.assert_close(got, expected)


def test_the_score_does_not_depend_on_the_scale_of_the_state() -> None:
    hidden = torch.randn(3, 32)
    rest = torch.randn(6, 32), torch.randn(6), torch.randn(1, 6), torch.randn(1)
    small, large = exit_gate(hidden, *rest, 0.0), exit_gate(hidden * 100, *rest, 0.0)
    torch.testing.assert_close(small, large)
