"""From a model's own answers to an exit file: split, train each exit, judge on unseen answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from offramp.models.exits.file import ExitFile
from offramp.models.exits.head import ExitHead
from offramp.models.exits.training.checkpoints import Part, Work
from offramp.models.exits.training.hidden_states import States
from offramp.models.exits.training.reduced_vocabulary import Draft, draft_vocab
from offramp.models.exits.training.second_key import (
    Sight,
    fit_fuse,
    floor_for,
    full_log_prob,
    observe,
    two_key_scores,
)
from offramp.models.exits.training.train import (
    Objective,
    Report,
    TrainOptions,
    exit_scores,
    fit_predictor,
    new_head,
    preference_targets,
    threshold_for,
    train_adapter,
    train_gate,
)
from offramp.models.transformer import Transformer

_JUDGE_SHARE = 0.06
_GATE_SHARE = 0.1
_KEY_SHARE = 0.1
ADAPTER = ("scale", "gate_up", "down", "norm")
_GATE = ("router_up", "router_up_bias", "router_down", "router_down_bias")
_PREDICTOR = ("predictor_up", "predictor_up_bias", "predictor_down", "predictor_down_bias")


@dataclass(frozen=True, slots=True)
class Split:
    """Boolean masks [answers]: who learns from an answer.

    Each stage learns from answers that no stage below it has seen: adapters, gates and predictors,
    second keys and floors, and last the thresholds and all figures.
    """

    adapter: Tensor
    gate: Tensor
    key: Tensor
    judge: Tensor


def split_answers(count: int, seed: int) -> Split:
    """Split ``count`` answers at random; each part has at least one of four or more."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    masks = []
    first = 0
    for share in (_GATE_SHARE, _KEY_SHARE, _JUDGE_SHARE):
        last = first + max(1, round(share * count))
        mask = torch.zeros(count, dtype=torch.bool)
        mask[order[first:last]] = True
        masks.append(mask)
        first = last
    gate, key, judge = masks
    return Split(~(gate | key | judge), gate, key, judge)


@dataclass(frozen=True, slots=True)
class _Run:
    """What every stage needs."""

    model: Transformer
    draft: Draft
    options: TrainOptions
    report: Report
    work: Work

    @property
    def eps(self) -> float:
        return self.model.config.rms_norm_eps


def train_exits(
    model: Transformer,
    states: States,
    *,
    fingerprint: str,
    data: dict[str, Any],
    options: TrainOptions,
    report: Report,
    maps: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    work: Work | None = None,
    start: Mapping[int, ExitHead] | None = None,
) -> ExitFile:
    """Train a head for each of the model's exit layers and set its keys and threshold.

    ``maps`` are the K,V maps by exit layer (see kv_map), ``start`` heads whose adapters training
    starts from (as wide as ``options`` say). Finished parts are kept in ``work`` and taken from
    there.
    """
    split = split_answers(int(states.answer_of.max()) + 1, options.seed)

    def part(mask: Tensor) -> States:
        return states.where(mask[states.answer_of])

    for_adapter, for_gate = part(split.adapter), part(split.gate)
    config = model.config
    vocab = draft_vocab(for_adapter.labels, config.eos_token_ids, config.vocab_size, options.vocab)
    run = _Run(model, Draft(model, vocab), options, report, work or Work())
    heads, curves = [], {}
    for layer in model.exit_layers:
        first = (start or {}).get(layer) or new_head(layer, model, options)
        head, curves[str(layer)] = _adapter(run, first, for_adapter, for_gate)
        heads.append(head)
    heads = _gates(run, heads, for_gate)
    heads = _keys(run, heads, part(split.key))
    heads = [_with_map(head, maps or {}) for head in heads]
    for_judge = part(split.judge)
    judged = _verdicts(run, heads, for_judge)
    heads = [_with_threshold(head, own, options) for head, own in zip(heads, judged, strict=True)]
    metrics = judge(heads, judged, config.num_layers)
    metrics |= {"judged_tokens": len(for_judge.labels), "curves": curves}
    data = data | {"train_tokens": len(for_adapter.labels), "gate_tokens": len(for_gate.labels)}
    return ExitFile(fingerprint, tuple(heads), metrics, data, vocab)


def _adapter(
    run: _Run, head: ExitHead, states: States, held_out: States
) -> tuple[ExitHead, list[dict[str, Any]]]:
    """The head with its adapter trained, and the curve over the epochs."""

    def make() -> Part:
        curve = train_adapter(
            head, run.model, states, run.options, run.report, (held_out, run.draft)
        )
        return {name: getattr(head, name) for name in ADAPTER}, {"curve": curve}

    tensors, values = run.work.part(f"adapter-{head.layer}", make)
    return _with_tensors(head, tensors), values["curve"]


def _gates(run: _Run, heads: Sequence[ExitHead], states: States) -> list[ExitHead]:
    """Heads with gates and predictors trained; every adapter is needed for the preference."""
    seen = observe(heads, states, run.draft)
    targets = _targets(run, heads, seen, states)
    return [_gate(run, *args, states) for args in zip(heads, targets, seen, strict=True)]


def _gate(run: _Run, head: ExitHead, target: Tensor, seen: Sight, states: States) -> ExitHead:
    def make() -> Part:
        train_gate(head, target, states, run.options, run.report, run.eps)
        fitted = fit_predictor(head, seen.features, seen.agrees, run.options, run.report)
        return {name: getattr(fitted, name) for name in (*_GATE, *_PREDICTOR)}, {}

    return _with_tensors(head, run.work.part(f"gate-{head.layer}", make)[0])


def _targets(
    run: _Run, heads: Sequence[ExitHead], seen: Sequence[Sight], states: States
) -> list[Tensor]:
    options, layers = run.options, run.model.config.num_layers
    if options.objective is Objective.AGREEMENT:
        return [own.agrees.float() for own in seen]
    log_probs = torch.stack([*(own.log_prob for own in seen), full_log_prob(run.model, states)])
    depths = torch.tensor([*(head.layer for head in heads), layers]) / layers
    weight, cost = options.preference_lambda, options.preference_beta
    return list(preference_targets(log_probs, depths, weight=weight, cost=cost))


def _keys(run: _Run, heads: Sequence[ExitHead], states: States) -> list[ExitHead]:
    """Heads with second key and floor."""
    fused = []
    for head, own in zip(heads, observe(heads, states, run.draft), strict=True):
        gate = exit_scores(head, states.at[head.layer], run.eps)
        keyed = replace(head, fuse=fit_fuse(gate, own.best, own.agrees))
        floor = floor_for(gate, two_key_scores(keyed, gate, own.best))
        fused.append(replace(keyed, floor=floor))
    return fused


@dataclass(frozen=True, slots=True)
class Judged:
    """One exit on n unseen positions: scores [n] of both keys, and which tokens are right [n]."""

    second: Tensor
    gate: Tensor
    right: Tensor


def _verdicts(run: _Run, heads: Sequence[ExitHead], states: States) -> list[Judged]:
    judged = []
    for head, own in zip(heads, observe(heads, states, run.draft), strict=True):
        gate = exit_scores(head, states.at[head.layer], run.eps)
        judged.append(Judged(two_key_scores(head, gate, own.best), gate, own.agrees))
    return judged


def _with_threshold(head: ExitHead, judged: Judged, options: TrainOptions) -> ExitHead:
    threshold = options.threshold
    if threshold is None:
        threshold, _ = threshold_for(judged.second, judged.right, options.precision)
    return replace(head, threshold=threshold)


def _with_tensors(head: ExitHead, tensors: Mapping[str, Tensor]) -> ExitHead:
    """``head`` with tensors as an exit file would give them back, so that figures are of those."""
    rounded: dict[str, Any] = {
        name: tensor.detach().half().float().to(head.scale.device)
        for name, tensor in tensors.items()
    }
    known = {field.name for field in fields(ExitHead)}
    assert known.issuperset(rounded), "parts are named after the head's fields"
    return replace(head, **rounded)


def _with_map(head: ExitHead, maps: Mapping[int, tuple[Tensor, Tensor]]) -> ExitHead:
    kv_map, kv_bias = maps.get(head.layer, (None, None))
    return replace(head, kv_map=kv_map, kv_bias=kv_bias)


def judge(heads: Sequence[ExitHead], judged: Sequence[Judged], num_layers: int) -> dict[str, Any]:
    """Agreement and layers skipped when tokens leave at the first exit whose second key fires.

    Teacher-forced with exact K,V: the K,V of skipped layers cost more on top, which serving
    measures. ``by_gate`` and ``by_second_key`` are the shares of tokens that may leave at an exit
    when sorted by that key alone, while so many of them are right.
    """
    count = len(judged[0].right)
    inside = torch.ones(count, dtype=torch.bool)
    wrong = skipped = 0
    exits: dict[str, Any] = {}
    for head, own in zip(heads, judged, strict=True):
        leaves = inside & (own.second >= head.threshold)
        inside &= ~leaves
        wrong += int((leaves & ~own.right).sum())
        skipped += int(leaves.sum()) * (num_layers - head.layer)
        exits[str(head.layer)] = {
            "agreement_of_all": round(float(own.right.double().mean()), 4),
            "leaves": round(float(leaves.double().mean()), 4),
            "by_second_key": _shares(own.second, own.right),
            "by_gate": _shares(own.gate, own.right),
        }
    return {
        "exits": exits,
        "agreement": round(1 - wrong / count, 4),
        "layers_skipped": round(skipped / (count * num_layers), 4),
    }


def _shares(scores: Tensor, right: Tensor) -> dict[str, float]:
    return {
        f"share_right_at_{precision}": round(threshold_for(scores, right, precision)[1], 4)
        for precision in (0.98, 0.95)
    }
