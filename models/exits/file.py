"""The exit file: all exit heads of one model in one safetensors file.

Metadata (strings): ``format`` = offramp-exits-1, ``fingerprint`` of the model, ``exit_layers`` and
``thresholds`` (JSON lists), ``metrics`` and ``data`` (JSON objects: how good they are, what they
were trained on). Tensors are named ``{layer}.{field}`` after the fields of ExitHead.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.models.errors import ModelError
from offramp.models.exit_head import ExitHead

FORMAT = "offramp-exits-1"
_OPTIONAL = ("kv_map", "kv_bias")
_TENSORS = tuple(
    f.name for f in fields(ExitHead) if f.name not in ("layer", "threshold", *_OPTIONAL)
)


class ExitFileError(ModelError):
    """The file is not an exit file, or not one for this model."""


@dataclass(frozen=True, slots=True)
class ExitFile:
    """Exit heads with where they came from."""

    fingerprint: str
    heads: tuple[ExitHead, ...]
    metrics: dict[str, Any]
    data: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write atomically, tensors in fp16."""
        tensors = {
            f"{head.layer}.{name}": getattr(head, name).detach().half().contiguous().cpu()
            for head in self.heads
            for name in (*_TENSORS, *_OPTIONAL)
            if getattr(head, name) is not None
        }
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "exit_layers": json.dumps([head.layer for head in self.heads]),
            "thresholds": json.dumps([head.threshold for head in self.heads]),
            "metrics": json.dumps(self.metrics),
            "data": json.dumps(self.data),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata)
        partial.replace(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """The file's metadata with JSON values decoded; raises ExitFileError."""
    try:
        with safe_open(path, "pt") as file:
            raw = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ExitFileError(f"{path} cannot be read as an exit file: {error}") from error
    if raw.get("format") != FORMAT:
        raise ExitFileError(f"{path} is not an exit file of format {FORMAT}")
    decoded = ("exit_layers", "thresholds", "metrics", "data")
    return {key: json.loads(value) if key in decoded else value for key, value in raw.items()}


def load_exits(
    path: Path, *, fingerprint: str, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> ExitFile:
    """Read exit heads for the model with this ``fingerprint``; raises ExitFileError."""
    metadata = read_metadata(path)
    if metadata["fingerprint"] != fingerprint:
        raise ExitFileError(
            f"{path} holds exits of another model (fingerprint {metadata['fingerprint']}, "
            f"this model has {fingerprint}); train exits for it with `offramp exits train`"
        )
    heads = []
    with safe_open(path, "pt") as file:
        for layer, threshold in zip(metadata["exit_layers"], metadata["thresholds"], strict=True):
            missing = {f"{layer}.{name}" for name in _TENSORS} - set(file.keys())
            if missing:
                raise ExitFileError(f"{path} lacks tensors: {', '.join(sorted(missing))}")
            tensors: dict[str, Tensor] = {
                name: file.get_tensor(f"{layer}.{name}").to(device, dtype)
                for name in (*_TENSORS, *_OPTIONAL)
                if f"{layer}.{name}" in file.keys()  # noqa: SIM118 (not a mapping)
            }
            if tensors["scale"].shape != (hidden_size,):
                raise ExitFileError(f"{path}: exit {layer} has the wrong width")
            heads.append(ExitHead(layer=layer, threshold=threshold, **tensors))
    return ExitFile(fingerprint, tuple(heads), metadata["metrics"], metadata["data"])


def shipped_exits(fingerprint: str) -> Path | None:
    """The exit file that comes with Offramp for this model, if there is one."""
    folder = resources.files("offramp") / "models" / "exits"
    for entry in folder.iterdir():
        if entry.name.endswith(".safetensors"):
            path = Path(str(entry))
            if read_metadata(path)["fingerprint"] == fingerprint:
                return path
    return None
