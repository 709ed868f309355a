"""Tune a backbone for its exits with low-rank deltas, its full-depth output held by distillation.

The recipe is LayerSkip's (arXiv 2404.16710): layer dropout that rises with depth, and losses at the
exits whose weight rises with depth, enabled by a curriculum. Here every loss is the divergence from
the original model's full-depth distribution, at the exits and at full depth, so that the tuned
model stays the one it was. Exits learn with adapters that start as the shared final norm.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.models.exits.deltas import Deltas
from offramp.models.exits.head import ADAPTER, ExitHead
from offramp.models.exits.training.checkpoint import restore_checkpoint, save_checkpoint
from offramp.models.exits.training.data import Answer
from offramp.models.exits.training.train import Report
from offramp.models.exits.training.training_model import DenseModel

_WARM_UP_STEPS = 20
_CHECKPOINT_SECONDS = 60
_REPORT_STEPS = 5
# Untrained exits diverge by many nats. For this share of the training their adapters learn alone,
# and over the same share again the deltas join in; else that would push the backbone about first.
_HEAD_START = 0.1
# Of the sampled vocabulary; rare tokens must not drift upwards unseen.
_RANDOM_SHARE = 0.25
# Padded tokens, and positions with logits over the whole vocabulary, that `compare` takes at once.
_COMPARED_TOKENS = 2048
_COMPARED_ROWS = 256


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

    ``lr`` is the deltas' learning rate, ``adapter_lr`` the adapters'. ``batch_tokens`` counts
    padded tokens in a step, ``layer_dropout`` is the last layer's rate, ``exit_weight`` weighs the
    exits' losses together against the full depth's (1). ``vocab_sample`` tokens and the step's own
    stand for the vocabulary, 0 for all of it.
    ``minutes`` ends the training, schedule included, wherever it is then; only without it are equal
    seeds sure to give equal results.
    """

    rank: int = 64
    lr: float = 5e-4
    adapter_lr: float = 1.5e-3
    epochs: int = 1
    batch_tokens: int = 16384
    layer_dropout: float = 0.1
    exit_weight: float = 1.0
    curriculum: Curriculum = Curriculum.ROTATE
    vocab_sample: int = 6000
    minutes: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded token ids [B, T]; ``rows`` [n] are the flat places that make answer tokens.

    ``labels`` [n] are those answer tokens.
    """

    ids: Tensor
    rows: Tensor
    labels: Tensor


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
    for index, item in enumerate(items):
        text = (*item.prompt, *item.answer[:-1])
        ids[index, : len(text)] = torch.tensor(text)
        first = index * longest
        rows += range(first + len(item.prompt) - 1, first + len(text))
        labels += item.answer
    return Batch(ids.to(device), torch.tensor(rows).to(device), torch.tensor(labels).to(device))


class Tuner:
    """Tuning in progress: ``deltas`` and the adapters of ``heads`` change in place.

    ``base`` is the original model, the teacher; ``heads`` are one exit head for each exit layer.
    """

    def __init__(
        self, base: DenseModel, deltas: Deltas, heads: Sequence[ExitHead], options: TuneOptions
    ) -> None:
        self.base = base
        self.student = base.with_deltas(deltas.low)
        self.heads = heads
        self.options = options
        self.layers = [head.layer for head in heads]
        factors = [factor for pair in deltas.low.values() for factor in pair]
        adapters = [getattr(head, name) for head in heads for name in ADAPTER]
        self.params = factors + adapters
        groups = [{"params": factors}, {"params": adapters}]
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
        self.optimizer.zero_grad(set_to_none=True)
        # What chance there is in a step depends on its number alone, so a resumed run meets it too.
        generator = torch.Generator().manual_seed((options.seed << 32) + self.step)
        vocab = self._vocab(batch, frequent, generator)
        device = batch.ids.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = self._loss(batch, vocab, generator, progress)
        loss.backward()
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()
        return loss.detach()

    def _set_rates(self, progress: float) -> None:
        ramp = min(1.0, (self.step + 1) / _WARM_UP_STEPS)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        joined = min(1.0, max(0.0, progress / _HEAD_START - 1))
        deltas, adapters = self.optimizer.param_groups
        deltas["lr"] = self.options.lr * ramp * decay * joined
        adapters["lr"] = self.options.adapter_lr * ramp * decay

    def _loss(
        self, batch: Batch, vocab: Tensor | None, generator: torch.Generator, progress: float
    ) -> Tensor:
        """Divergence (nats per token) from the original, at full depth and the active exits."""
        config, options = self.base.config, self.options
        rows = self.base.lm_head if vocab is None else self.base.lm_head[vocab]
        with torch.no_grad():
            original = self.base.normed(self.base(batch.ids).last.flatten(0, 1)[batch.rows])
            teacher = F.linear(original, rows).float().softmax(dim=-1)

        def divergence(normed: Tensor) -> Tensor:
            log_p = F.linear(normed, rows).float().log_softmax(dim=-1)
            return F.kl_div(log_p, teacher, reduction="batchmean")

        rates = dropout_rates(config.num_layers, options.layer_dropout)
        draw = torch.rand(config.num_layers, len(batch.ids), generator=generator)
        states = self.student(batch.ids, self.layers, draw >= rates.unsqueeze(1))
        loss = divergence(self.student.normed(states.last.flatten(0, 1)[batch.rows]))
        active = active_exits(options.curriculum, len(self.heads), self.step, progress)
        weights = exit_weights(self.layers, active, options.exit_weight)
        for head, weight in zip(self.heads, weights, strict=True):
            if weight:
                own = states.at[head.layer].flatten(0, 1)[batch.rows]
                loss = loss + weight * divergence(head.normed(own, config.rms_norm_eps))
        return loss

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


@torch.no_grad()
def compare(
    base: DenseModel, tuned: DenseModel, heads: Sequence[ExitHead], answers: Sequence[Answer]
) -> dict[str, Any]:
    """Figures of both models on ``answers`` of the original, teacher-forced, whole vocabulary.

    ``perplexity`` of the full-depth output on the answers; ``kept_choices``, the share of tokens at
    which the tuned full depth chooses as the original does; ``divergence`` (nats per token) of the
    tuned full depth from the original; for each exit the share of tokens at which it agrees with
    its own model's full depth, through the shared norm and LM head (both models) and through the
    tuned adapters of ``heads``.
    """
    layers = [head.layer for head in heads]
    sums: defaultdict[str, float] = defaultdict(float)
    for batch in make_batches(answers, _COMPARED_TOKENS, base.embed.device):
        before, after = base(batch.ids, layers), tuned(batch.ids, layers)
        for rows, labels in zip(
            batch.rows.split(_COMPARED_ROWS), batch.labels.split(_COMPARED_ROWS), strict=True
        ):
            original = _log_probs(base, base.normed(before.last.flatten(0, 1)[rows]))
            now = _log_probs(tuned, tuned.normed(after.last.flatten(0, 1)[rows]))
            sums["tokens"] += len(rows)
            sums["nll before"] += float(F.nll_loss(original, labels, reduction="sum"))
            sums["nll after"] += float(F.nll_loss(now, labels, reduction="sum"))
            sums["kept"] += int((original.argmax(-1) == now.argmax(-1)).sum())
            sums["kl"] += float(F.kl_div(now, original, reduction="sum", log_target=True))
            for head in heads:
                low, high = (s.at[head.layer].flatten(0, 1)[rows] for s in (before, after))
                adapted = head.normed(high, base.config.rms_norm_eps)
                seen = (
                    ("before", base.normed(low), original),
                    ("after", tuned.normed(high), now),
                    ("adapter", adapted, now),
                )
                for name, normed, full in seen:
                    same = _log_probs(base, normed).argmax(-1) == full.argmax(-1)
                    sums[f"{head.layer} {name}"] += int(same.sum())
    return _figures(sums, layers)


def _log_probs(model: DenseModel, normed: Tensor) -> Tensor:
    return F.linear(normed, model.lm_head.to(normed.dtype)).float().log_softmax(dim=-1)


def _figures(sums: Mapping[str, float], layers: Sequence[int]) -> dict[str, Any]:
    def mean(name: str) -> float:
        return sums[name] / sums["tokens"]

    return {
        "tokens": int(sums["tokens"]),
        "perplexity": {
            when: round(math.exp(mean(f"nll {when}")), 4) for when in ("before", "after")
        },
        "kept_choices": round(mean("kept"), 4),
        "divergence": round(mean("kl"), 5),
        "exits": {
            str(layer): {
                "shared_before": round(mean(f"{layer} before"), 4),
                "shared_after": round(mean(f"{layer} after"), 4),
                "adapter_after": round(mean(f"{layer} adapter"), 4),
            }
            for layer in layers
        },
    }
