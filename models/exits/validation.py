"""What an exit file must hold to be used; every check raises ValueError that says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from offramp.models.config import ModelConfig
from offramp.models.exits.head import ExitHead

_PREDICTOR = ("predictor_up", "predictor_up_bias", "predictor_down", "predictor_down_bias")
# Names stand for one size throughout an exit; see ExitHead.
_SHAPES: dict[str, tuple[str | int, ...]] = {
    "scale": ("d",),
    "norm": ("d",),
    "down": ("d", "width"),
    "gate_up": ("2 * width", "d"),
    "router_up": ("g", "d"),
    "router_up_bias": ("g",),
    "router_down": (1, "g"),
    "router_down_bias": (1,),
    "fuse": (4,),
    "predictor_up": ("p", 12),
    "predictor_up_bias": ("p",),
    "predictor_down": (1, "p"),
    "predictor_down_bias": (1,),
    "kv_map": ("kv", "d"),
    "kv_bias": ("kv",),
}


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Types, and lists that fit together."""
    kinds = {"operating_points": list, "metrics": dict, "data": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(metadata[key], kind)]
    if wrong:
        raise ValueError(f"{wrong[0]} is no {'list' if kinds[wrong[0]] is list else 'object'}")
    layers = metadata["exit_layers"]
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError("exit_layers is no list of whole numbers")
    for key in ("thresholds", "floors"):
        if not isinstance(metadata[key], list) or not all(map(is_number, metadata[key])):
            raise ValueError(f"{key} is no list of numbers")
    counts = {len(layers), len(metadata["thresholds"]), len(metadata["floors"])}
    if layers != sorted(set(layers)) or len(counts) != 1:
        raise ValueError("exit layers, thresholds and floors do not fit together")


def check_tensors(layer: int, tensors: Mapping[str, Tensor], hidden_size: int) -> None:
    """Shapes of the exit after ``layer``, whose required tensors are all there."""
    known = set(_PREDICTOR) & set(tensors)
    if known and known != set(_PREDICTOR):
        raise ValueError(f"exit {layer} has a part of a predictor: {', '.join(sorted(known))}")
    sizes: dict[str | int, int] = {
        "d": hidden_size,
        "2 * width": 2 * sum(tensors["down"].shape[1:]),
    }
    for name, pattern in _SHAPES.items():
        if name not in tensors:
            continue
        found = tuple(tensors[name].shape)
        # The first tensor with a name says what it stands for.
        sizes |= {s: n for s, n in zip(pattern, found, strict=False) if s not in sizes}
        wanted = tuple(s if isinstance(s, int) else sizes.get(s, s) for s in pattern)
        if found != wanted:
            raise ValueError(f"tensor {layer}.{name} has the shape {found}, not {wanted}")


def check_vocab(vocab: Tensor) -> None:
    """Token ids that an exit can be asked for."""
    if vocab.dim() != 1 or vocab.is_floating_point() or not len(vocab):
        raise ValueError("vocab is no list of token ids")
    if int(vocab[0]) < 0 or not (vocab.diff() > 0).all():
        raise ValueError("vocab is not ascending from 0 or above")


def check_model(heads: Sequence[ExitHead], vocab: Tensor | None, shape: ModelConfig) -> None:
    """Exits that fit into the model of this ``shape``."""
    for head in heads:
        if not 0 < head.layer < shape.num_layers:
            raise ValueError(
                f"exit {head.layer} is not inside the model; its layers are 1 to "
                f"{shape.num_layers - 1}"
            )
        rows = (shape.num_layers - head.layer) * 2 * shape.kv_size
        if head.kv_map is not None and len(head.kv_map) != rows:
            raise ValueError(
                f"tensor {head.layer}.kv_map has {len(head.kv_map)} rows; this model needs {rows}"
            )
    if vocab is not None and int(vocab[-1]) >= shape.vocab_size:
        raise ValueError(
            f"vocab has the token {int(vocab[-1])}; this model has {shape.vocab_size} tokens"
        )
