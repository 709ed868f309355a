"""What tuning a backbone did to it and to its exits, on answers of the original."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.models.exits.head import ExitHead
from offramp.models.exits.training.data import Answer
from offramp.models.exits.training.training_model import DenseModel
from offramp.models.exits.training.tune import Batch, KVMaps, joined, left_after, make_batches

# Padded tokens, and positions with logits over the whole vocabulary, taken at once.
_COMPARED_TOKENS = 2048
_COMPARED_ROWS = 256
# Top probabilities at which tokens leave.
_BOUNDS = (0.99, 0.97, 0.95, 0.9, 0.8)


@torch.no_grad()
def compare(
    base: DenseModel,
    tuned: DenseModel,
    heads: Sequence[ExitHead],
    maps: KVMaps,
    answers: Sequence[Answer],
) -> dict[str, Any]:
    """Figures of both models on ``answers`` of the original, teacher-forced, whole vocabulary.

    ``perplexity`` of the full-depth output on the answers; ``kept_choices``, the share of tokens at
    which the tuned full depth chooses as the original does; ``divergence`` (nats per token) of the
    tuned full depth from the original; for each exit the share of tokens at which it agrees with
    its own model's full depth, through the shared norm and LM head (both models) and through the
    tuned adapters of ``heads``. ``leaving``: see `with_exits`.
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
    leaving = with_exits(tuned, heads, maps, answers, _BOUNDS)
    return _figures(sums, layers) | {"leaving": leaving}


@torch.no_grad()
def with_exits(
    model: DenseModel,
    heads: Sequence[ExitHead],
    maps: KVMaps,
    answers: Sequence[Answer],
    bounds: Sequence[float],
) -> list[dict[str, float]]:
    """Tokens leave at the first exit whose top probability reaches a bound; teacher-forced.

    For each of ``bounds``: ``skipped`` is the share of the answers' layers that did not run,
    ``agreement`` the share of tokens that are those of ``model`` at full depth and with all keys
    and values of its own, ``wrong_at_exits`` that of tokens that left and are not.
    """
    sums = {bound: Counter[str]() for bound in bounds}
    count = 0
    for batch in make_batches(answers, _COMPARED_TOKENS, model.embed.device):
        full = model.normed(model(batch.ids).last.flatten(0, 1)[batch.rows])
        wanted, _ = _likeliest(model, full)
        count += len(wanted)
        for bound in bounds:
            sums[bound].update(_leaving(model, heads, maps, batch, bound, wanted))
    layers = model.config.num_layers
    return [
        {
            "bound": bound,
            "skipped": round(own["skipped"] / (count * layers), 4),
            "agreement": round(own["same"] / count, 4),
            "wrong_at_exits": round(own["wrong"] / count, 4),
        }
        for bound, own in sums.items()
    ]


def _leaving(
    model: DenseModel,
    heads: Sequence[ExitHead],
    maps: KVMaps,
    batch: Batch,
    bound: float,
    wanted: Tensor,
) -> dict[str, int]:
    """Of one batch: tokens that are the ``wanted`` ones, wrong ones that left, layers skipped."""
    config = model.config
    wrong = skipped = 0
    found = torch.zeros_like(wanted)
    hidden, first, left = model.embedded(batch.ids), 0, None
    inside = torch.ones_like(batch.first)
    for head in heads:
        hidden = model.run(hidden, first, head.layer, None, left)
        first = head.layer
        own = hidden.flatten(0, 1)[batch.rows]
        tokens, sure = _likeliest(model, head.normed(own, config.rms_norm_eps))
        leaves = inside & ~batch.first & (sure >= bound)
        found = torch.where(leaves, tokens, found)
        wrong += int((tokens != wanted)[leaves].sum())
        skipped += int(leaves.sum()) * (config.num_layers - head.layer)
        left = joined(left, left_after(config, head.layer, own, maps[head.layer], batch, leaves))
        inside = inside & ~leaves
    last = model.run(hidden, first, config.num_layers, None, left).flatten(0, 1)[batch.rows]
    found[inside], _ = _likeliest(model, model.normed(last[inside]))
    return {"same": int((found == wanted).sum()), "wrong": wrong, "skipped": skipped}


def _likeliest(model: DenseModel, normed: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row [n], and its probability."""
    parts = [_log_probs(model, part).max(-1) for part in normed.split(_COMPARED_ROWS)]
    return torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts]).exp()


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
