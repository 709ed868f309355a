"""Cases of matrix products: a layer's, the head's and an exit's, counted and the library's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from offramp.kernels.linear import linear
from offramp.kernels.masked_linear import (
    Activation,
    Norm,
    Residual,
    Rows,
    Tiles,
    masked_linear,
    masked_linear_reference,
)
from offramp.models.config import ModelConfig
from offramp.models.exits.training.train import TrainOptions
from offramp.server.bench.kernels.case import Case, Launch, Work
from offramp.server.bench.kernels.setup import Setup, cold_bytes

_INDEX = 4


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix of the model and what surrounds it; ``outs`` is the width of what is written.

    ``of_exit`` are matrices of an exit's own: their norm has no weight, their residual a scale,
    and their result is not the state. What SiLU follows (the gate) has a bias.
    """

    name: str
    ins: int
    outs: int
    activation: Activation = Activation.NONE
    normed: bool = False
    residual: bool = False
    scores: bool = False
    of_exit: bool = False

    @property
    def weight_rows(self) -> int:
        """Rows of the weight."""
        return self.outs * (2 if self.activation is Activation.SWIGLU else 1)

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Logits are fp32 whatever the model is."""
        return torch.float32 if self.scores else dtype

    def work(self, rows: int, dtype: torch.dtype) -> Work:
        """The weight once, vectors once, and each row's input, residual, result and places."""
        size, out = dtype.itemsize, self.out_dtype(dtype).itemsize
        matrix = self.weight_rows * self.ins
        norm = self.ins if self.normed and not self.of_exit else 0
        bias = self.outs if self.activation is Activation.SILU else 0
        scale = self.outs if self.residual and self.of_exit else 0
        row = self.ins + (self.outs if self.residual else 0)
        # The state is read, and added to, through a list; what lies between is in order.
        lists = int(self.normed) + int(self.residual) * (1 if self.of_exit else 2)
        return Work(
            read=size * (matrix + norm + bias + scale + rows * row) + _INDEX * (1 + rows * lists),
            written=rows * self.outs * out,
            flops=2 * rows * matrix,
        )


def products(config: ModelConfig) -> list[Product]:
    """All products of a token's way through the model, then those of an exit as trained here."""
    hidden, inner = config.hidden_size, config.intermediate_size
    sizes = TrainOptions()
    return [
        Product("qkv", hidden, config.query_size + 2 * config.kv_size, normed=True),
        Product("o", config.query_size, hidden, residual=True),
        Product("gate_up", hidden, inner, Activation.SWIGLU, normed=True),
        Product("down", inner, hidden, residual=True),
        Product("lm_head", hidden, config.vocab_size, normed=True, scores=True),
        Product("gate", hidden, sizes.router, Activation.SILU, normed=True, of_exit=True),
        Product("adapter_up", hidden, sizes.width, Activation.SWIGLU, normed=True, of_exit=True),
        Product("adapter_down", sizes.width, hidden, residual=True, of_exit=True),
        Product("exit_lm_head", hidden, _exit_vocab(config, sizes), normed=True, scores=True),
    ]


class Inputs:
    """Memory of one product for ``limit`` rows, of which ``count`` are there."""

    def __init__(self, setup: Setup, product: Product, limit: int, count: int) -> None:
        self._product = product
        self._limit = limit
        self.count = setup.count(count)
        self.weights = setup.copied(setup.weight(product.weight_rows, product.ins))
        state = setup.order(limit, torch.int32)
        self._x = Rows(setup.normal(limit, product.ins), state if product.normed else None)
        self._bias = setup.normal(product.outs) if product.activation is Activation.SILU else None
        self._norm = None
        if product.normed:
            weight = None if product.of_exit else setup.normal(product.ins)
            self._norm = Norm(weight, setup.config.rms_norm_eps)
        self._residual = None
        if product.residual:
            scale = setup.normal(product.outs) if product.of_exit else None
            self._residual = Residual(Rows(setup.normal(limit, product.outs), state), scale)
        # A layer adds to the state itself; here to a second one, or it would grow without end.
        out = setup.zeros(limit, product.outs, dtype=product.out_dtype(setup.dtype))
        to_state = product.residual and not product.of_exit
        self._out = Rows(out, state if to_state else None)

    def launches(self, tiles: Tiles | None = None) -> list[Launch]:
        """The product with each copy of its weight, cut into ``tiles`` (None: by `tiles_for`)."""
        return [partial(self._launch, weight, tiles) for (weight,) in self.weights]

    def reference(self) -> None:
        """The product in plain operators."""
        ((weight,), *_) = self.weights
        masked_linear_reference(
            self._x,
            weight,
            self._out,
            self.count,
            bias=self._bias,
            norm=self._norm,
            activation=self._product.activation,
            residual=self._residual,
        )

    def results(self) -> Mapping[str, Tensor]:
        """All rows, so that one behind the count shows where it was written."""
        return {"out": self._out.data}

    def _launch(self, weight: Tensor, tiles: Tiles | None) -> None:
        masked_linear(
            self._x,
            weight,
            self._out,
            self.count,
            limit=self._limit,
            bias=self._bias,
            norm=self._norm,
            activation=self._product.activation,
            residual=self._residual,
            tiles=tiles,
        )


def masked_linear_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """Each product with its norm, activation or residual."""
    for product in products(setup.config):
        inputs = Inputs(setup, product, rows, count)
        yield Case(
            op="masked_linear",
            what=label(product),
            rows=rows,
            work=product.work(count, setup.dtype),
            launches=inputs.launches(),
            reference=inputs.reference,
            results=inputs.results,
            cold=cold_bytes(inputs.weights),
            empty=inputs.count.zero_,
        )


def linear_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The same matrices with the library's product alone, which kernels are measured by."""
    size = setup.dtype.itemsize
    for product in products(setup.config):
        yield _linear_case(setup, product, rows, count, size)


def label(product: Product) -> str:
    """Name and weight of a product, as reports call it."""
    return f"{product.name} {product.weight_rows}x{product.ins}"


def _exit_vocab(config: ModelConfig, sizes: TrainOptions) -> int:
    """Tokens that an exit tells apart."""
    return min(sizes.vocab or config.vocab_size, config.vocab_size)


def _linear_case(setup: Setup, product: Product, rows: int, count: int, size: int) -> Case:
    outs, ins = product.weight_rows, product.ins
    weights = setup.copied(setup.weight(outs, ins))
    x, found = setup.normal(count, ins), {}

    def launch(weight: Tensor) -> None:
        found["out"] = linear(x, weight)

    def reference() -> None:
        ((weight,), *_) = weights
        found["out"] = (x.float() @ weight.float().t()).to(setup.dtype)

    return Case(
        op="linear",
        what=label(product),
        rows=rows,
        work=Work(
            read=(outs + count) * ins * size,
            written=count * outs * size,
            flops=2 * count * ins * outs,
        ),
        launches=[partial(launch, weight) for (weight,) in weights],
        reference=reference,
        results=lambda: found,
        cold=cold_bytes(weights),
    )
