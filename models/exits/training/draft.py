"""Train a draft head on the model's own answers, by distillation from the full depth.

The head is trained as it is used: its first guess is made from the stack's states, the next ones
from its own (training-time test, EAGLE-3, arXiv 2503.01840). Each guess learns from the full-depth
distribution over the draft vocabulary.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rotary import RotaryTable, rotate
from offramp.models.config import ModelConfig
from offramp.models.exits.draft_head import DraftHead
from offramp.models.exits.training.data import Answer
from offramp.models.exits.training.pipeline import Part, Work
from offramp.models.exits.training.train import Report
from offramp.models.exits.training.training_model import DenseModel

_SHARD = 256
_COLLECT_TOKENS = 4096
_WARM_UP_STEPS = 50
_CHECKPOINT_SECONDS = 120
_LOSS_ROWS = 256
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
    batch: int = 4096
    lr: float = 1.5e-3
    minutes: float | None = None
    seed: int = 0


class DraftFeatures:
    """States along answers, in shards of 256 answers that ``work`` keeps on disk as fp16."""

    def __init__(self, paths: Sequence[Path], answers: Sequence[Answer]) -> None:
        self.answers = answers
        self._files = [safe_open(path, "pt") for path in paths]
        self._starts: list[int] = []
        for first in range(0, len(answers), _SHARD):
            start = 0
            for item in answers[first : first + _SHARD]:
                self._starts.append(start)
                start += _length(item)

    def of(self, index: int) -> Tensor:
        """States [T, F, d] of all positions of an answer but its last token's."""
        start = self._starts[index]
        size = _length(self.answers[index])
        file: Any = self._files[index // _SHARD]
        states: Tensor = file.get_slice("states")[start : start + size]
        return states


def collect_features(
    model: DenseModel,
    answers: Sequence[Answer],
    layers: Sequence[int],
    work: Work,
    progress: Callable[[int], None],
) -> DraftFeatures:
    """States after ``layers`` at every position of prompts and answers, teacher-forced."""
    paths = []
    for first in range(0, len(answers), _SHARD):
        own = answers[first : first + _SHARD]
        name = f"draft-states-{first // _SHARD:05d}"
        path = work.path(f"{name}.safetensors")
        assert path is not None, "features need a folder"
        if not path.exists():
            work.part(name, functools.partial(_shard, model, own, layers))
        paths.append(path)
        progress(first + len(own))
    return DraftFeatures(paths, answers)


@torch.inference_mode()
def _shard(model: DenseModel, answers: Sequence[Answer], layers: Sequence[int]) -> Part:
    found: dict[int, Tensor] = {}
    order = sorted(range(len(answers)), key=lambda index: _length(answers[index]))
    while order:
        longest = _length(answers[order[-1]])
        count = max(1, _COLLECT_TOKENS // longest)
        batch, order = order[-count:], order[:-count]
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, index in enumerate(batch):
            text = (*answers[index].prompt, *answers[index].answer[:-1])
            ids[row, : len(text)] = torch.tensor(text)
        device = model.embed.device
        with torch.autocast(device.type, torch.bfloat16):
            seen = model(ids.to(device), layers)
        states = torch.stack([seen.at[layer] for layer in layers], dim=2).half().cpu()
        for row, index in enumerate(batch):
            found[index] = states[row, : _length(answers[index])].clone()
    return {"states": torch.cat([found[index] for index in range(len(answers))])}, {}


def _length(item: Answer) -> int:
    return len(item.prompt) + len(item.answer) - 1


def new_draft_head(
    model: DenseModel, layers: Sequence[int], vocab: Tensor, scale: float, seed: int
) -> DraftHead:
    """A head whose decoder layer starts as the model's last one.

    ``scale`` is the root mean square of states that such a layer is used to.
    """
    d = model.config.hidden_size
    prefix = f"layers.{model.config.num_layers - 1}."
    generator = torch.Generator().manual_seed(seed)

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
        vocab=vocab,
    )


@dataclass(frozen=True, slots=True)
class _Batch:
    """Texts one after another: ``ids``, the tokens ``following`` and ``positions`` [N].

    ``states`` [N, F, d] are the stack's there.
    ``spans`` lists of each text where it begins, its length, and the position of its first guess.
    """

    ids: Tensor
    following: Tensor
    positions: Tensor
    states: Tensor
    spans: list[tuple[int, int, int]]

    def rows(self, step: int) -> Tensor:
        """The entries that make the guesses of ``step`` (0: from the stack's states)."""
        return torch.cat(
            [
                torch.arange(start + min(first + step, size), start + size)
                for start, size, first in self.spans
            ]
        )


class DraftTrainer:
    """Training in progress: the tensors of ``head`` change in place."""

    def __init__(self, model: DenseModel, head: DraftHead, options: DraftOptions) -> None:
        self.config: ModelConfig = model.config
        self.head = head
        self.options = options
        self._embed = model.embed
        self._final_norm = model.weights["final_norm"]
        self._lm_head = model.lm_head[head.vocab].detach().bfloat16()
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
        per_epoch = len(list(self._groups(features, 0)))
        total = per_epoch * self.options.epochs
        saved, before, begun = time.monotonic(), self.seconds, time.monotonic()
        loss = 0.0
        while (progress := self._progress(total)) < 1:
            epoch, done = divmod(self.step, per_epoch)
            if done == 0:
                self._note(epoch, held_out)
            for group in list(self._groups(features, epoch))[done:]:
                progress = self._progress(total)
                if progress >= 1:
                    break
                loss += 0.05 * (self._learn(_batch(features, group), progress) - loss)
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
    def acceptance(self, features: DraftFeatures) -> tuple[list[float], float]:
        """The share of guesses that are the answer's own token, each given those before, and loss.

        On greedy answers that is the share that verification accepts.
        """
        asked, right = [0] * self.options.guesses, [0] * self.options.guesses
        losses, count = 0.0, 0
        for group in _groups(features.answers, range(len(features.answers)), self.options.batch):
            batch = _batch(features, group)
            alive = torch.ones(len(batch.ids), dtype=torch.bool)
            for step, (rows, normed, loss) in enumerate(self._guesses(batch)):
                if step == 0:
                    losses += float(loss) * len(rows)
                    count += len(rows)
                places = (normed.bfloat16() @ self._lm_head.t()).argmax(dim=-1)
                correct = self.head.vocab[places] == batch.following[rows]
                # The chain that begins at entry r makes its next guess at r + 1, if this one holds.
                asking = alive[rows - step]
                asked[step] += int(asking.sum())
                right[step] += int((correct & asking).sum())
                alive = torch.zeros_like(alive)
                alive[rows[correct & asking] - step] = True
        return [a / max(1, b) for a, b in zip(right, asked, strict=True)], losses / max(1, count)

    def _learn(self, batch: _Batch, progress: float) -> float:
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

    def _guesses(self, batch: _Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each guess the entries it is made at, LM-head inputs there, and its loss."""
        head, eps = self.head, self.config.rms_norm_eps
        embedded = rms_norm(F.embedding(batch.ids, self._embed), None, eps)
        # Entry p takes the states of p - 1; a text's first entry has none.
        before = torch.zeros_like(batch.states)
        before[1:] = batch.states[:-1]
        before[[start for start, _, _ in batch.spans]] = 0
        states = rms_norm(before.float(), None, eps).flatten(1)
        first = batch.rows(0)
        top = rms_norm(batch.states[first, -1].float(), self._final_norm, eps)
        teacher = self._teach(top.bfloat16())
        place = torch.full((len(batch.ids),), -1)
        place[first] = torch.arange(len(first))
        own: list[tuple[Tensor, Tensor]] = []
        cross_entropy: Any = _CrossEntropy.apply
        with torch.autocast("cpu", torch.bfloat16):
            hidden = F.linear(torch.cat((embedded, states), dim=1), head.fuse).float()
            keys, values = self._keys_values(hidden, batch.positions)
        out: Tensor | None = None
        for step in range(self.options.guesses):
            rows = batch.rows(step)
            with torch.autocast("cpu", torch.bfloat16):
                if out is not None:
                    kept = [torch.arange(max(0, n - 1)) + at for at, n in _parts(batch, step - 1)]
                    fed = rms_norm(out[torch.cat(kept)], None, eps)
                    x = F.linear(torch.cat((embedded[rows], fed), dim=1), head.feedback).float()
                    own.append(self._keys_values(x, batch.positions[rows]))
                else:
                    x = hidden[rows]
                out = self._layer(x, batch, step, keys, values, own)
            normed = rms_norm(out, head.norm, eps)
            loss = cross_entropy(normed, self._lm_head, teacher, place[rows])
            yield rows, normed, loss

    def _teach(self, top: Tensor) -> Tensor:
        """Full-depth probabilities [n, v] over the draft vocabulary, until the next batch's."""
        if self._teacher is None or len(self._teacher) < len(top):
            # Kept: fresh memory of this size costs as much as the products that fill it.
            self._teacher = torch.empty(len(top), len(self._lm_head))
        for rows, to in zip(top.split(_LOSS_ROWS), self._teacher.split(_LOSS_ROWS), strict=False):
            torch.softmax((rows @ self._lm_head.t()).float(), dim=-1, out=to[: len(rows)])
        return self._teacher

    def _keys_values(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        config, head = self.config, self.head
        x = rms_norm(hidden, head.attn_norm, config.rms_norm_eps)
        kv = F.linear(x, head.qkv[config.query_size :])
        kv = kv.view(len(x), 2, config.num_kv_heads, config.head_dim)
        cos, sin = self._rotary.at(positions)
        return rotate(kv[:, 0].float(), cos, sin), kv[:, 1].float()

    def _layer(
        self,
        hidden: Tensor,
        batch: _Batch,
        step: int,
        keys: Tensor,
        values: Tensor,
        own: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        config, head, eps = self.config, self.head, self.config.rms_norm_eps
        x = rms_norm(hidden, head.attn_norm, eps)
        q = F.linear(x, head.qkv[: config.query_size]).float()
        q = q.view(len(x), config.num_heads, config.head_dim)
        q = rotate(q, *self._rotary.at(batch.positions[batch.rows(step)]))
        parts = []
        for index, (at, count) in enumerate(_parts(batch, step)):
            start, size, first = batch.spans[index]
            ahead = []
            for earlier, (k, v) in enumerate(own, start=1):
                from_ = _parts(batch, earlier)[index][0]
                ahead.append((k[from_ : from_ + count], v[from_ : from_ + count]))
            text = slice(start, start + size)
            parts.append(_attend(q[at : at + count], keys[text], values[text], first, ahead))
        attended = torch.cat(parts).flatten(1)
        hidden = hidden + F.linear(attended, head.o)
        x = rms_norm(hidden, head.mlp_norm, eps)
        gate, up = F.linear(x, head.gate_up).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, head.down)

    def _progress(self, total: int) -> float:
        limit = self.options.minutes
        return max(self.step / total, 0.0 if limit is None else self.seconds / (60 * limit))

    def _groups(self, features: DraftFeatures, epoch: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.options.seed + epoch)
        order = torch.randperm(len(features.answers), generator=generator).tolist()
        return _groups(features.answers, order, self.options.batch)

    def _note(self, epoch: float, held_out: DraftFeatures) -> None:
        shares, loss = self.acceptance(held_out)
        row = {"epoch": round(epoch, 2), "step": self.step, "loss": round(loss, 4)}
        self.curve.append(row | {"acceptance": [round(share, 4) for share in shares]})

    def _save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        state: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "params": [param.detach().cpu() for param in self.params],
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, partial)
        partial.replace(path)

    def _restore(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
        with torch.no_grad():
            for param, kept in zip(self.params, state["params"], strict=True):
                param.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])


def _groups(answers: Sequence[Answer], order: Sequence[int], positions: int) -> Iterator[list[int]]:
    """Indices in ``order``, cut into groups of about so many answer positions."""
    group: list[int] = []
    size = 0
    for index in order:
        if len(answers[index].answer) < 2:
            continue
        group.append(index)
        size += len(answers[index].answer)
        if size >= positions:
            yield group
            group, size = [], 0
    if group:
        yield group


def _batch(features: DraftFeatures, group: Sequence[int]) -> _Batch:
    ids: list[int] = []
    following: list[int] = []
    positions: list[int] = []
    spans = []
    for index in group:
        item = features.answers[index]
        text = (*item.prompt, *item.answer[:-1])
        # The answer's first token is made by the prompt's last position; guesses begin behind it.
        spans.append((len(ids), len(text), len(item.prompt)))
        ids += text
        following += (*text[1:], item.answer[-1])
        positions += range(len(text))
    states = torch.cat([features.of(index) for index in group])
    columns = [torch.tensor(each) for each in (ids, following, positions)]
    return _Batch(columns[0], columns[1], columns[2], states, spans)


def _parts(batch: _Batch, step: int) -> list[tuple[int, int]]:
    """Where each text's guesses begin among all of ``step``, and how many they are."""
    parts, at = [], 0
    for _, size, first in batch.spans:
        count = max(0, size - first - step)
        parts.append((at, count))
        at += count
    return parts


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: int,
    own: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Attention of the guesses q [n, heads, head_dim] of one text, in one step.

    Guess i sees the entries 0 to ``first`` + i made of the stack's states, and behind them one made
    of the head's own state for each step so far: row i of each of ``own``.
    """
    count, heads, dim = q.shape
    kv_heads, group = keys.shape[1], heads // keys.shape[1]
    q = q.view(count, kv_heads, group, dim).permute(1, 2, 0, 3)
    scores = q.flatten(1, 2) @ keys.permute(1, 2, 0)
    scores = scores.float().view(kv_heads, group, count, keys.shape[0]) / math.sqrt(dim)
    sees = torch.arange(keys.shape[0]) <= first + torch.arange(count).unsqueeze(1)
    scores = scores.masked_fill(~sees, -torch.inf)
    for k, _ in own:
        more = (q * k.transpose(0, 1).unsqueeze(1)).sum(dim=-1, keepdim=True) / math.sqrt(dim)
        scores = torch.cat((scores, more), dim=-1)
    weights = scores.softmax(dim=-1)
    inner = weights[..., : keys.shape[0]].flatten(1, 2)
    out = (inner @ values.transpose(0, 1)).float().view(kv_heads, group, count, dim)
    for index, (_, v) in enumerate(own):
        weight = weights[..., keys.shape[0] + index].unsqueeze(-1)
        out = out + weight * v.transpose(0, 1).unsqueeze(1)
    return out.permute(2, 0, 1, 3).reshape(count, heads, dim)


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
        for rows, at in zip(normed.split(_LOSS_ROWS), place.split(_LOSS_ROWS), strict=True):
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
