"""Train a draft head on the model's own answers, by distillation from the full depth.

The head is trained as it is used: its first guess is made from the stack's states, the next ones
from its own (training-time test, EAGLE-3, arXiv 2503.01840), and its weights are rounded to 4 bits.
Each guess learns from the full-depth distribution over the draft vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.models.exits.draft_head import (
    CHANCE_BINS,
    MATRICES,
    DraftFile,
    DraftHead,
    rounded,
)
from offramp.models.exits.training.checkpoint import restore_checkpoint, save_checkpoint
from offramp.models.exits.training.draft_data import (
    DraftBatch,
    DraftFeatures,
    make_batch,
)
from offramp.models.exits.training.draft_model import DraftModel
from offramp.models.exits.training.second_key import draft_vocab
from offramp.models.exits.training.train import Report
from offramp.models.exits.training.training_model import DenseModel

_WARM_UP_STEPS = 50
_CHECKPOINT_SECONDS = 120
_REPORT_STEPS = 5
# A guess counts only if those before it are right, so later ones weigh less.
_STEP_WEIGHT = 0.8


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """Sizes and schedule.

    ``vocab`` counts the tokens the head can guess; ``guesses`` are made from its own states but the
    first, in training; ``batch`` counts answer positions in a step. ``minutes`` ends the training,
    schedule included, wherever it is then.
    """

    vocab: int = 8192
    guesses: int = 3
    epochs: int = 6
    batch: int = 2048
    lr: float = 1.2e-3
    minutes: float | None = None
    seed: int = 0


def new_draft_head(
    model: DenseModel, features: DraftFeatures, layers: Sequence[int], options: DraftOptions
) -> DraftHead:
    """A head whose decoder layer starts as the model's last one.

    It can guess the tokens that are most frequent in the answers of ``features``.
    """
    generator = torch.Generator().manual_seed(options.seed)
    # As large as the states that such a layer is used to: half way to those that it makes.
    scale = 0.5 * float(features.states([0])[:, -1].float().square().mean().sqrt())
    labels = torch.tensor([token for item in features.answers for token in item.answer])
    config = model.config
    vocab = draft_vocab(labels, config.eos_token_ids, config.vocab_size, options.vocab)
    if vocab is None:
        vocab = torch.arange(config.vocab_size)
    d = model.config.hidden_size
    prefix = f"layers.{model.config.num_layers - 1}."

    def of(name: str) -> Tensor:
        return model.weights[f"{prefix}{name}"].detach().clone().float()

    def joined(parts: int) -> Tensor:
        """Takes its last input through, and hardly the others."""
        noise = 0.02 * torch.randn(d, parts * d, generator=generator)
        noise[:, -d:] += scale * torch.eye(d)
        return noise.to(model.embed.device)

    return DraftHead(
        layers=tuple(layers),
        fuse=joined(1 + len(layers)),
        feedback=joined(2),
        attn_norm=of("attn_norm"),
        qkv=of("qkv"),
        o=of("o"),
        mlp_norm=of("mlp_norm"),
        gate_up=of("gate_up"),
        down=of("down"),
        norm=model.weights["final_norm"].detach().clone().float(),
        vocab=vocab.to(model.embed.device),
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a draft head guesses held-out answers.

    ``acceptance[j]`` is the share of the (j + 1)-th guesses that are the answer's own token where
    those before it are; ``loss`` the cross-entropy (nats) of first guesses with the full depth;
    ``chances`` as in DraftFile; ``positions`` the number of first guesses.
    """

    acceptance: list[float]
    loss: float
    chances: tuple[tuple[float, float], ...]
    positions: int


class DraftTrainer:
    """Training in progress: the tensors of ``head`` change in place."""

    def __init__(self, model: DenseModel, head: DraftHead, options: DraftOptions) -> None:
        self.head = head
        self.options = options
        self._device = model.embed.device
        self._model = DraftModel(model, head)
        self.params = list(head.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.params, lr=options.lr, weight_decay=0.01, betas=(0.9, 0.95)
        )
        self.step = 0
        self.seconds = 0.0
        self.curve: list[dict[str, Any]] = []

    def train(
        self,
        features: DraftFeatures,
        held_out: DraftFeatures,
        report: Report,
        checkpoint: Path | None = None,
    ) -> None:
        """Train on ``features``, judged on ``held_out`` after every epoch.

        Goes on from ``checkpoint`` if it exists, and writes it.
        """
        if checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint)
        for param in self.params:
            param.requires_grad_(True)
        per_epoch = self._batches(features)
        total = per_epoch * self.options.epochs
        saved, before, begun = time.monotonic(), self.seconds, time.monotonic()
        loss: float | None = None
        while (progress := self._progress(total)) < 1:
            epoch, done = divmod(self.step, per_epoch)
            if done == 0:
                self._note(epoch, held_out)
            for group in self._groups(features, epoch)[done:]:
                progress = self._progress(total)
                if progress >= 1:
                    break
                with self._device:
                    found = self._learn(self._batch(features, group), progress)
                loss = found if loss is None else loss + 0.05 * (found - loss)
                self.step += 1
                self.seconds = before + time.monotonic() - begun
                if self.step % _REPORT_STEPS == 0:
                    report("draft head", int(1000 * self._progress(total)), 1000, loss)
                if checkpoint is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self._save(checkpoint)
                    saved = time.monotonic()
        self._note(self.step / per_epoch, held_out)
        for param in self.params:
            param.requires_grad_(False)

    @torch.no_grad()
    def judge(self, features: DraftFeatures) -> Verdict:
        """How the head guesses answers: on greedy ones, what verification would accept."""
        asked, right = [0] * self.options.guesses, [0] * self.options.guesses
        counts = torch.zeros(2, CHANCE_BINS)
        losses = 0.0
        with self._device:
            for group in self._groups(features):
                batch = self._batch(features, group)
                alive = torch.ones(len(batch.ids), dtype=torch.bool)
                for step, (rows, normed, loss) in enumerate(self._model.guesses(batch)):
                    sure, places = self._model.likeliest(normed)
                    correct = self.head.vocab[places] == batch.following[rows]
                    if step == 0:
                        losses += float(loss) * len(rows)
                        tenth = (CHANCE_BINS * sure).long().clamp_max(CHANCE_BINS - 1).cpu()
                        counts[0] += torch.bincount(tenth, minlength=CHANCE_BINS)
                        counts[1] += torch.bincount(tenth[correct.cpu()], minlength=CHANCE_BINS)
                    # A chain that begins at entry r makes its next guess at r + 1, if this holds.
                    asking = alive[rows - step]
                    asked[step] += int(asking.sum())
                    right[step] += int((correct & asking).sum())
                    alive = torch.zeros_like(alive)
                    alive[rows[correct & asking] - step] = True
        total = max(1.0, float(counts[0].sum()))
        # Where nothing fell, the middle of the tenth stands in.
        middles = (torch.arange(CHANCE_BINS) + 0.5) / CHANCE_BINS
        rates = (counts[1] + middles) / (counts[0] + 1)
        return Verdict(
            [a / max(1, b) for a, b in zip(right, asked, strict=True)],
            losses / total,
            tuple(zip((counts[0] / total).tolist(), rates.tolist(), strict=True)),
            int(total),
        )

    def file(self, held_out: DraftFeatures, fingerprint: str, data: dict[str, Any]) -> DraftFile:
        """The head as it would be read from a file, judged on ``held_out``.

        ``fingerprint`` is the model's, ``data`` what the head was trained on.
        """
        for name in MATRICES:
            weight = getattr(self.head, name)
            weight.copy_(rounded(weight))
        found = self.judge(held_out)
        metrics = {
            "acceptance": [round(share, 4) for share in found.acceptance],
            "loss": round(found.loss, 4),
            "positions": found.positions,
            "curve": self.curve,
        }
        chances = tuple((round(share, 4), round(rate, 4)) for share, rate in found.chances)
        return DraftFile(fingerprint, self.head, chances, metrics, data)

    def _learn(self, batch: DraftBatch, progress: float) -> float:
        ramp = min(1.0, (self.step + 1) / _WARM_UP_STEPS)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        self.optimizer.param_groups[0]["lr"] = self.options.lr * ramp * decay
        self.optimizer.zero_grad(set_to_none=True)
        losses = [loss for _, _, loss in self._model.guesses(batch)]
        weighted = [loss * _STEP_WEIGHT**step for step, loss in enumerate(losses)]
        torch.stack(weighted).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        return float(losses[0].detach())

    def _batch(self, features: DraftFeatures, group: Sequence[int]) -> DraftBatch:
        return make_batch(features, group, self.options.guesses, self._device)

    def _progress(self, total: int) -> float:
        limit = self.options.minutes
        return max(self.step / total, 0.0 if limit is None else self.seconds / (60 * limit))

    def _batches(self, features: DraftFeatures) -> int:
        """Batches that the answers make, of about as many positions as wanted."""
        positions = sum(len(item.answer) for item in features.answers)
        return min(len(features.answers), max(1, round(positions / self.options.batch)))

    def _groups(self, features: DraftFeatures, epoch: int | None = None) -> list[list[int]]:
        """All answers, in order or in an epoch's own, cut into batches."""
        count = len(features.answers)
        order = torch.arange(count, device="cpu")
        if epoch is not None:
            generator = torch.Generator().manual_seed(self.options.seed + epoch)
            order = torch.randperm(count, generator=generator, device="cpu")
        return [part.tolist() for part in order.tensor_split(self._batches(features))]

    def _note(self, epoch: float, held_out: DraftFeatures) -> None:
        found = self.judge(held_out)
        row = {"epoch": round(epoch, 2), "step": self.step, "loss": round(found.loss, 4)}
        self.curve.append(row | {"acceptance": [round(share, 4) for share in found.acceptance]})

    def _save(self, path: Path) -> None:
        values = {"step": self.step, "seconds": self.seconds, "curve": self.curve}
        save_checkpoint(path, self.params, self.optimizer, **values)

    def _restore(self, path: Path) -> None:
        state = restore_checkpoint(path, self.params, self.optimizer)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
