"""swiglu against the formula in float64, its kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offramp.kernels import swiglu as module
from offramp.kernels.backend import rehearsal, triton
from offramp.kernels.swiglu import _COLUMNS, swiglu
from tests.kernels.compiler import SHARED_BYTES, TARGETS, Compiler

pytestmark = pytest.mark.usefixtures("on_device")
SHAPES = [(1, 1), (1, 80), (3, 1031), (2, 2 * _COLUMNS), (0, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
interpreted = pytest.mark.skipif(triton is None, reason="no triton")


def formula(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def check(got: Tensor, gate_up: Tensor) -> None:
    """To a few roundings; the interpreter cuts bf16 off where a GPU rounds."""
    assert got.dtype is gate_up.dtype
    step = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), formula(gate_up), rtol=4 * step, atol=step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = (torch.randn(shape[0], 2 * shape[1]) * 4).to(dtype)
    check(swiglu(gate_up), gate_up)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_the_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = (torch.randn(shape[0], 2 * shape[1]) * 4).to(dtype)
    with rehearsal():
        got = swiglu(gate_up)
    assert got.shape == shape
    check(got, gate_up)


@interpreted
def test_rows_may_be_a_strided_view() -> None:
    wide = torch.randn(3, 200)
    with rehearsal():
        check(swiglu(wide[:, 10:190]), wide[:, 10:190])


@interpreted
def test_no_rows_need_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_swiglu", None)
    with rehearsal():
        assert swiglu(torch.randn(0, 12)).shape == (0, 6)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles(compile_ahead: Compiler, target: int, dtype: str) -> None:
    types = {"gate_up": f"*{dtype}", "out": f"*{dtype}", "width": "i32"}
    made = compile_ahead("swiglu", "_swiglu", target, types, divisible=["width"], tile=_COLUMNS)
    assert made.shared_bytes <= SHARED_BYTES[target]
    assert made.spills == 0
