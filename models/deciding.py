"""Decisions at work: prompts that stop at the first layer that knows the answer.

Embeddings are read here too, of prompts that run every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from offramp.kernels.kv_formats import page_parts
from offramp.kernels.rows import HostRows, Span, flat_places
from offramp.models.exits.decision_heads import DecisionHeads, DecisionTask, features
from offramp.models.kv_cache import KVCache
from offramp.models.step import AnswerRead, Decide, Pooling
from offramp.models.transformer import Segment, Transformer

# Sets of candidates whose LM-head rows are kept.
_MOST_ROWS_KEPT = 512


class Decider:
    """Runs the stack for decisions, cut at ``layers`` (ascending, below the model's depth).

    Each position's state is kept at its place in the pages, so that it lives as long as its K,V
    do: whatever stopped inside the stack can go on from there. Of each block the sum of its states
    is kept after every segment, for the means that heads read. An embedding is pooled from the
    states themselves, which lie there for all positions of a prompt once it is through the stack:
    those of blocks that earlier requests ran as well.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        layers: Sequence[int],
        tasks: Mapping[str, DecisionTask] = MappingProxyType({}),
    ) -> None:
        self.bounds = (0, *layers, model.config.num_layers)
        own = model.layers
        self._segments = [Segment(own[begin:end]) for begin, end in pairwise(self.bounds)]
        self._model = model
        self._cache = cache
        self._tasks = tasks
        width, device = model.config.hidden_size, model.device
        # Not cleared: what was not written is not read, and takes no memory on a CPU.
        places = cache.num_blocks * cache.block_size
        self._states = torch.empty(places, width, dtype=model.dtype, device=device)
        self._sums = torch.empty(len(self._segments), cache.num_blocks, width, device=device)
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def run(self, step: Decide) -> tuple[tuple[float, ...], ...]:
        """The step's reads: logits of each one's candidates, or an embedding's d numbers.

        A position's state after the segment takes the place of the one before it.
        """
        spans = [Span(item.positions, item.table, item.coarse) for item in step.work]
        device, size = self._model.device, self._cache.block_size
        rows = HostRows(spans, size, self._model.rotary, device)
        if step.segment == 0:
            ids = [token for item in step.work for token in item.token_ids]
            hidden = self._model.embed(torch.tensor(ids, device=device))
        else:
            hidden = self._states[rows.table.places]
        self._copy(step)
        hidden = self._segments[step.segment](hidden, rows, self._cache)
        self._states[rows.table.places] = hidden
        if self._tasks:
            self._keep_sums(step, hidden)
        if not step.reads:
            return ()
        ends = torch.tensor([len(item.positions) for item in step.work]).cumsum(0) - 1
        last = hidden[ends[[read.work for read in step.reads]].to(device)].float()
        return self._read(step, last)

    def _keep_sums(self, step: Decide, hidden: Tensor) -> None:
        """Sum the rows of each block; a block's rows are always together in a step."""
        size = self._cache.block_size
        blocks: list[int] = []
        lengths: list[int] = []
        for item in step.work:
            start, end = item.positions[0], item.positions[-1] + 1
            while start < end:
                index = start // size
                stop = min(end, (index + 1) * size)
                blocks.append(item.table[index])
                lengths.append(stop - start)
                start = stop
        where = torch.tensor(blocks, device=hidden.device)
        sizes = torch.tensor(lengths, device=hidden.device)
        sums = self._sums[step.segment]
        sums[where] = torch.segment_reduce(hidden.float(), "sum", lengths=sizes)
        if step.copies:
            sources, targets, _ = zip(*step.copies, strict=True)
            sums[list(targets)] += sums[list(sources)]

    def _copy(self, step: Decide) -> None:
        first, end = self.bounds[step.segment : step.segment + 2]
        pages = self._cache.pages[first:end]
        states = self._states.view(self._cache.num_blocks, self._cache.block_size, -1)
        top = step.segment == len(self._segments) - 1
        groups: dict[tuple[int, int], list[int]] = {}
        for source, target, count in step.copies:
            groups.setdefault((source, count), []).append(target)
        for (source, count), targets in groups.items():
            for part in page_parts(pages):
                part[:, :, targets, :count] = part[:, :, source, None, :count]
            if top:
                states[targets, :count] = states[source, :count]

    def _read(self, step: Decide, last: Tensor) -> tuple[tuple[float, ...], ...]:
        found: list[tuple[float, ...]] = [()] * len(step.reads)
        groups: dict[str | None, list[int]] = {}
        for index, read in enumerate(step.reads):
            if read.pooling is not None:
                found[index] = tuple(self._pooled(read, read.pooling).tolist())
            else:
                groups.setdefault(read.task, []).append(index)
        for task, own in groups.items():
            reads = [step.reads[index] for index in own]
            if task is not None:
                made = list(self._heads(self._tasks[task].heads, step.segment, last[own], reads))
            else:
                normed = self._model.normed(last[own].to(self._model.dtype)).float()
                made = [
                    self._rows(read.candidates) @ state
                    for read, state in zip(reads, normed, strict=True)
                ]
            for index, logits in zip(own, made, strict=True):
                found[index] = tuple(logits.tolist())
        return tuple(found)

    def _pooled(self, read: AnswerRead, pooling: Pooling) -> Tensor:
        """The embedding [d] of a prompt that is through the stack, fp32."""
        first = read.length - 1 if pooling is Pooling.LAST else 0
        places = flat_places(read.table, range(first, read.length), self._cache.block_size)
        states = self._states[torch.tensor(places, device=self._model.device)]
        return self._model.normed(states).float().mean(0)

    def _heads(
        self, heads: DecisionHeads, segment: int, last: Tensor, reads: Sequence[AnswerRead]
    ) -> Tensor:
        """Outputs [n, answers] of the heads after a segment."""
        place = heads.layers.index(self.bounds[segment + 1])
        means = torch.stack(
            [self._sums[segment, list(read.table)].sum(0) / read.length for read in reads]
        )
        read = features(last, means, self._model.config.rms_norm_eps)
        return torch.addmm(heads.bias[place], read, heads.weight[place].T)

    def _rows(self, candidates: tuple[int, ...]) -> Tensor:
        """LM-head rows [n, d] of the candidates, fp32."""
        kept = self._kept.pop(candidates, None)
        if kept is None:
            ids = torch.tensor(candidates, device=self._model.device)
            kept = self._model.head_rows(ids).float()
        self._kept[candidates] = kept
        if len(self._kept) > _MOST_ROWS_KEPT:
            del self._kept[next(iter(self._kept))]
        return kept
