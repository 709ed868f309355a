"""Products of counted rows: the reference against plain formulas, the kernel against it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offramp.kernels.backend import rehearsal, triton
from offramp.kernels.masked_linear import (
    Activation,
    Residual,
    Rows,
    Tiles,
    masked_linear,
    tiles_for,
)
from tests.kernels.compiler import SHARED_BYTES, TARGETS, Compiled, Compiler

pytestmark = pytest.mark.usefixtures("on_device")
interpreted = pytest.mark.skipif(triton is None, reason="no triton")
UNTOUCHED = 7.0


def counted(number: int) -> Tensor:
    return torch.tensor([number], dtype=torch.int32)


def mixed(rows: int, of: int) -> Tensor:
    """Rows in no order, as int32."""
    return torch.randperm(of)[:rows].to(torch.int32)


class Case:
    """A product with everything on; NaN in each row of the inputs that nobody may read."""

    def __init__(
        self,
        count: int,
        limit: int,
        ins: int,
        outs: int,
        activation: Activation = Activation.NONE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        factor = 2 if activation is Activation.SWIGLU else 1
        self.count, self.limit, self.activation = count, limit, activation
        self.weight = (torch.randn(factor * outs, ins) / ins**0.5).to(dtype)
        self.bias = torch.randn(factor * outs).to(dtype)
        self.scale = torch.randn(outs).to(dtype)
        self.x = self._rows(ins, dtype)
        self.base = self._rows(outs, dtype)
        self.out = Rows(torch.full((limit + 3, outs), UNTOUCHED, dtype=dtype), self._index())

    def run(self) -> Tensor:
        masked_linear(
            self.x,
            self.weight,
            self.out,
            counted(self.count),
            limit=self.limit,
            bias=self.bias,
            activation=self.activation,
            residual=Residual(self.base, self.scale),
        )
        return self.out.data

    def expected(self) -> Tensor:
        """In float64, one formula after another."""
        x = self.x.data[self.x.at(self.count)].double()
        y = x @ self.weight.double().t() + self.bias.double()
        if self.activation is Activation.SILU:
            y = y / (1 + (-y).exp())
        if self.activation is Activation.SWIGLU:
            gate, up = y.chunk(2, dim=-1)
            y = gate / (1 + (-gate).exp()) * up
        y = y + self.base.data[self.base.at(self.count)].double() * self.scale.double()
        out = torch.full(self.out.data.shape, UNTOUCHED, dtype=torch.float64)
        out[self.out.at(self.count)] = y
        return out

    def _index(self) -> Tensor:
        return mixed(self.limit, self.limit + 3)

    def _rows(self, width: int, dtype: torch.dtype) -> Rows:
        index = self._index()
        data = torch.full((self.limit + 3, width), float("nan"), dtype=dtype)
        data[index[: self.count].long()] = torch.randn(self.count, width).to(dtype)
        return Rows(data, index)


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize(("count", "limit"), [(0, 4), (1, 1), (5, 7)])
def test_the_reference_is_the_formula(count: int, limit: int, activation: Activation) -> None:
    case = Case(count, limit, 24, 10, activation)
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=0, atol=1e-5)


@interpreted
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize(
    ("count", "limit", "ins", "outs"),
    [(0, 4, 64, 32), (1, 1, 256, 16), (5, 7, 300, 37), (17, 40, 96, 65), (64, 130, 64, 16)],
)
def test_the_kernel_is_the_formula(
    count: int, limit: int, ins: int, outs: int, activation: Activation
) -> None:
    """No row, one, a prime, more than a tile; widths that no tile divides."""
    case = Case(count, limit, ins, outs, activation)
    with rehearsal():
        found = case.run()
    torch.testing.assert_close(found.double(), case.expected(), rtol=0, atol=2e-5)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 6e-2), (torch.float16, 8e-3)], ids=str
)
def test_halves_are_read_and_written(dtype: torch.dtype, tolerance: float) -> None:
    case = Case(3, 4, 128, 48, Activation.SWIGLU, dtype)
    with rehearsal():
        found = case.run()
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), case.expected(), rtol=0, atol=tolerance)


@interpreted
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
def test_a_bare_product_may_add_to_its_own_output(
    kernel: bool,  # noqa: FBT001
) -> None:
    x, weight, state = torch.randn(3, 40), torch.randn(20, 40), torch.randn(5, 20)
    at = torch.tensor([4, 0, 2], dtype=torch.int32)
    expected = state.clone()
    expected[at.long()] += x @ weight.t()
    rows = Rows(state, at)
    if kernel:
        with rehearsal():
            masked_linear(Rows(x), weight, rows, counted(3), limit=3, residual=Residual(rows))
    else:
        masked_linear(Rows(x), weight, rows, counted(3), limit=3, residual=Residual(rows))
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_a_single_output() -> None:
    """Its width is a constant of Python's to the compiler."""
    case = Case(3, 4, 48, 1, Activation.SWIGLU)
    with rehearsal():
        found = case.run()
    torch.testing.assert_close(found.double(), case.expected(), rtol=0, atol=2e-5)


def test_few_outputs_are_cut_finer_than_many() -> None:
    assert tiles_for(1, 576, torch.bfloat16).outs == 16
    assert tiles_for(1, 128_256, torch.bfloat16).outs == 128
    assert tiles_for(1, 576, torch.bfloat16).rows == 16
    assert tiles_for(200, 576, torch.bfloat16).rows == 64


NUMBERS = ("width", "ins", "x_row", "w_row", "base_row", "out_row")
COMPUTE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def compiled(
    compile_ahead: Compiler, target: int, dtype: str, tiles: Tiles, without: tuple[str, ...]
) -> Compiled:
    """The kernel for SwiGLU with its optional arguments but for those ``without``."""
    types = dict.fromkeys(["x", "weight", "bias", "base", "scale", "out"], f"*{dtype}")
    types |= dict.fromkeys(["x_index", "base_index", "out_index", "count"], "*i32")
    types |= dict.fromkeys(NUMBERS, "i32")
    constants = dict.fromkeys(without)
    return compile_ahead(
        "masked_linear",
        "_product",
        target,
        {name: kind for name, kind in types.items() if name not in without},
        warps=tiles.warps,
        stages=tiles.stages,
        divisible=NUMBERS,
        **constants,
        activation=int(Activation.SWIGLU),
        tile_rows=tiles.rows,
        tile_outs=tiles.outs,
        tile_ins=tiles.ins,
        whole=True,
        compute=COMPUTE[dtype],
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("outs", [576, 6144, 28_672, 128_256])
@pytest.mark.parametrize("rows", [1, 32, 256])
def test_it_compiles(
    compile_ahead: Compiler, target: int, dtype: str, outs: int, rows: int
) -> None:
    """Loads have to be fetched ahead: four steps of them in shared memory."""
    tiles = tiles_for(rows, outs, getattr(torch, COMPUTE[dtype]))
    made = compiled(compile_ahead, target, dtype, tiles, ("bias",))
    step = (tiles.rows + tiles.outs) * tiles.ins * (4 if dtype == "fp32" else 2)
    assert 2 * step <= made.shared_bytes <= SHARED_BYTES[target]
    assert not made.spills
    assert made.fetches_ahead
    assert made.on_tensor_cores == (dtype != "fp32")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "without",
    [(), ("scale", "x_index"), ("bias", "base", "scale", "base_index", "out_index")],
    ids=["all", "down", "gate and up"],
)
def test_it_compiles_without_what_is_optional(
    compile_ahead: Compiler, target: int, without: tuple[str, ...]
) -> None:
    made = compiled(compile_ahead, target, "bf16", tiles_for(1, 4096, torch.bfloat16), without)
    assert not made.spills
