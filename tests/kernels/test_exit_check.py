"""The default exit check in C, against the composition that it stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from offramp.kernels.exit_check import CheckMatrices, NativeCheck
from offramp.kernels.exit_gate import exit_gate, fused_key, fused_score
from offramp.kernels.linear import Linear
from offramp.kernels.native import library
from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.weight_formats import WeightFormat

pytestmark = pytest.mark.skipif(library() is None, reason="no C kernels")

EPS = 1e-5
WIDTH, GATE, INNER = 64, 32, 96
FORMS = [WeightFormat.FP32, WeightFormat.FP16]


@dataclass(frozen=True)
class Parts:
    router_up_bias: Tensor
    router_down: Tensor
    router_down_bias: Tensor
    scale: Tensor
    norm: Tensor
    floor: float


def made(outs: int = 200, floor: float = 0.5) -> tuple[Parts, dict[str, Tensor]]:
    torch.manual_seed(outs)
    parts = Parts(
        torch.randn(GATE),
        torch.randn(1, GATE),
        torch.randn(1),
        torch.rand(WIDTH),
        torch.rand(WIDTH),
        floor,
    )
    weights = {
        "router_up": torch.randn(GATE, WIDTH) / 8,
        "gate_up": torch.randn(2 * INNER, WIDTH) / 8,
        "down": torch.randn(WIDTH, INNER) / 8,
        "lm_head": torch.randn(outs, WIDTH) / 4,
    }
    return parts, weights


def packed(weights: dict[str, Tensor], form: WeightFormat) -> CheckMatrices:
    return CheckMatrices(**{name: Linear(each, None, (form,)) for name, each in weights.items()})


def reference(parts: Parts, matrices: CheckMatrices, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and probabilities of all rows."""
    down = parts.router_down, parts.router_down_bias
    gates = exit_gate(hidden, matrices.router_up, parts.router_up_bias, *down, EPS)
    gate, up = matrices.gate_up(rms_norm(hidden, None, EPS)).chunk(2, dim=-1)
    state = hidden * parts.scale + matrices.down(torch.nn.functional.silu(gate) * up)
    return gates, matrices.lm_head(rms_norm(state, parts.norm, EPS)).softmax(-1)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("outs", [200, 208])
@pytest.mark.parametrize("rows", [1, 2, 7, 40])
def test_it_is_the_composition(form: WeightFormat, outs: int, rows: int) -> None:
    parts, weights = made(outs)
    matrices = packed(weights, form)
    check = NativeCheck.of(parts, matrices, EPS)
    assert check is not None
    hidden = torch.randn(50, WIDTH)
    places = torch.randperm(50)[:rows].tolist()
    found = check(hidden, places)
    gates, probs = reference(parts, matrices, hidden[places])
    torch.testing.assert_close(torch.tensor(found.gates), gates, rtol=1e-4, atol=1e-5)
    assert list(found.fired) == (gates >= 0.5).nonzero().squeeze(-1).tolist()
    best = probs.topk(2, dim=-1)
    for row in range(rows):
        if row not in found.fired:
            assert found.best[row] == -1
            continue
        assert found.best[row] == int(best.indices[row, 0])
        both = torch.tensor([found.tops[row], found.seconds[row]])
        torch.testing.assert_close(both, best.values[row], rtol=1e-3, atol=1e-5)
    logits = found.logits.softmax(-1)
    torch.testing.assert_close(logits, probs[list(found.fired)], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("floor", [0.0, 1.1])
def test_all_rows_fire_or_none(floor: float) -> None:
    parts, weights = made(floor=floor)
    check = NativeCheck.of(parts, packed(weights, WeightFormat.FP32), EPS)
    assert check is not None
    found = check(torch.randn(5, WIDTH), range(5))
    assert list(found.fired) == ([] if floor > 1 else list(range(5)))
    assert len(found.logits) == len(found.fired)


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    parts, weights = made()
    check = NativeCheck.of(parts, packed(weights, WeightFormat.FP16), EPS)
    assert check is not None
    # AMX, which takes more than six rows, rounds products of fp16 differently.
    found = library()
    rows = 6 if found and found.has_amx else 12
    hidden = torch.randn(rows, WIDTH)
    together = check(hidden, range(rows))
    for row in range(rows):
        alone = check(hidden, [row])
        assert alone.gates[0] == together.gates[row]
        assert (alone.best[0], alone.tops[0]) == (together.best[row], together.tops[row])


def test_sizes_that_do_not_fit_are_refused() -> None:
    parts, weights = made()
    wrong = {**weights, "gate_up": torch.randn(64, WIDTH)}
    with pytest.raises(ValueError, match="gate_up"):
        NativeCheck.of(parts, packed(wrong, WeightFormat.FP32), EPS)
    with pytest.raises(ValueError, match="norm"):
        NativeCheck.of(replace(parts, norm=torch.rand(8)), packed(weights, WeightFormat.FP32), EPS)
    check = NativeCheck.of(parts, packed(weights, WeightFormat.FP32), EPS)
    assert check is not None
    with pytest.raises(ValueError, match="states"):
        check(torch.randn(3, 32), [0])
    with pytest.raises(IndexError):
        check(torch.randn(3, WIDTH), [3])


def test_the_reference_serves_without_native_matrices() -> None:
    parts, weights = made()
    assert NativeCheck.of(parts, packed(weights, WeightFormat.PLAIN), EPS) is None


@pytest.mark.parametrize("fuse", [None, torch.tensor([0.3, 1.2, -0.4, 0.1])])
def test_one_score_is_the_key_of_many(fuse: Tensor | None) -> None:
    keys = torch.rand(3, 20)
    keys[:, 0], keys[:, 1] = 0.0, 1.0
    wanted = fused_key(fuse, *keys)
    plain = None if fuse is None else fuse.tolist()
    found = [fused_score(plain, *row) for row in keys.t().tolist()]
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-5, atol=1e-6)
