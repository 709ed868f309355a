"""The exit file: all exit heads of one model in one safetensors file.

Metadata (strings): ``format`` = offramp-exits-2, ``fingerprint`` of the model, ``exit_layers``,
``thresholds`` and ``floors`` (JSON lists), ``operating_points`` (JSON list, see OperatingPoint),
``metrics`` and ``data`` (JSON objects: how good they are, what they were trained on), and maybe
``coarse_inputs`` (a JSON object, see CoarsePoint). Tensors are
named ``{layer}.{field}`` after the fields of ExitHead, and ``vocab`` lists the token ids that the
exits tell apart (all of them if it is missing).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from offramp.models.config import ModelConfig, Weights
from offramp.models.errors import ModelError
from offramp.models.exits.head import PREDICTOR, ExitHead
from offramp.models.exits.points import CoarsePoint, OperatingPoint
from offramp.models.files import check_safetensors, is_number, is_whole, parse_json
from offramp.models.finite import check_finite

FORMAT = "offramp-exits-2"
_JSON = ("exit_layers", "thresholds", "floors", "operating_points", "metrics", "data")
_COARSE = "coarse_inputs"
_OPTIONAL = ("fuse", *PREDICTOR, "kv_map", "kv_bias")
_NUMBERS = ("layer", "threshold", "floor")
_TENSORS = tuple(f.name for f in fields(ExitHead) if f.name not in (*_NUMBERS, *_OPTIONAL))
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
_LENGTH_BYTES = 8
# A model's deltas, which are the most, take eight a layer.
_MOST_TENSORS = 65_536
_MOST_LAYERS = 2**16


class ExitFileError(ModelError):
    """The file is not an exit file, or not one for this model."""


@dataclass(frozen=True, slots=True)
class ExitFile:
    """Exit heads with where they came from, bottom up; ``points`` by rising quality.

    ``coarse`` is what inputs of 8 bits keep without an exit, where that was calibrated.
    """

    fingerprint: str
    heads: tuple[ExitHead, ...]
    metrics: dict[str, Any]
    data: dict[str, Any]
    vocab: Tensor | None = None
    points: tuple[OperatingPoint, ...] = ()
    coarse: CoarsePoint | None = None

    @property
    def weights(self) -> Weights:
        """The server's ``--weights`` that the exits were trained and calibrated for."""
        return weights_of(self.data)

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
        if self.coarse is not None:
            metadata[_COARSE] = json.dumps(asdict(self.coarse))
        save_safetensors(path, tensors, metadata)


def read_metadata(path: Path) -> dict[str, Any]:
    """The file's metadata, JSON values decoded and checked; raises ExitFileError."""
    raw = raw_metadata(path, "an exit file", ExitFileError)
    if raw.get("format") != FORMAT:
        raise ExitFileError(f"{path} is not an exit file of format {FORMAT}")
    missing = {*_JSON, "fingerprint"} - set(raw)
    if missing:
        raise ExitFileError(f"{path} lacks metadata: {', '.join(sorted(missing))}")
    try:
        found: dict[str, Any] = {
            key: parse_json(value, finite=False) if key in (*_JSON, _COARSE) else value
            for key, value in raw.items()
        }
        _check_metadata(found)
        coarse_of(found)
        weights_of(found["data"])
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
    _, stored = read_safetensors(path, "an exit file", ExitFileError)
    vocab = stored.pop("vocab", None)
    if vocab is not None:
        with _naming(path):
            check_vocab(vocab)
    heads = []
    for index, layer in enumerate(metadata["exit_layers"]):
        tensors: dict[str, Any] = {
            name: stored[f"{layer}.{name}"].to(device, dtype)
            for name in (*_TENSORS, *_OPTIONAL)
            if f"{layer}.{name}" in stored
        }
        missing = set(_TENSORS) - set(tensors)
        if missing:
            raise ExitFileError(
                f"{path} lacks tensors of exit {layer}: {', '.join(sorted(missing))}"
            )
        # Values of a wider type may be none in this one.
        check_finite(tensors, f"{path}: exit {layer}", ExitFileError)
        with _naming(path):
            _check_tensors(layer, tensors, hidden_size)
        numbers = {"floor": metadata["floors"][index], "threshold": metadata["thresholds"][index]}
        heads.append(ExitHead(layer=layer, **numbers, **tensors))
    return ExitFile(
        fingerprint,
        tuple(heads),
        metadata["metrics"],
        metadata["data"],
        None if vocab is None else vocab.to(device, torch.long),
        points_of(path, metadata["operating_points"], len(heads)),
        coarse_of(metadata),
    )


def check_fit(path: Path, file: ExitFile, shape: ModelConfig) -> None:
    """Raise ExitFileError if ``file``, read from ``path``, has no place in the model."""
    with _naming(path):
        _check_model(file.heads, file.vocab, shape)


def points_of(path: Path, rows: Sequence[dict[str, Any]], exits: int) -> tuple[OperatingPoint, ...]:
    """Operating points by rising quality; raises ExitFileError where they contradict themselves."""
    try:
        points = sorted(map(OperatingPoint.from_json, rows), key=lambda point: point.quality)
    except (TypeError, ValueError) as error:
        raise ExitFileError(f"{path} has a broken operating point: {error}") from error
    for point in points:
        if len(point.thresholds) != exits:
            raise ExitFileError(f"{path}: an operating point needs {exits} thresholds")
    for loose, strict in combinations(points, 2):
        if strict.contradicts(loose):
            raise ExitFileError(
                f"{path}: thresholds are not monotone: quality {strict.quality} has lower ones "
                f"than quality {loose.quality}"
            )
    return tuple(points)


def weights_of(data: Mapping[str, Any]) -> Weights:
    """`ExitFile.weights`, by a file's ``data``; raises ValueError for none that there is."""
    return Weights(data.get("weights", Weights.AUTO))


def coarse_of(metadata: Mapping[str, Any]) -> CoarsePoint | None:
    """What a file says of inputs of 8 bits, if anything; raises ValueError for what is nothing."""
    return CoarsePoint.from_json(metadata[_COARSE]) if _COARSE in metadata else None


def shipped_exits(fingerprint: str) -> Path | None:
    """The exit file that comes with Offramp for this model, if there is one."""
    return shipped(FORMAT, fingerprint)


def shipped(form: str, fingerprint: str) -> Path | None:
    """The file of this format that comes with Offramp for the model, if there is one."""
    for entry in (resources.files("offramp") / "models" / "exits").iterdir():
        if entry.name.endswith(".safetensors"):
            path = Path(str(entry))
            found = raw_metadata(path, "a file of Offramp's", ExitFileError)
            if (found.get("format"), found.get("fingerprint")) == (form, fingerprint):
                return path
    return None


def raw_metadata(path: Path, kind: str, failure: type[ModelError]) -> dict[str, str]:
    """Metadata of a file; raises ``failure`` if it cannot be read as ``kind``."""
    try:
        check_safetensors(path)
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, ValueError, SafetensorError) as error:
        raise failure(f"{path} cannot be read as {kind}: {error}") from error


def read_safetensors(
    path: Path, kind: str, failure: type[ModelError]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file; raises ``failure`` if it cannot be read as ``kind``.

    No tensor has an infinity or a NaN.
    """
    try:
        check_safetensors(path)
        with safe_open(path, "pt") as file:
            names = file.keys()
            if len(names) > _MOST_TENSORS:
                raise ValueError(f"it has {len(names)} tensors")
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise failure(f"{path} cannot be read as {kind}: {error}") from error
    check_finite(tensors, path, failure)
    return metadata, tensors


def save_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write ``path`` atomically; equal tensors and metadata give equal bytes.

    The library writes metadata in an order that differs from process to process; here they are in
    order of their names.
    """
    content = save(tensors, metadata)
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(content[_LENGTH_BYTES:end])
    ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(len(text).to_bytes(_LENGTH_BYTES, "little") + text + content[end:])
    partial.replace(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn a check's ValueError into an ExitFileError that names ``path``."""
    try:
        yield
    except ValueError as error:
        raise ExitFileError(f"{path}: {error}") from error


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """Types, and lists that fit together."""
    kinds = {"operating_points": list, "metrics": dict, "data": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(metadata[key], kind)]
    if wrong:
        raise ValueError(f"{wrong[0]} is no {'list' if kinds[wrong[0]] is list else 'object'}")
    layers = metadata["exit_layers"]
    if not isinstance(layers, list) or not all(
        is_whole(layer, 0, _MOST_LAYERS) for layer in layers
    ):
        raise ValueError("exit_layers is no list of whole numbers")
    for key in ("thresholds", "floors"):
        if not isinstance(metadata[key], list) or not all(map(is_number, metadata[key])):
            raise ValueError(f"{key} is no list of numbers")
    counts = {len(layers), len(metadata["thresholds"]), len(metadata["floors"])}
    if layers != sorted(set(layers)) or len(counts) != 1:
        raise ValueError("exit layers, thresholds and floors do not fit together")


def _check_tensors(layer: int, tensors: Mapping[str, Tensor], hidden_size: int) -> None:
    """Shapes of the exit after ``layer``, whose required tensors are all there."""
    known = set(PREDICTOR) & set(tensors)
    if known and known != set(PREDICTOR):
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
        if found != wanted or 0 in found:
            raise ValueError(f"tensor {layer}.{name} has the shape {found}, not {wanted}")


def check_vocab(vocab: Tensor, config: ModelConfig | None = None) -> None:
    """Raise ValueError for what is no ascending list of token ids, of the model if it is given."""
    if vocab.dim() != 1 or vocab.dtype not in {torch.int32, torch.int64} or not len(vocab):
        raise ValueError("vocab is no list of token ids")
    # Of other numbers differences may wrap around.
    inside = int(vocab.min()) >= 0 and int(vocab.max()) < 2**31
    if not inside or not (vocab.diff() > 0).all():
        raise ValueError("vocab is not ascending from 0 or above")
    if config is not None and int(vocab[-1]) >= config.vocab_size:
        raise ValueError(
            f"vocab has the token {int(vocab[-1])}; this model has {config.vocab_size} tokens"
        )


def _check_model(heads: Sequence[ExitHead], vocab: Tensor | None, shape: ModelConfig) -> None:
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
    if vocab is not None:
        check_vocab(vocab, shape)
