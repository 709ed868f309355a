"""The real runner driven by steps made by hand, one slot, hidden row p for position p."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.models.exits.training.train import TrainOptions, new_head
from offramp.models.runner import Runner
from offramp.models.step import RunSegments, SequenceRows
from offramp.models.transformer import Transformer

from .small import new_cache

FULL = 2
"""The last segment: a token that leaves there has run every layer."""


def new_runner(model: Transformer, rows: int = 64, vocab: Tensor | None = None) -> Runner:
    """A runner with random exit heads."""
    options = TrainOptions(width=16, router=8)
    heads = [new_head(layer, model, options) for layer in model.exit_layers]
    generator = torch.Generator().manual_seed(1)
    for head in heads:
        for tensor in (head.down, head.router_down, head.router_down_bias):
            tensor.normal_(generator=generator)
    return Runner(model, heads, new_cache(model), rows, vocab)


class Pass:
    """A text of which each token runs up to a segment of its own."""

    def __init__(self, runner: Runner, ids: Sequence[int], table: Sequence[int]) -> None:
        self.runner = runner
        self.ids = ids
        self.table = table
        self.computed = [0] * len(runner.model.segments)

    def run(self, segment: int, end: int) -> None:
        """Run a segment for all positions before ``end`` that still lack it."""
        start = self.computed[segment]
        rows = tuple(range(start, end))
        tokens = tuple(self.ids[start:end]) if segment == 0 else ()
        work = SequenceRows(rows, rows, self.table, tokens)
        self.runner.run(RunSegments(segment, segment, (work,)))
        self.computed[segment] = end

    def leave_after(self, segment: int, end: int) -> None:
        """Take the positions before ``end`` through the segments up to ``segment``."""
        for lower in range(segment + 1):
            self.run(lower, end)
