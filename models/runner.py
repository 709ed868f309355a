"""Carry out one step on the device: plain data in, tensors inside, plain data out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.kv_fill import copy_kv, project_kv
from offramp.models.context import ForwardContext, Span, make_context
from offramp.models.exit_head import ExitHead
from offramp.models.kv_cache import KVCache
from offramp.models.sampler import sample
from offramp.models.sampling_params import KVFill
from offramp.models.step import (
    FillKV,
    HeadRow,
    OwedRows,
    RunHead,
    RunSegment,
    SlotRows,
    Step,
    StepResult,
)
from offramp.models.transformer import Transformer, identity_projection


@dataclass(frozen=True, slots=True)
class _Projection:
    """K,V projections of every layer from an exit up, norms folded in (see kv_fill)."""

    weight: Tensor
    bias: Tensor | None
    k_norm: Tensor | None


class Runner:
    """Owns the device side: weights, K,V pages and the hidden buffer [rows, d].

    ``exits`` are the exit heads, one for each of the model's exit layers.
    """

    def __init__(
        self, model: Transformer, exits: Sequence[ExitHead], cache: KVCache, num_rows: int
    ) -> None:
        if tuple(head.layer for head in exits) != model.exit_layers:
            raise ValueError("each exit layer of the model needs its exit head")
        self.model = model
        self.exits = tuple(exits)
        self.cache = cache
        self.hidden = model.embed.new_zeros(num_rows, model.config.hidden_size)
        self._riding: list[tuple[int, tuple[int, ...]]] = []
        self._context: ForwardContext | None = None
        self._projections = [self._projection(head) for head in exits]

    def run(self, step: Step) -> StepResult:
        """Run ``step`` and time it."""
        begun = time.perf_counter()
        leave: tuple[bool, ...] = ()
        token_ids: tuple[int, ...] = ()
        with torch.inference_mode():
            match step:
                case RunSegment():
                    leave = self._run_segment(step)
                case RunHead():
                    token_ids = tuple(self._run_head(step.work))
                case FillKV():
                    self._fill(step)
        return StepResult(time.perf_counter() - begun, leave, token_ids)

    def _run_segment(self, step: RunSegment) -> tuple[bool, ...]:
        model, work = self.model, step.work
        rows = self._index([row for item in work for row in item.rows])
        if step.segment == 0:
            ids = [token for item in work for token in item.token_ids]
            hidden = model.embed[self._index(ids)]
        else:
            hidden = self.hidden[rows]
        hidden = model.segments[step.segment](hidden, self._context_of(step.segment, work))
        self.hidden[rows] = hidden
        return self._leave(step.segment, hidden, work)

    def _context_of(self, segment: int, work: Sequence[SlotRows]) -> ForwardContext:
        """Positions and pages of the rows; kept while the same rows ride on to the next segment.

        Rows change hands only at the ground segment, so above it equal rows are the same slots'.
        """
        riding = [(item.start, item.rows) for item in work]
        if self._context is None or segment == 0 or riding != self._riding:
            spans = [Span(item.start, len(item.rows), item.table) for item in work]
            self._context = make_context(spans, self.model.config, self.cache, self.model.rotary)
            self._riding = riding
        return self._context

    def _leave(self, segment: int, hidden: Tensor, work: Sequence[SlotRows]) -> tuple[bool, ...]:
        """For each slot, whether its last row's gate score reaches its threshold."""
        last, asked, end = [], [], 0
        for index, item in enumerate(work):
            end += len(item.rows)
            if item.threshold is not None:
                last.append(end - 1)
                asked.append(index)
        leave = [False] * len(work)
        if asked:
            scores = self.exits[segment].score(hidden[last], self.model.config.rms_norm_eps)
            for index, score in zip(asked, scores.tolist(), strict=True):
                threshold = work[index].threshold
                leave[index] = threshold is not None and score >= threshold
        return tuple(leave)

    def _run_head(self, work: Sequence[HeadRow]) -> list[int]:
        """Exit adapters where rows left early, then one LM head for all rows."""
        hidden = self.hidden[self._index([item.row for item in work])]
        normed = torch.empty_like(hidden)
        for point in {item.exit for item in work}:
            index = self._index([i for i, item in enumerate(work) if item.exit == point])
            if point is None:
                normed[index] = self.model.normed(hidden[index])
            else:
                eps = self.model.config.rms_norm_eps
                normed[index] = self.exits[point].normed(hidden[index], eps)
        return sample(self.model.logits(normed), work)

    def _fill(self, step: FillKV) -> None:
        for segment in sorted({item.segment for item in step.work}):
            owed = [item for item in step.work if item.segment == segment]
            if step.method is KVFill.COPY:
                self._copy(segment, owed)
            else:
                self._project(segment, owed)

    def _copy(self, segment: int, owed: Sequence[OwedRows]) -> None:
        first = self.model.segments[segment].first
        copy_kv(self.cache.pages[first - 1], self.cache.pages[first:], self._places(owed))

    def _project(self, segment: int, owed: Sequence[OwedRows]) -> None:
        model = self.model
        first = model.segments[segment].first
        rows = self._index([row for item in owed for row in item.rows])
        positions = [item.start + i for item in owed for i in range(len(item.rows))]
        cos, sin = model.rotary.at(self._index(positions))
        own = self._projections[segment - 1]
        project_kv(
            self.hidden[rows],
            own.weight,
            own.bias,
            own.k_norm,
            self.cache.pages[first:],
            self._places(owed),
            cos,
            sin,
            model.config.rms_norm_eps,
        )

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.hidden.device)

    def _places(self, owed: Sequence[OwedRows]) -> Tensor:
        places = [
            place
            for item in owed
            for place in self.cache.places(item.table, item.start, len(item.rows))
        ]
        return self._index(places)

    def _projection(self, head: ExitHead) -> _Projection:
        layers = self.model.layers[head.layer :]
        norms = [layer.k_norm for layer in layers if layer.k_norm is not None]
        weight, bias = head.kv_map, head.kv_bias
        if weight is None:
            weight, bias = identity_projection(self.model, head.layer)
        return _Projection(weight, bias, torch.stack(norms) if norms else None)
