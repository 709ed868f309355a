"""A draft head as a differentiable function of whole texts, with its loss, for training.

Serving makes entries and guesses one after another over paged K,V; this makes those of all
positions of an answer at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rotary import RotaryTable, rotate
from offramp.models.exits.draft_head import MATRICES, DraftHead, rounded
from offramp.models.exits.training.draft_data import DraftBatch, Guesses
from offramp.models.exits.training.training_model import DenseModel

# Rows of logits at a time: as many as stay in a CPU's cache, or keep a GPU busy.
_LOSS_ROWS = {"cpu": 256, "cuda": 8192}


class DraftModel:
    """``head`` for the ``model`` whose full depth it learns to guess."""

    def __init__(self, model: DenseModel, head: DraftHead) -> None:
        self._config = model.config
        self._head = head
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
        self._teacher: Tensor | None = None

    def guesses(self, batch: DraftBatch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each guess the entries it is made at, LM-head inputs there, and its loss."""
        eps = self._config.rms_norm_eps
        # As they will be served; gradients pass the rounding as if it were not there.
        self._weights = self._head.parameters | {
            name: weight + (rounded(weight.detach()) - weight).detach()
            for name, weight in self._head.parameters.items()
            if name in MATRICES
        }
        weights = self._weights
        embedded = rms_norm(F.embedding(batch.ids, self._embed), None, eps)
        # Entry p takes the states of p - 1; a text's first entry has none.
        shifted = batch.states.roll(1, 0)
        shifted[batch.starts] = 0
        states = rms_norm(shifted.float(), None, eps).flatten(1)
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
        config, weights = self._config, self._weights
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
        config, weights, eps = self._config, self._weights, self._config.rms_norm_eps
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

    def likeliest(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The largest probability [n] of LM-head inputs [n, d], and where it is."""
        parts = []
        for rows in normed.split(_LOSS_ROWS[self._device.type]):
            logits = (rows.bfloat16() @ self._lm_head.t()).float()
            best, place = logits.max(dim=-1)
            parts.append(((best - logits.logsumexp(dim=-1)).exp(), place))
        return torch.cat([sure for sure, _ in parts]), torch.cat([place for _, place in parts])


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
