"""From a model's own answers to an exit file: split, train each exit, judge on unseen answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offramp.models.exit_head import ExitHead
from offramp.models.exits.file import ExitFile
from offramp.models.exits.states import States
from offramp.models.exits.train import (
    Report,
    TrainOptions,
    exit_scores,
    exit_tokens,
    new_head,
    threshold_for,
    train_adapter,
    train_gate,
)
from offramp.models.transformer import Transformer

_JUDGE_SHARE = 0.06
_GATE_SHARE = 0.2


def split_answers(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boolean masks [count] over answers: for adapters, for gates, for judging."""
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    judge = draw < _JUDGE_SHARE
    gate = (draw >= _JUDGE_SHARE) & (draw < _JUDGE_SHARE + _GATE_SHARE)
    return ~(judge | gate), gate, judge


def train_exits(
    model: Transformer,
    states: States,
    *,
    fingerprint: str,
    data: dict[str, Any],
    options: TrainOptions,
    report: Report,
    maps: Mapping[int, tuple[Tensor, Tensor]] | None = None,
) -> ExitFile:
    """Train a head for each of the model's exit layers and set its threshold.

    ``maps`` are the K,V maps by exit layer (see kv_map).
    """
    answers = int(states.answer_of.max()) + 1
    parts = [states.where(mask[states.answer_of]) for mask in split_answers(answers, options.seed)]
    for_adapter, for_gate, for_judge = parts
    maps = maps or {}
    heads: list[ExitHead] = []
    judged: list[tuple[Tensor, Tensor]] = []
    eps = model.config.rms_norm_eps
    for layer in model.exit_layers:
        head = new_head(layer, model, options)
        train_adapter(head, model, for_adapter, options, report)
        agrees = exit_tokens(head, model, for_gate.at[layer]) == for_gate.labels
        train_gate(head, agrees, for_gate, options, report, eps)
        scores = exit_scores(head, for_judge.at[layer], eps)
        right = exit_tokens(head, model, for_judge.at[layer]) == for_judge.labels
        threshold = options.threshold
        if threshold is None:
            threshold, _ = threshold_for(scores, right, options.precision)
        kv_map, kv_bias = maps.get(layer, (None, None))
        heads.append(replace(head, threshold=threshold, kv_map=kv_map, kv_bias=kv_bias))
        judged.append((scores, right))
    metrics = judge(heads, judged, model.config.num_layers)
    metrics["judged_tokens"] = len(for_judge.labels)
    data = data | {"train_tokens": len(for_adapter.labels), "gate_tokens": len(for_gate.labels)}
    return ExitFile(fingerprint, tuple(heads), metrics, data)


def judge(
    heads: Sequence[ExitHead], judged: Sequence[tuple[Tensor, Tensor]], num_layers: int
) -> dict[str, Any]:
    """Agreement and layers skipped when tokens leave at the first exit whose gate fires.

    ``judged`` holds scores and correctness [n] of each exit. Teacher-forced with exact K,V: the K,V
    of skipped layers cost more on top, which serving measures.
    """
    count = len(judged[0][0])
    inside = torch.ones(count, dtype=torch.bool)
    wrong = skipped = 0
    exits: dict[str, Any] = {}
    for head, (scores, right) in zip(heads, judged, strict=True):
        leaves = inside & (scores >= head.threshold)
        inside &= ~leaves
        wrong += int((leaves & ~right).sum())
        skipped += int(leaves.sum()) * (num_layers - head.layer)
        exits[str(head.layer)] = {
            "agreement_of_all": round(float(right.double().mean()), 4),
            "leaves": round(float(leaves.double().mean()), 4),
            "share_right_at_0.98": round(threshold_for(scores, right, 0.98)[1], 4),
            "share_right_at_0.95": round(threshold_for(scores, right, 0.95)[1], 4),
        }
    return {
        "exits": exits,
        "agreement": round(1 - wrong / count, 4),
        "layers_skipped": round(skipped / (count * num_layers), 4),
    }
