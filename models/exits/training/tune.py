"""Tune a backbone for its exits with low-rank deltas, its full-depth output held by distillation.

The recipe begins with LayerSkip's (arXiv 2404.16710): layer dropout that rises with depth, and
losses at the exits whose weight rises with depth, enabled by a curriculum. Here every loss is the
divergence from the original model's full-depth distribution, at the exits and at full depth, so
that the tuned model stays the one it was. Exits learn with adapters that start as the shared final
norm.

What is trained is what is served: in a share of the sequences tokens leave at the first exit that
is sure enough of them, the layers above do not change their states, and their keys and values there
are made from the exit state by a map that learns as well (ADEPT, arXiv 2601.03700, learns one of
hidden states). Weights that were published on a 4-bit grid are used rounded to that grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.weight_formats import WeightFormat, available
from offramp.models.config import ModelConfig
from offramp.models.exits.deltas import Deltas, Grid
from offramp.models.exits.head import ADAPTER, ExitHead
from offramp.models.exits.training.checkpoint import restore_checkpoint, save_checkpoint
from offramp.models.exits.training.data import Answer
from offramp.models.exits.training.train import Report
from offramp.models.exits.training.training_model import DenseModel, Left

_WARM_UP_STEPS = 20
_CHECKPOINT_SECONDS = 60
_REPORT_STEPS = 5
# Of the sampled vocabulary; rare tokens must not drift upwards unseen.
_RANDOM_SHARE = 0.25
# How sure an exit has to be, by its top probability, is drawn from here to 1 for each sequence.
_LEAST_SURE = 0.5


KVMaps = Mapping[int, tuple[Tensor, Tensor]]
"""By exit layer, weight and bias of its map to the keys and values above it."""


class Curriculum(StrEnum):
    """Which exits learn in a step.

    ``rotate``: one after another. ``gradual``: the deepest first, all of them from the middle of
    the training on. ``all``: always all.
    """

    ROTATE = "rotate"
    GRADUAL = "gradual"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """Sizes and schedule.

    ``lr`` is the deltas' learning rate, ``adapter_lr`` the adapters', ``map_lr`` that of the K,V
    maps, which are fitted before. ``batch_tokens`` counts
    padded tokens in a step, ``layer_dropout`` is the last layer's rate at the start, which falls to
    0 in the course of the training; ``exit_weight`` weighs the exits' losses together against the
    full depth's (1). ``leaving`` is the share of sequences in which tokens leave. ``vocab_sample``
    tokens and the step's own stand for the vocabulary, 0 for all of it.
    ``head_start`` is the share of the training in which adapters learn alone, and over which the
    deltas then join in: untrained exits diverge by many nats, which would push the backbone about.
    ``minutes`` ends the training, schedule included, wherever it is then; only without it are equal
    seeds sure to give equal results.
    """

    rank: int = 64
    lr: float = 5e-4
    adapter_lr: float = 1.5e-3
    map_lr: float = 1e-4
    epochs: int = 1
    batch_tokens: int = 16384
    layer_dropout: float = 0.1
    exit_weight: float = 1.0
    leaving: float = 0.5
    curriculum: Curriculum = Curriculum.ROTATE
    vocab_sample: int = 6000
    head_start: float = 0.1
    minutes: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded token ids [B, T]; ``rows`` [n] are the flat places that make answer tokens.

    ``labels`` [n] are those answer tokens, ``owner`` [n] their sequences. The place before an
    answer's first token, a prompt's last, is the ``first`` [n] of its sequence.
    """

    ids: Tensor
    rows: Tensor
    labels: Tensor
    owner: Tensor
    first: Tensor


def dropout_rates(layers: int, highest: float) -> Tensor:
    """Rates [layers] of layer dropout, rising exponentially from 0 to ``highest``."""
    depth = torch.arange(layers) / max(1, layers - 1)
    return highest * (torch.exp(depth * math.log(2)) - 1)


def exit_weights(layers: Sequence[int], active: Sequence[bool], total: float) -> list[float]:
    """Weights of the exits' losses: in proportion to depth, 0 where not active.

    Active ones together weigh ``total``, so that the balance with the full depth stays.
    """
    shares = [layer if on else 0 for layer, on in zip(layers, active, strict=True)]
    return [total * share / max(1, sum(shares)) for share in shares]


def active_exits(curriculum: Curriculum, exits: int, step: int, progress: float) -> list[bool]:
    """Which of ``exits`` (bottom up) learn in ``step``, at ``progress`` (0 to 1)."""
    if curriculum is Curriculum.ROTATE:
        return [index == step % exits for index in range(exits)]
    if curriculum is Curriculum.GRADUAL:
        enabled = min(exits, 1 + int(2 * progress * exits))
        return [index >= exits - enabled for index in range(exits)]
    return [True] * exits


def make_batches(answers: Sequence[Answer], tokens: int, device: torch.device) -> list[Batch]:
    """Answers of similar length together, at most ``tokens`` padded tokens each."""

    def size(item: Answer) -> int:
        return len(item.prompt) + len(item.answer) - 1

    groups: list[list[Answer]] = [[]]
    for item in sorted(answers, key=size):
        if groups[-1] and size(item) * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(item)
    return [_padded(group, size(group[-1]), device) for group in groups if group]


def _padded(items: Sequence[Answer], longest: int, device: torch.device) -> Batch:
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    rows: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    for index, item in enumerate(items):
        text = (*item.prompt, *item.answer[:-1])
        ids[index, : len(text)] = torch.tensor(text)
        begin = index * longest
        rows += range(begin + len(item.prompt) - 1, begin + len(text))
        labels += item.answer
        owner += [index] * len(item.answer)
    owners = torch.tensor(owner)
    first = torch.ones(len(owner), dtype=torch.bool)
    first[1:] = owners.diff() != 0
    parts = (ids, torch.tensor(rows), torch.tensor(labels), owners, first)
    return Batch(*(part.to(device) for part in parts))


class Tuner:
    """Tuning in progress: ``deltas``, the adapters of ``heads`` and ``maps`` change in place.

    ``base`` is the original model, the teacher; ``heads`` are one exit head for each exit layer,
    bottom up, and ``maps`` by exit layer the weight [skipped layers * 2 * kv_size, d] and bias that
    make keys and values above it (see ExitHead).
    """

    def __init__(
        self,
        base: DenseModel,
        deltas: Deltas,
        heads: Sequence[ExitHead],
        maps: KVMaps,
        options: TuneOptions,
    ) -> None:
        self.base = base
        self.deltas = deltas
        self.heads = heads
        self.maps = maps
        self.options = options
        self.layers = [head.layer for head in heads]
        found = {name: Grid.of(base.weights[name]) for name in deltas.low if deltas.on_grid}
        self._grids = {name: grid for name, grid in found.items() if grid is not None}
        self._student = base.with_deltas(deltas.low)
        factors = [factor for pair in deltas.low.values() for factor in pair]
        filling = [part for layer in self.layers for part in maps[layer]]
        adapters = [getattr(head, name) for head in heads for name in ADAPTER]
        self.params = [*factors, *filling, *adapters]
        groups = [{"params": factors}, {"params": filling}, {"params": adapters}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=options.lr, weight_decay=0.01, betas=(0.9, 0.98)
        )
        self.step = 0
        self.seconds = 0.0

    def train(
        self, answers: Sequence[Answer], report: Report, checkpoint: Path | None = None
    ) -> None:
        """Tune on ``answers``; goes on from ``checkpoint`` if it exists, and writes it."""
        options = self.options
        batches = make_batches(answers, options.batch_tokens, self.base.embed.device)
        frequent = self._frequent(answers)
        total = len(batches) * options.epochs
        if checkpoint is not None and checkpoint.exists():
            state = restore_checkpoint(checkpoint, self.params, self.optimizer)
            self.step, self.seconds = state["step"], state["seconds"]
        for param in self.params:
            param.requires_grad_(True)
        saved, before, begun = time.monotonic(), self.seconds, time.monotonic()
        loss = torch.tensor(0.0)
        for index in self._order(len(batches)):
            progress = self._progress(total)
            if progress >= 1:
                break
            loss = self._learn(batches[index], frequent, progress)
            self.step += 1
            self.seconds = before + time.monotonic() - begun
            if self.step % _REPORT_STEPS == 0:
                report("backbone", min(999, int(1000 * self._progress(total))), 1000, float(loss))
            if checkpoint is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                progressed = {"step": self.step, "seconds": self.seconds}
                save_checkpoint(checkpoint, self.params, self.optimizer, **progressed)
                saved = time.monotonic()
        report("backbone", 1000, 1000, float(loss))
        for param in self.params:
            param.requires_grad_(False)

    def _progress(self, total: int) -> float:
        """Share of the training done, by steps or time, whichever is further."""
        limit = self.options.minutes
        return max(self.step / total, 0.0 if limit is None else self.seconds / (60 * limit))

    def _order(self, batches: int) -> Iterator[int]:
        """Batches from the current step on, shuffled anew in every epoch."""
        for epoch in range(self.step // batches, self.options.epochs):
            generator = torch.Generator().manual_seed(self.options.seed + epoch)
            order: list[int] = torch.randperm(batches, generator=generator).tolist()
            yield from order[max(0, self.step - epoch * batches) :]

    def _learn(self, batch: Batch, frequent: Tensor, progress: float) -> Tensor:
        options = self.options
        self._set_rates(progress)
        self._student = self.base.with_deltas(self.deltas.low, self._rounded())
        self.optimizer.zero_grad(set_to_none=True)
        # What chance there is in a step depends on its number alone, so a resumed run meets it too.
        generator = torch.Generator().manual_seed((options.seed << 32) + self.step)
        vocab = self._vocab(batch, frequent, generator)
        device = batch.ids.device
        with torch.autocast(device.type, torch.bfloat16, enabled=_reduces(device)):
            loss = self._loss(batch, vocab, generator, progress)
        loss.backward()
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()
        return loss.detach()

    def _set_rates(self, progress: float) -> None:
        ramp = min(1.0, (self.step + 1) / _WARM_UP_STEPS)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        head_start = self.options.head_start
        joined = min(1.0, max(0.0, progress / head_start - 1)) if head_start else 1.0
        deltas, maps, adapters = self.optimizer.param_groups
        deltas["lr"] = self.options.lr * ramp * decay * joined
        maps["lr"] = self.options.map_lr * ramp * decay * joined
        adapters["lr"] = self.options.adapter_lr * ramp * decay

    @torch.no_grad()
    def _rounded(self) -> dict[str, Tensor]:
        """Weights on a grid with their deltas, as they are served."""
        rounded: dict[str, Tensor] = {}
        for name, grid in self._grids.items():
            down, up = self.deltas.low[name]
            weight = grid.nearest(self.base.weights[name], up @ down)
            rounded[name] = weight.bfloat16() if _reduces(weight.device) else weight
        return rounded

    def _loss(
        self, batch: Batch, vocab: Tensor | None, generator: torch.Generator, progress: float
    ) -> Tensor:
        """Divergence (nats per token) from the original: of the output, and of the active exits.

        A token's output is that of the exit where it left, or of full depth.
        """
        config, options, student = self.base.config, self.options, self._student
        rows = self.base.lm_head if vocab is None else self.base.lm_head[vocab]
        with torch.no_grad():
            original = self.base.normed(self.base(batch.ids).last.flatten(0, 1)[batch.rows])
            teacher = F.linear(original, rows).float().softmax(dim=-1)

        rates = dropout_rates(config.num_layers, options.layer_dropout * (1 - progress))
        draw = torch.rand(config.num_layers, len(batch.ids), generator=generator)
        keep = draw >= rates.unsqueeze(1)
        sure = _bounds(batch, options.leaving, generator)
        active = active_exits(options.curriculum, len(self.heads), self.step, progress)
        weights = exit_weights(self.layers, active, options.exit_weight)
        loss = torch.zeros((), device=batch.ids.device)
        hidden, first, left = student.embedded(batch.ids), 0, None
        inside = torch.ones_like(batch.first)
        for head, weight in zip(self.heads, weights, strict=True):
            hidden = student.run(hidden, first, head.layer, keep, left)
            first = head.layer
            if not weight and not options.leaving:
                continue
            own = hidden.flatten(0, 1)[batch.rows]
            log_p = F.linear(head.normed(own, config.rms_norm_eps), rows).float().log_softmax(-1)
            apart = F.kl_div(log_p, teacher, reduction="none").sum(-1)
            if weight:
                loss = loss + weight * apart[inside].sum() / max(1, int(inside.sum()))
            leaves = inside & (log_p.detach().amax(-1).exp() >= sure)
            if bool(leaves.any()):
                loss = loss + apart[leaves].sum() / len(apart)
                filling = self.maps[head.layer]
                left = joined(left, left_after(config, head.layer, own, filling, batch, leaves))
                inside = inside & ~leaves
        hidden = student.run(hidden, first, config.num_layers, keep, left)
        own = student.normed(hidden.flatten(0, 1)[batch.rows])
        log_p = F.linear(own, rows).float().log_softmax(-1)
        apart = F.kl_div(log_p, teacher, reduction="none").sum(-1)
        return loss + apart[inside].sum() / len(apart)

    def _frequent(self, answers: Sequence[Answer]) -> Tensor:
        size = self.base.config.vocab_size
        labels = torch.tensor([token for item in answers for token in item.answer])
        count = int(self.options.vocab_sample * (1 - _RANDOM_SHARE))
        counts = torch.bincount(labels, minlength=size)
        return counts.sort(descending=True, stable=True).indices[:count]

    def _vocab(self, batch: Batch, frequent: Tensor, generator: torch.Generator) -> Tensor | None:
        """Token ids that stand for the vocabulary in one step; None for all."""
        size, wanted = self.base.config.vocab_size, self.options.vocab_sample
        if wanted == 0 or wanted >= size:
            return None
        drawn = torch.randint(size, (int(wanted * _RANDOM_SHARE),), generator=generator)
        ids: Tensor = torch.cat((frequent, drawn, batch.labels.cpu())).unique()
        return ids.to(batch.ids.device)


def left_after(
    config: ModelConfig,
    layer: int,
    states: Tensor,
    projection: tuple[Tensor, Tensor],
    batch: Batch,
    leaves: Tensor,
) -> Left:
    """What the rows of ``batch`` that ``leaves`` [n] selects leave behind after ``layer``.

    ``states`` [n, d] are those of all rows there, ``projection`` the weight and bias of the exit's
    map.
    """
    rows, shape = batch.rows[leaves], batch.ids.shape
    mask = torch.zeros(shape.numel(), dtype=torch.bool, device=rows.device)
    mask[rows] = True
    normed = rms_norm(states[leaves], None, config.rms_norm_eps)
    above = range(layer, config.num_layers)
    parts = F.linear(normed, *projection).chunk(len(above), dim=-1)
    return Left(rows, mask.view(*shape, 1), dict(zip(above, parts, strict=True)))


def joined(before: Left | None, later: Left) -> Left:
    """All tokens that left, at an exit below and at this one."""
    return later if before is None else before.joined(later)


def _bounds(batch: Batch, leaving: float, generator: torch.Generator) -> Tensor:
    """Top probability [n] at which a token leaves; out of reach where it must not."""
    device, sequences = batch.ids.device, len(batch.ids)
    bounds = _LEAST_SURE + (1 - _LEAST_SURE) * torch.rand(sequences, generator=generator)
    stays = torch.rand(sequences, generator=generator) >= leaving
    chosen = bounds.masked_fill(stays, math.inf).to(device)[batch.owner]
    return chosen.masked_fill(batch.first, math.inf)


def _reduces(device: torch.device) -> bool:
    """Whether products run in bf16: where the device has them, with accumulation in fp32."""
    return device.type == "cuda" or available(WeightFormat.ONEDNN_BF16)
