"""The backbone that ``offramp exits train`` trains exits on: as it is, or tuned for them first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.models.config import ModelConfig
from offramp.models.errors import ModelError
from offramp.models.exits.deltas import (
    Deltas,
    apply_deltas,
    delta_paths,
    new_deltas,
    save_deltas,
    tuned_fingerprint,
)
from offramp.models.exits.head import ADAPTER, ExitHead
from offramp.models.exits.training.compare import compare
from offramp.models.exits.training.data import Answer
from offramp.models.exits.training.pipeline import Part, Work, split_answers
from offramp.models.exits.training.train import Report, fit_kv_maps
from offramp.models.exits.training.training_model import DenseModel
from offramp.models.exits.training.tune import KVMaps, TuneOptions, Tuner
from offramp.models.loading.formats import Recipes
from offramp.models.loading.safetensors import fingerprint
from offramp.models.transformer import Transformer

# Answers from which the maps are fitted that tuning starts from.
_FIRST_FIT = 256


class PlacementError(ModelError):
    """The device that --device names is not there."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """Weights to train exits on, where training runs; ``fingerprint`` goes into the exit file.

    Matrices are kept as ``recipes`` say (None: exactly). A tuned one has its ``deltas``, the exits'
    ``heads`` and K,V ``maps`` as tuning left them, and its ``report``.
    """

    weights: Mapping[str, Tensor]
    fingerprint: str
    deltas: Deltas | None = None
    heads: tuple[ExitHead, ...] = ()
    maps: KVMaps | None = None
    report: dict[str, Any] | None = None
    recipes: Recipes | None = None

    def save_deltas(self, exit_file: Path) -> list[Path]:
        """Write the deltas beside ``exit_file``; those of an earlier training there go."""
        if self.deltas is not None:
            return save_deltas(self.deltas, exit_file)
        for stale in delta_paths(exit_file):
            stale.unlink()
        return []


def tuned_backbone(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    answers: Sequence[Answer],
    start: Sequence[ExitHead],
    *,
    device: torch.device,
    tuning: TuneOptions,
    seed: int,
    report: Report,
    work: Work,
) -> Backbone:
    """The model tuned for its exits, on the answers that train adapters; judged on unseen ones.

    ``start`` are the heads that it starts with. ``seed`` is that of the exits' training, which
    splits the answers.
    """
    placed = on_device(weights, device)
    longest = max(len(item.prompt) + len(item.answer) for item in answers)
    base = DenseModel(config, placed, longest)
    fresh = new_deltas(
        placed,
        config,
        fingerprint=fingerprint(placed),
        rank=tuning.rank,
        seed=tuning.seed,
        on_grid=True,
    )
    heads = [_copied(head) for head in start]
    exit_layers = tuple(head.layer for head in heads)
    split = split_answers(len(answers), seed)
    seen = [answers[i] for i in split.adapter.nonzero().flatten().tolist()]

    checkpoint = work.path("tuning.pt")

    def make() -> Part:
        maps = _maps(heads)
        if maps is None:
            first = Transformer(config, placed, exit_layers, longest)
            fitted = fit_kv_maps(first, seen[:_FIRST_FIT])
            # They were made for inference, and are to be trained.
            maps = {layer: (w.clone(), b.clone()) for layer, (w, b) in fitted.items()}
        tuner = Tuner(base, fresh, heads, maps, tuning)
        tuner.train(seen, report, checkpoint)
        unseen = [answers[i] for i in split.judge.nonzero().flatten().tolist()]
        stored = _on(fresh.stored(), device)
        served = DenseModel(config, apply_deltas(placed, stored), longest)
        values = compare(base, served, heads, maps, unseen)
        return _tensors(stored, heads, maps), {"steps": tuner.step, **values}

    tensors, values = work.part("backbone", make)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    deltas = _on(_deltas(fresh, tensors), device)
    tuned = tuple(replace(head, **_adapter(tensors, head.layer, device)) for head in heads)
    maps = {
        layer: (tensors[f"map.{layer}.weight"], tensors[f"map.{layer}.bias"])
        for layer in exit_layers
    }
    merged = apply_deltas(placed, deltas)
    return Backbone(merged, tuned_fingerprint(deltas), deltas, tuned, maps, values)


def _copied(head: ExitHead) -> ExitHead:
    names = (*ADAPTER, "kv_map", "kv_bias")
    own: dict[str, Any] = {name: getattr(head, name) for name in names}
    return replace(head, **{name: part.clone() for name, part in own.items() if part is not None})


def _maps(heads: Sequence[ExitHead]) -> KVMaps | None:
    """The heads' own maps, unless one of them has none."""
    maps: dict[int, tuple[Tensor, Tensor]] = {}
    for head in heads:
        if head.kv_map is None or head.kv_bias is None:
            return None
        maps[head.layer] = head.kv_map, head.kv_bias
    return maps


def device_of(name: str) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``cuda``; raises PlacementError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise PlacementError("--device cuda: torch sees no CUDA device; use --device cpu")
    return torch.device(name)


def on_device(weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """All tensors on ``device``."""
    return {name: tensor.to(device) for name, tensor in weights.items()}


def _tensors(deltas: Deltas, heads: Sequence[ExitHead], maps: KVMaps) -> dict[str, Tensor]:
    low = {
        f"{name}.{kind}": tensor
        for name, pair in deltas.low.items()
        for kind, tensor in zip(("down", "up"), pair, strict=True)
    }
    own = {f"exit.{head.layer}.{name}": getattr(head, name) for head in heads for name in ADAPTER}
    filling = {
        f"map.{layer}.{kind}": tensor
        for layer, pair in maps.items()
        for kind, tensor in zip(("weight", "bias"), pair, strict=True)
    }
    return low | own | filling


def _deltas(like: Deltas, tensors: Mapping[str, Tensor]) -> Deltas:
    low = {name: (tensors[f"{name}.down"], tensors[f"{name}.up"]) for name in like.low}
    return replace(like, low=low)


def _adapter(tensors: Mapping[str, Tensor], layer: int, device: torch.device) -> dict[str, Any]:
    return {name: tensors[f"exit.{layer}.{name}"].detach().clone().to(device) for name in ADAPTER}


def _on(deltas: Deltas, device: torch.device) -> Deltas:
    low = {name: (down.to(device), up.to(device)) for name, (down, up) in deltas.low.items()}
    return replace(deltas, low=low)
