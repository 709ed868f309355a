"""The exit file: all exit heads of one model in one safetensors file.

Metadata (strings): ``format`` = offramp-exits-2, ``fingerprint`` of the model, ``exit_layers``,
``thresholds`` and ``floors`` (JSON lists), ``operating_points`` (JSON list, see points.py),
``metrics`` and ``data`` (JSON objects: how good they are, what they were trained on). Tensors are
named ``{layer}.{field}`` after the fields of ExitHead, and ``vocab`` lists the token ids that the
exits tell apart (all of them if it is missing).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.models.config import ModelConfig
from offramp.models.errors import ModelError
from offramp.models.exits.head import ExitHead
from offramp.models.exits.points import OperatingPoint
from offramp.models.exits.safetensors_io import sort_header
from offramp.models.exits.validation import (
    check_metadata,
    check_model,
    check_tensors,
    check_vocab,
)

FORMAT = "offramp-exits-2"
_NUMBERS = ("layer", "threshold", "floor")
_OPTIONAL = (
    "fuse",
    *("predictor_up", "predictor_up_bias", "predictor_down", "predictor_down_bias"),
    *("kv_map", "kv_bias"),
)
_TENSORS = tuple(f.name for f in fields(ExitHead) if f.name not in (*_NUMBERS, *_OPTIONAL))
_JSON = ("exit_layers", "thresholds", "floors", "operating_points", "metrics", "data")


class ExitFileError(ModelError):
    """The file is not an exit file, or not one for this model."""


@dataclass(frozen=True, slots=True)
class ExitFile:
    """Exit heads with where they came from, bottom up; ``points`` by rising quality."""

    fingerprint: str
    heads: tuple[ExitHead, ...]
    metrics: dict[str, Any]
    data: dict[str, Any]
    vocab: Tensor | None = None
    points: tuple[OperatingPoint, ...] = ()

    def save(self, path: Path) -> None:
        """Write atomically, tensors in fp16; equal exits give equal bytes."""
        tensors = {
            f"{head.layer}.{name}": getattr(head, name).detach().half().contiguous().cpu()
            for head in self.heads
            for name in (*_TENSORS, *_OPTIONAL)
            if getattr(head, name) is not None
        }
        if self.vocab is not None:
            tensors["vocab"] = self.vocab.to(torch.int32).contiguous().cpu()
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "exit_layers": json.dumps([head.layer for head in self.heads]),
            "thresholds": json.dumps([head.threshold for head in self.heads]),
            "floors": json.dumps([head.floor for head in self.heads]),
            "operating_points": json.dumps([point.to_json() for point in self.points]),
            "metrics": json.dumps(self.metrics),
            "data": json.dumps(self.data),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata)
        # Also gives the file the usual mode: safetensors keeps it to its owner.
        sort_header(partial)
        partial.replace(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """The file's metadata, JSON values decoded and checked; raises ExitFileError."""
    try:
        with safe_open(path, "pt") as file:
            raw = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ExitFileError(f"{path} cannot be read as an exit file: {error}") from error
    if raw.get("format") != FORMAT:
        raise ExitFileError(f"{path} is not an exit file of format {FORMAT}")
    missing = {*_JSON, "fingerprint"} - set(raw)
    if missing:
        raise ExitFileError(f"{path} lacks metadata: {', '.join(sorted(missing))}")
    try:
        found = {key: json.loads(value) if key in _JSON else value for key, value in raw.items()}
        check_metadata(found)
    except ValueError as error:
        raise ExitFileError(f"{path} has broken metadata: {error}") from error
    points_of(path, found["operating_points"], len(found["exit_layers"]))
    return found


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
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise ExitFileError(f"{path}: tensor {name} has values that are not numbers")
    vocab = stored.pop("vocab", None)
    if vocab is not None:
        with _naming(path):
            check_vocab(vocab)
    heads = []
    for index, layer in enumerate(metadata["exit_layers"]):
        tensors = {
            name: stored[f"{layer}.{name}"].to(device, dtype)
            for name in (*_TENSORS, *_OPTIONAL)
            if f"{layer}.{name}" in stored
        }
        _check_head(path, layer, tensors, hidden_size)
        numbers = {"floor": metadata["floors"][index], "threshold": metadata["thresholds"][index]}
        heads.append(ExitHead(layer=layer, **numbers, **tensors))
    return ExitFile(
        fingerprint,
        tuple(heads),
        metadata["metrics"],
        metadata["data"],
        None if vocab is None else vocab.to(device, torch.long),
        points_of(path, metadata["operating_points"], len(heads)),
    )


def check_fit(path: Path, file: ExitFile, shape: ModelConfig) -> None:
    """Raise ExitFileError if ``file``, read from ``path``, has no place in the model."""
    with _naming(path):
        check_model(file.heads, file.vocab, shape)


def points_of(path: Path, rows: Sequence[dict[str, Any]], exits: int) -> tuple[OperatingPoint, ...]:
    """Operating points by rising quality; raises ExitFileError where they contradict themselves."""
    try:
        points = sorted(map(OperatingPoint.from_json, rows), key=lambda point: point.quality)
    except (TypeError, ValueError) as error:
        raise ExitFileError(f"{path} has a broken operating point: {error}") from error
    for point in points:
        if len(point.thresholds) != exits:
            raise ExitFileError(f"{path}: an operating point needs {exits} thresholds")
    for loose, strict in pairwise(points):
        if loose.criterion is strict.criterion and any(
            a > b for a, b in zip(loose.thresholds, strict.thresholds, strict=True)
        ):
            raise ExitFileError(
                f"{path}: thresholds are not monotone: quality {strict.quality} has lower ones "
                f"than quality {loose.quality}"
            )
    return tuple(points)


def shipped_exits(fingerprint: str) -> Path | None:
    """The exit file that comes with Offramp for this model, if there is one."""
    folder = resources.files("offramp") / "models" / "exits"
    for entry in folder.iterdir():
        if entry.name.endswith(".safetensors"):
            path = Path(str(entry))
            if read_metadata(path)["fingerprint"] == fingerprint:
                return path
    return None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make an ExitFileError that names ``path`` of a check's ValueError."""
    try:
        yield
    except ValueError as error:
        raise ExitFileError(f"{path}: {error}") from error


def _check_head(path: Path, layer: int, tensors: dict[str, Tensor], hidden_size: int) -> None:
    missing = set(_TENSORS) - set(tensors)
    if missing:
        raise ExitFileError(f"{path} lacks tensors of exit {layer}: {', '.join(sorted(missing))}")
    with _naming(path):
        check_tensors(layer, tensors, hidden_size)
