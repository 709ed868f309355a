"""Heads that answer questions with fixed answers from the states of a layer inside the stack.

A head reads the last position's state and the mean over all positions of the prompt: the mean is
what makes early layers speak. A *task* is one question that was trained for; the general head
serves every question with the model's own words for its answers. What the file says of quality is
agreement with the answer at full depth, tested as for tokens (Learn then Test, arXiv 2110.01052).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.kernels.rms_norm import rms_norm
from offramp.models.config import ModelConfig
from offramp.models.errors import ModelError
from offramp.models.exits.file import (
    check_finite,
    raw_metadata,
    read_safetensors,
    save_safetensors,
    shipped,
)

FORMAT = "offramp-decisions-1"
SUFFIX = ".decisions.safetensors"
_WHAT = "decision heads"
_CPU = torch.device("cpu")


class DecisionFileError(ModelError):
    """The file holds no decision heads, or none for this model."""


@dataclass(frozen=True, slots=True)
class DecisionPoint:
    """A calibrated operating point: the probability at which an answer leaves at each layer.

    On held-out inputs at least ``quality`` of all answers were full depth's, with 95 % confidence;
    ``agreement`` and ``mean_layer`` are what was seen there.
    """

    quality: float
    thresholds: tuple[float, ...]
    agreement: float
    mean_layer: float


@dataclass(frozen=True, slots=True)
class DecisionHeads:
    """Linear heads ``weight`` [k, out, 2 d], ``bias`` [k, out] after k ``layers``, ascending.

    The general heads have out = d: what they make is multiplied by the LM head's rows of the
    answers' tokens. Those of a task have one output an answer.
    """

    layers: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    points: tuple[DecisionPoint, ...] = ()

    def point(self, quality: float) -> DecisionPoint | None:
        """The fastest point that keeps ``quality``, if there is one."""
        good = [point for point in self.points if point.quality >= quality]
        return min(good, key=lambda point: point.quality, default=None)


@dataclass(frozen=True, slots=True)
class DecisionTask:
    """One question that heads were trained for, the last of them at full depth.

    ``wording`` is the question as the model reads it, ``labels`` are its answers in the order of
    the heads' outputs.
    """

    name: str
    wording: str
    labels: tuple[str, ...]
    heads: DecisionHeads
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DecisionFile:
    """Decision heads of one model."""

    fingerprint: str
    general: DecisionHeads | None = None
    tasks: Mapping[str, DecisionTask] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers after which some head reads, ascending."""
        sets = [task.heads.layers for task in self.tasks.values()]
        if self.general is not None:
            sets.append(self.general.layers)
        return tuple(sorted({layer for layers in sets for layer in layers}))

    def save(self, path: Path) -> None:
        """Write atomically, weights in fp16."""
        tensors: dict[str, Tensor] = {}
        general: dict[str, Any] | None = None
        if self.general is not None:
            general = {**_described(self.general), "metrics": self.metrics}
            tensors |= _tensors("general", self.general)
        tasks = {}
        for index, task in enumerate(self.tasks.values()):
            tensors |= _tensors(f"task.{index}", task.heads)
            tasks[task.name] = {
                **_described(task.heads),
                "wording": task.wording,
                "labels": task.labels,
                "metrics": task.metrics,
            }
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "layers": json.dumps(self.layers),
            "general": json.dumps(general),
            "tasks": json.dumps(tasks),
        }
        save_safetensors(path, tensors, metadata)


def features(last: Tensor, mean: Tensor, eps: float) -> Tensor:
    """What heads read, [n, 2 d], from states [n, d]: both divided by their root mean square."""
    return torch.cat((rms_norm(last, None, eps), rms_norm(mean, None, eps)), dim=1)


def load_decision_heads(
    path: Path,
    *,
    fingerprint: str,
    config: ModelConfig,
    device: torch.device = _CPU,
) -> DecisionFile:
    """Read the heads of the model with this ``fingerprint``, fp32; raises DecisionFileError."""
    raw = raw_metadata(path, _WHAT, DecisionFileError)
    if raw.get("format") != FORMAT:
        raise DecisionFileError(f"{path} holds no decision heads of format {FORMAT}")
    if raw.get("fingerprint") != fingerprint:
        raise DecisionFileError(
            f"{path} holds decision heads of another model (fingerprint {raw.get('fingerprint')}, "
            f"this model has {fingerprint}); train some for it with `offramp exits train-task`"
        )
    _, stored = read_safetensors(path, _WHAT, DecisionFileError)
    check_finite(path, stored, DecisionFileError)
    stored = {name: tensor.to(device) for name, tensor in stored.items()}
    try:
        general, tasks = json.loads(raw["general"]), json.loads(raw["tasks"])
        heads = None
        if general is not None:
            heads = _heads("general", general, stored, config, config.hidden_size)
            if heads.layers[-1] >= config.num_layers:
                raise ValueError("the general heads reach full depth, where the LM head answers")
        made = {}
        for index, (name, own) in enumerate(tasks.items()):
            found = _heads(f"task.{index}", own, stored, config, len(own["labels"]))
            if found.layers[-1] != config.num_layers:
                raise ValueError(f"task {name} has no head at full depth")
            labels = tuple(own["labels"])
            made[name] = DecisionTask(name, own["wording"], labels, found, own["metrics"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DecisionFileError(f"{path}: {reason}") from error
    metrics = general["metrics"] if general else {}
    return DecisionFile(fingerprint, heads, made, metrics)


def shipped_decision_heads(fingerprint: str) -> Path | None:
    """The decision heads that come with Offramp for this model, if there are any."""
    return shipped(FORMAT, fingerprint)


def _described(heads: DecisionHeads) -> dict[str, Any]:
    points = [[p.quality, p.thresholds, p.agreement, p.mean_layer] for p in heads.points]
    return {"layers": heads.layers, "points": points}


def _tensors(name: str, heads: DecisionHeads) -> dict[str, Tensor]:
    return {
        f"{name}.weight": heads.weight.half().contiguous().cpu(),
        f"{name}.bias": heads.bias.float().contiguous().cpu(),
    }


def _heads(
    name: str, own: Mapping[str, Any], stored: Mapping[str, Tensor], config: ModelConfig, out: int
) -> DecisionHeads:
    layers = tuple(own["layers"])
    weight, bias = stored[f"{name}.weight"].float(), stored[f"{name}.bias"].float()
    if list(layers) != sorted(set(layers)) or not layers or layers[0] < 1:
        raise ValueError(f"{name} reads after layers {list(layers)}, which do not ascend from 1")
    if layers[-1] > config.num_layers:
        raise ValueError(f"{name} reads after layer {layers[-1]} of {config.num_layers}")
    expected = (len(layers), out, 2 * config.hidden_size)
    if tuple(weight.shape) != expected or tuple(bias.shape) != expected[:2]:
        raise ValueError(f"{name} has the shape {tuple(weight.shape)}, not {expected}")
    exits = sum(layer < config.num_layers for layer in layers)
    points = tuple(_point(each, exits) for each in own["points"])
    return DecisionHeads(layers, weight, bias, points)


def _point(raw: Sequence[Any], exits: int) -> DecisionPoint:
    quality, thresholds, agreement, mean_layer = raw
    if len(thresholds) != exits:
        raise ValueError(f"a point has {len(thresholds)} thresholds for {exits} layers")
    return DecisionPoint(float(quality), tuple(map(float, thresholds)), agreement, mean_layer)
