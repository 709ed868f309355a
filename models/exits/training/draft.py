"""Train a draft head on the model's own answers, by distillation from the full depth.

The head is trained as it is used: its first guess is made from the stack's states, the next ones
from its own (training-time test, EAGLE-3, arXiv 2503.01840), and its weights are rounded to 4 bits.
Each guess learns from the full-depth distribution over the draft vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rotary import RotaryTable, rotate
from offramp.models.config import ModelConfig
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
    Guesses,
    make_batch,
)
from offramp.models.exits.training.second_key import draft_vocab
from offramp.models.exits.training.train import Report
from offramp.models.exits.training.training_model import DenseModel

_WARM_UP_STEPS = 50
_CHECKPOINT_SECONDS = 120
# Rows of logits at a time: as many as stay in a CPU's cache, or keep a GPU busy.
_LOSS_ROWS = {"cpu": 256, "cuda": 8192}
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
        self.config: ModelConfig = model.config
        self.head = head
        self.options = options
        self._device = model.embed.device
        self._embed = model.embed
        self._final_norm = model.weights["final_norm"]
        rows = model.lm_head[head.vocab].detach()
        self._teacher_head, self._lm_head = rows.bfloat16(), rounded(rows.float()).bfloat16()
        self._weights = head.parameters
        self._rotary = RotaryTable(
            torch.tensor(model.config.inv_freq),
            model.max_positions,
            model.config.rope_scale,
            torch.float32,
            model.embed.device,
        )
        self.params = list(head.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.params, lr=options.lr, weight_decay=0.01, betas=(0.9, 0.95)
        )
        self._teacher: Tensor | None = None
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
                for step, (rows, normed, loss) in enumerate(self._guesses(batch)):
                    sure, places = self._likeliest(normed)
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

    def _likeliest(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The largest probability [n] of LM-head inputs [n, d], and where it is."""
        parts = []
        for rows in normed.split(_LOSS_ROWS[self._device.type]):
            logits = (rows.bfloat16() @ self._lm_head.t()).float()
            best, place = logits.max(dim=-1)
            parts.append(((best - logits.logsumexp(dim=-1)).exp(), place))
        return torch.cat([sure for sure, _ in parts]), torch.cat([place for _, place in parts])

    def _learn(self, batch: DraftBatch, progress: float) -> float:
        ramp = min(1.0, (self.step + 1) / _WARM_UP_STEPS)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        self.optimizer.param_groups[0]["lr"] = self.options.lr * ramp * decay
        self.optimizer.zero_grad(set_to_none=True)
        losses = [loss for _, _, loss in self._guesses(batch)]
        weighted = [loss * _STEP_WEIGHT**step for step, loss in enumerate(losses)]
        torch.stack(weighted).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        return float(losses[0].detach())

    def _guesses(self, batch: DraftBatch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each guess the entries it is made at, LM-head inputs there, and its loss."""
        eps = self.config.rms_norm_eps
        # As they will be served; gradients pass the rounding as if it were not there.
        self._weights = self.head.parameters | {
            name: weight + (rounded(weight.detach()) - weight).detach()
            for name, weight in self.head.parameters.items()
            if name in MATRICES
        }
        weights = self._weights
        embedded = rms_norm(F.embedding(batch.ids, self._embed), None, eps)
        # Entry p takes the states of p - 1; a text's first entry has none.
        before = batch.states.roll(1, 0)
        before[batch.starts] = 0
        states = rms_norm(before.float(), None, eps).flatten(1)
        first = batch.steps[0].rows
        top = rms_norm(batch.states[first, -1].float(), self._final_norm, eps)
        teacher = self._teach(top.bfloat16())
        place = torch.full((len(batch.ids),), -1)
        place[first] = torch.arange(len(first))
        own: list[tuple[Tensor, Tensor]] = []
        cross_entropy: Any = _CrossEntropy.apply
        with torch.autocast(self._device.type, torch.bfloat16):
            hidden = F.linear(torch.cat((embedded, states), dim=1), weights["fuse"]).float()
            whole = self._keys_values(hidden, batch.positions)
        shape = (len(batch.starts), batch.longest)
        keys, values = (_padded(part, batch.places, shape) for part in whole)
        shape = (len(batch.starts), batch.most_chains)
        out: Tensor | None = None
        for guesses in batch.steps:
            rows = guesses.rows
            with torch.autocast(self._device.type, torch.bfloat16):
                if out is not None:
                    fed = rms_norm(out[guesses.after], None, eps)
                    inputs = torch.cat((embedded[rows], fed), dim=1)
                    x = F.linear(inputs, weights["feedback"]).float()
                    more = self._keys_values(x, batch.positions[rows])
                    k, v = (_padded(part, guesses.chains, shape) for part in more)
                    own.append((k, v))
                else:
                    x = hidden[rows]
                out = self._layer(x, batch, guesses, keys, values, own)
            normed = rms_norm(out, weights["norm"], eps)
            loss = cross_entropy(normed, self._lm_head, teacher, place[rows])
            yield rows, normed, loss

    def _teach(self, top: Tensor) -> Tensor:
        """Full-depth probabilities [n, v] over the draft vocabulary, until the next batch's."""
        if self._teacher is None or len(self._teacher) < len(top):
            # Kept: fresh memory of this size costs as much as the products that fill it.
            self._teacher = torch.empty(len(top), len(self._teacher_head))
        size = _LOSS_ROWS[self._device.type]
        for rows, to in zip(top.split(size), self._teacher.split(size), strict=False):
            torch.softmax((rows @ self._teacher_head.t()).float(), dim=-1, out=to[: len(rows)])
        return self._teacher

    def _keys_values(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        config, weights = self.config, self._weights
        x = rms_norm(hidden, weights["attn_norm"], config.rms_norm_eps)
        kv = F.linear(x, weights["qkv"][config.query_size :])
        kv = kv.view(len(x), 2, config.num_kv_heads, config.head_dim)
        cos, sin = self._rotary.at(positions)
        return rotate(kv[:, 0].float(), cos, sin), kv[:, 1].float()

    def _layer(
        self,
        hidden: Tensor,
        batch: DraftBatch,
        guesses: Guesses,
        keys: Tensor,
        values: Tensor,
        own: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        config, weights, eps = self.config, self._weights, self.config.rms_norm_eps
        x = rms_norm(hidden, weights["attn_norm"], eps)
        q = F.linear(x, weights["qkv"][: config.query_size]).float()
        q = q.view(len(x), config.num_heads, config.head_dim)
        q = rotate(q, *self._rotary.at(batch.positions[guesses.rows]))
        padded = _padded(q, guesses.chains, (len(batch.starts), batch.most_chains))
        attended = _attend(padded, keys, values, batch.before, own).flatten(0, 1)
        attended = attended[guesses.chains].flatten(1)
        hidden = hidden + F.linear(attended, weights["o"])
        x = rms_norm(hidden, weights["mlp_norm"], eps)
        gate, up = F.linear(x, weights["gate_up"]).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, weights["down"])

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


def _padded(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """``values`` [n, ...] at their ``places`` [n] among [B, width, ...], 0 elsewhere."""
    whole = values.new_zeros(shape[0] * shape[1], *values.shape[1:])
    filled: Tensor = whole.index_copy(0, places, values).unflatten(0, shape)
    return filled


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    before: Tensor,
    own: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Attention of the guesses q [B, C, heads, head_dim] of one step.

    Guess i of a text sees its entries 0 to ``before`` [B] + i, of ``keys`` and ``values``
    [B, T, kv_heads, head_dim], made of the stack's states. Behind them it sees one made of the
    head's own state for each step so far: row i of each of ``own`` [B, C, kv_heads, head_dim].
    """
    texts, count, heads, dim = q.shape
    kv_heads, group = keys.shape[2], heads // keys.shape[2]
    q = q.view(texts, count, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    scores = q.flatten(2, 3) @ keys.permute(0, 2, 3, 1)
    scores = scores.float().unflatten(2, (group, count)) / math.sqrt(dim)
    last = before.unsqueeze(1) + torch.arange(count)
    sees = torch.arange(keys.shape[1]) <= last.unsqueeze(2)
    scores = scores.masked_fill(~sees.view(texts, 1, 1, count, -1), -torch.inf)
    for k, _ in own:
        more = (q * k.transpose(1, 2).unsqueeze(2)).sum(dim=-1, keepdim=True) / math.sqrt(dim)
        scores = torch.cat((scores, more), dim=-1)
    weights = scores.softmax(dim=-1)
    inner = weights[..., : keys.shape[1]].flatten(2, 3)
    out = (inner @ values.transpose(1, 2)).float().unflatten(2, (group, count))
    for index, (_, v) in enumerate(own):
        weight = weights[..., keys.shape[1] + index].unsqueeze(-1)
        out = out + weight * v.transpose(1, 2).unsqueeze(2)
    joined: Tensor = out.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return joined


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy (nats) of guesses with the teacher.

    ``normed`` [n, d], ``lm_head`` [v, d], ``teacher`` [m, v], of which rows ``place`` [n] count.
    Value and gradient in one go over a few rows at a time, so that logits are never all in memory.
    """

    @staticmethod
    def forward(
        ctx: Any, normed: Tensor, lm_head: Tensor, teacher: Tensor, place: Tensor
    ) -> Tensor:
        total = torch.zeros(())
        grads = []
        size = _LOSS_ROWS[normed.device.type]
        for rows, at in zip(normed.split(size), place.split(size), strict=True):
            log_p = (rows.bfloat16() @ lm_head.t()).float().log_softmax(dim=-1)
            target = teacher[at]
            total -= torch.dot(log_p.flatten(), target.flatten())
            if ctx.needs_input_grad[0]:
                grads.append(log_p.exp_().sub_(target).bfloat16() @ lm_head)
        if grads:
            ctx.save_for_backward(torch.cat(grads).float() / len(normed))
        return total / len(normed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grad, None, None, None
