"""Heads that answer questions with fixed answers from the states of a layer inside the stack.

A head reads the last position's state and the mean over all positions of the prompt: the mean is
what makes early layers speak. It is trained for one question, a *task*.
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
    raw_metadata,
    read_safetensors,
    save_safetensors,
    shipped,
)
from offramp.models.exits.points import DecisionPoint
from offramp.models.files import is_number, is_whole, parse_json, shown
from offramp.models.finite import check_finite

FORMAT = "offramp-decisions-1"
SUFFIX = ".decisions.safetensors"
_WHAT = "decision heads"
_CPU = torch.device("cpu")


class DecisionFileError(ModelError):
    """The file holds no decision heads, or none for this model."""


@dataclass(frozen=True, slots=True)
class DecisionHeads:
    """Linear heads ``weight`` [k, answers, 2 d], ``bias`` [k, answers] after k ``layers``.

    Layers ascend; the last one is the model's depth. ``points`` ascend in quality.
    """

    layers: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    points: tuple[DecisionPoint, ...] = ()


@dataclass(frozen=True, slots=True)
class DecisionTask:
    """One question that heads were trained for.

    ``wording`` is the question as the model reads it, ``labels`` are its answers in the order of
    the heads' outputs. Where they were ``labelled`` the heads answer at full depth too; else they
    foresee the model's own answers, which its LM head gives at full depth, and their outputs times
    ``scale`` come closest to its probabilities.
    """

    name: str
    wording: str
    labels: tuple[str, ...]
    heads: DecisionHeads
    labelled: bool = True
    scale: float = 1.0
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DecisionFile:
    """Decision heads of one model, by the name of their task."""

    fingerprint: str
    tasks: Mapping[str, DecisionTask] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers after which some head reads, ascending."""
        return tuple(sorted({each for task in self.tasks.values() for each in task.heads.layers}))

    def save(self, path: Path) -> None:
        """Write atomically, weights in fp16."""
        tensors: dict[str, Tensor] = {}
        tasks = {}
        for index, task in enumerate(self.tasks.values()):
            heads = task.heads
            tensors[f"{index}.weight"] = heads.weight.half().contiguous().cpu()
            tensors[f"{index}.bias"] = heads.bias.float().contiguous().cpu()
            tasks[task.name] = {
                "layers": heads.layers,
                "points": [
                    [p.quality, p.thresholds, p.agreement, p.mean_layer] for p in heads.points
                ],
                "wording": task.wording,
                "labels": task.labels,
                "labelled": task.labelled,
                "scale": task.scale,
                "metrics": task.metrics,
            }
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
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
    metadata = read_decision_metadata(path)
    if metadata["fingerprint"] != fingerprint:
        raise DecisionFileError(
            f"{path} holds decision heads of another model (fingerprint "
            f"{metadata['fingerprint']}, this model has {fingerprint}); train some for it with "
            "`offramp exits train-task`"
        )
    _, stored = read_safetensors(path, _WHAT, DecisionFileError)
    stored = {name: tensor.to(device) for name, tensor in stored.items()}
    try:
        tasks = {}
        for index, (name, own) in enumerate(metadata["tasks"].items()):
            _check_words(name, own)
            heads, labels = _heads(str(index), own, stored, config), tuple(own["labels"])
            check_finite({name: heads.weight, f"{name}.bias": heads.bias}, path, DecisionFileError)
            tasks[name] = DecisionTask(
                name,
                own["wording"],
                labels,
                heads,
                bool(own["labelled"]),
                float(own["scale"]),
                own["metrics"],
            )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DecisionFileError(f"{path}: {reason}") from error
    return DecisionFile(fingerprint, tasks)


def shipped_decision_heads(fingerprint: str) -> Path | None:
    """The decision heads that come with Offramp for this model, if there are any."""
    return shipped(FORMAT, fingerprint)


def read_decision_metadata(path: Path) -> dict[str, Any]:
    """The file's metadata, JSON values decoded; raises DecisionFileError."""
    raw = raw_metadata(path, _WHAT, DecisionFileError)
    if raw.get("format") != FORMAT:
        raise DecisionFileError(f"{path} holds no decision heads of format {FORMAT}")
    try:
        tasks = parse_json(raw["tasks"], finite=False)
        if not isinstance(tasks, dict):
            raise TypeError("tasks are no object")
        return {"format": FORMAT, "fingerprint": raw["fingerprint"], "tasks": tasks}
    except (KeyError, TypeError, ValueError) as error:
        raise DecisionFileError(f"{path} has broken metadata: {error}") from error


def _heads(
    name: str, own: Mapping[str, Any], stored: Mapping[str, Tensor], config: ModelConfig
) -> DecisionHeads:
    layers = tuple(own["layers"])
    weight, bias = stored[f"{name}.weight"].float(), stored[f"{name}.bias"].float()
    inside = all(is_whole(layer, 1, config.num_layers) for layer in layers)
    if not inside or list(layers) != sorted(set(layers)) or layers[-1:] != (config.num_layers,):
        raise ValueError(
            f"heads read after layers {list(layers)}; of this model they may be ascending ones up "
            f"to {config.num_layers}, the last included"
        )
    expected = (len(layers), len(own["labels"]), 2 * config.hidden_size)
    if tuple(weight.shape) != expected or tuple(bias.shape) != expected[:2]:
        raise ValueError(f"heads have the shape {tuple(weight.shape)}, not {expected}")
    points = tuple(_point(each, len(layers) - 1) for each in own["points"])
    return DecisionHeads(layers, weight, bias, points)


def _check_words(name: str, own: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no task but for its heads."""
    labels, scale = own["labels"], own["scale"]
    if not isinstance(labels, list) or not labels or not isinstance(own["wording"], str):
        raise ValueError(f"task {shown(name)} has no wording or labels")
    if not all(isinstance(label, str) for label in labels) or len(set(labels)) != len(labels):
        raise ValueError(f"task {shown(name)} has labels that are no different words")
    if not is_number(scale) or scale <= 0:
        raise ValueError(f"task {shown(name)} has the scale {shown(scale)}")
    if not isinstance(own["metrics"], dict):
        raise TypeError(f"task {shown(name)} has no metrics")


def _point(raw: Sequence[Any], exits: int) -> DecisionPoint:
    quality, thresholds, agreement, mean_layer = raw
    if len(thresholds) != exits:
        raise ValueError(f"a point has {len(thresholds)} thresholds for {exits} layers")
    if not all(map(is_number, (quality, *thresholds, agreement, mean_layer))):
        raise ValueError("a point has values that are not numbers")
    return DecisionPoint(float(quality), tuple(map(float, thresholds)), agreement, mean_layer)
