"""Before and after: what tuning did to a backbone, on answers that it was not tuned on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.models.exits.head import ExitHead
from offramp.models.exits.training.hidden_states import Answer
from offramp.models.exits.training.training_model import DenseModel
from offramp.models.exits.training.tune import make_batches

_BATCH_TOKENS = 2048
_CHUNK = 256


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
    for batch in make_batches(answers, _BATCH_TOKENS, base.embed.device):
        before, after = base(batch.ids, layers), tuned(batch.ids, layers)
        for rows, labels in zip(batch.rows.split(_CHUNK), batch.labels.split(_CHUNK), strict=True):
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
