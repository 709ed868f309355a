"""Low-rank deltas of a backbone tuned for its exits, and the files they travel in.

A delta adds ``up @ down`` to one weight (LoRA, arXiv 2106.09685), so a tuned model is the original
and a few small files. Each file's metadata (strings): ``format`` = offramp-deltas-1,
``fingerprint`` of the original weights, ``rank``, ``grid`` (``int4``: sums are rounded to the
4-bit grid of the original weights, or ``none``), ``part`` and ``parts``, ``digest`` of the whole
set. Tensors are fp16, named ``{weight}.down`` [rank, in] and ``{weight}.up`` [out, rank].
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from offramp.kernels.weight_formats import PackError, int4_grid
from offramp.models.config import ModelConfig
from offramp.models.errors import ModelError
from offramp.models.exits.file import raw_metadata, read_safetensors, save_safetensors
from offramp.models.finite import check_finite

FORMAT = "offramp-deltas-1"
PART_BYTES = 16 * 2**20
# The header names each tensor; it stays far below this for any model.
_HEADER_BYTES = 2**17
_LINEARS = ("qkv", "o", "gate_up", "down")
_NUMBER = re.compile("[0-9]{1,4}")
_METADATA = ("format", "fingerprint", "rank", "grid", "part", "parts", "digest")
_HIGHEST_LEVEL = 15
_GRIDS = {True: "int4", False: "none"}


class DeltasError(ModelError):
    """The files are not deltas, not of this model, incomplete or damaged."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Groups of 32 columns of a weight [out, in] whose values are lowest + level * scale.

    ``lowest`` and ``highest`` [out, groups, 32] are how many levels each value may be moved,
    ``scale`` [out, groups, 1] is the size of a level. The ends of a group stay where they are, so
    that scale and lowest value can be read off it as before.
    """

    lowest: Tensor
    highest: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Grid | None:
        """The grid that ``weight`` in fp32 lies on; None if it lies on none."""
        try:
            levels, scale, _ = int4_grid(weight)
        except PackError:
            return None
        ends = (levels == 0) | (levels == _HIGHEST_LEVEL)
        lowest = (-levels).masked_fill_(ends, 0.0)
        highest = (_HIGHEST_LEVEL - levels).masked_fill_(ends, 0.0)
        return cls(lowest, highest, scale.float().clamp_min(torch.finfo(torch.float16).tiny))

    def nearest(self, weight: Tensor, change: Tensor) -> Tensor:
        """The point of the grid nearest to ``weight`` + ``change`` [out, in], within the group.

        ``weight`` is the one of `of`; ``change`` is overwritten.
        """
        groups = change.view(self.lowest.shape)
        groups.div_(self.scale).round_()
        torch.clamp(groups, self.lowest, self.highest, out=groups)
        return groups.mul_(self.scale).view(weight.shape).add_(weight)


@dataclass(frozen=True, slots=True)
class Deltas:
    """Factors ``low[name]`` = (down [rank, in], up [out, rank]) for weights of one model.

    ``fingerprint`` is that of the weights they were trained for. With ``on_grid`` a sum of a weight
    that lies on a 4-bit grid is rounded to that grid, so that it can be served in 4 bits.
    """

    fingerprint: str
    rank: int
    low: dict[str, tuple[Tensor, Tensor]]
    on_grid: bool = False

    def stored(self) -> Deltas:
        """The same deltas as their files give them back: rounded to fp16, held in fp32."""
        low = {
            name: (down.detach().half().float(), up.detach().half().float())
            for name, (down, up) in self.low.items()
        }
        return replace(self, low=low)


def new_deltas(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    fingerprint: str,
    rank: int,
    seed: int,
    on_grid: bool = False,
) -> Deltas:
    """Deltas of every linear layer that change nothing yet: ``down`` is random, ``up`` zero."""
    generator = torch.Generator().manual_seed(seed)
    low: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in range(config.num_layers):
        for linear in _LINEARS:
            name = f"layers.{layer}.{linear}"
            rows, columns = weights[name].shape
            down = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            device = weights[name].device
            low[name] = (down.to(device), torch.zeros(rows, rank, device=device))
    return Deltas(fingerprint, rank, low, on_grid)


def apply_deltas(weights: Mapping[str, Tensor], deltas: Deltas) -> dict[str, Tensor]:
    """Weights with the deltas merged in, dtype and device kept; those without one are shared.

    The sums are taken in fp32. Those of deltas ``on_grid`` are rounded where the weight, as it was
    published, lies on a 4-bit grid; rounded to 16 bits it does not. Raises DeltasError where a
    delta has no weight or another shape.
    """
    merged = dict(weights)
    for name, (down, up) in deltas.low.items():
        weight = weights.get(name)
        if weight is None:
            raise DeltasError(f"deltas for {name}, which the model does not have")
        rank = deltas.rank
        if (up.shape, down.shape) != ((len(weight), rank), (rank, *weight.shape[1:])):
            raise DeltasError(f"deltas for {name} have another shape than the weight")
        change = (up.float() @ down.float()).to(weight.device)
        grid = Grid.of(weight.float()) if deltas.on_grid else None
        total = weight.float() + change if grid is None else grid.nearest(weight.float(), change)
        merged[name] = total.to(weight.dtype)
        # Finite factors may have a product that is not.
        check_finite({name: merged[name]}, "deltas", DeltasError)
    return merged


def tuned_fingerprint(deltas: Deltas) -> str:
    """Name of the tuned model: 32 hex digits of a sha256 over original and deltas.

    Exits of a tuned model carry it: unlike a fingerprint of the merged weights it does not depend
    on how the merge was rounded.
    """
    return hashlib.sha256(f"{deltas.fingerprint}:{_digest(deltas)}".encode()).hexdigest()[:32]


def delta_paths(exit_file: Path) -> list[Path]:
    """Files of deltas that lie beside ``exit_file``; none if its backbone is not tuned."""
    return sorted(exit_file.parent.glob(f"{exit_file.stem}.deltas-*-of-*.safetensors"))


def save_deltas(deltas: Deltas, exit_file: Path) -> list[Path]:
    """Write the deltas beside ``exit_file`` in parts of at most 16 MiB; returns their paths.

    Parts of an earlier set of the same name are removed.
    """
    tensors = {
        f"{name}.{kind}": tensor.detach().half().contiguous().cpu()
        for name, pair in deltas.low.items()
        for kind, tensor in zip(("down", "up"), pair, strict=True)
    }
    parts = _packed(tensors)
    paths = []
    for number, part in enumerate(parts, start=1):
        grid, digest = _GRIDS[deltas.on_grid], _digest(deltas)
        values = (FORMAT, deltas.fingerprint, deltas.rank, grid, number, len(parts), digest)
        path = exit_file.with_name(f"{exit_file.stem}.deltas-{number}-of-{len(parts)}.safetensors")
        metadata = {key: str(value) for key, value in zip(_METADATA, values, strict=True)}
        save_safetensors(path, part, metadata)
        paths.append(path)
    for stale in set(delta_paths(exit_file)) - set(paths):
        stale.unlink()
    return paths


def load_deltas(paths: Sequence[Path], *, fingerprint: str) -> Deltas:
    """Read all parts of one set, in fp32 on the CPU, for the model with this ``fingerprint``.

    Raises DeltasError for files that are missing, damaged, of another model or of several sets.
    """
    if not paths:
        raise DeltasError("no files of deltas were named")
    found = [_read(path) for path in paths]
    first = found[0][0]
    for path, (metadata, _) in zip(paths, found, strict=True):
        if metadata["fingerprint"] != fingerprint:
            raise DeltasError(
                f"{path} holds deltas of another model (fingerprint {metadata['fingerprint']}, "
                f"this model has {fingerprint})"
            )
        if metadata["digest"] != first["digest"]:
            raise DeltasError(f"{path} and {paths[0]} belong to different sets of deltas")
    numbers = sorted(metadata["part"] for metadata, _ in found)
    if numbers != sorted(str(n + 1) for n in range(int(first["parts"]))):
        raise DeltasError(f"{paths[0]}: parts {', '.join(numbers)} of {first['parts']} were given")
    tensors = {name: tensor for _, part in found for name, tensor in part.items()}
    low, on_grid = _paired(tensors, paths[0]), first["grid"] == _GRIDS[True]
    deltas = Deltas(fingerprint, int(first["rank"]), low, on_grid)
    if _digest(deltas) != first["digest"]:
        raise DeltasError(f"{paths[0]}: the deltas are damaged (their digest differs)")
    return deltas


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    metadata = raw_metadata(path, "deltas", DeltasError)
    if metadata.get("format") != FORMAT or not set(_METADATA) <= set(metadata):
        raise DeltasError(f"{path} does not hold deltas of format {FORMAT}")
    numbers = all(_NUMBER.fullmatch(metadata[name]) for name in ("rank", "part", "parts"))
    if not numbers or metadata["grid"] not in _GRIDS.values():
        raise DeltasError(f"{path} has broken metadata")
    _, tensors = read_safetensors(path, "deltas", DeltasError)
    return metadata, tensors


def _paired(tensors: Mapping[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    names = sorted({name.rpartition(".")[0] for name in tensors})
    lacking = [n for n in names if f"{n}.down" not in tensors or f"{n}.up" not in tensors]
    if lacking:
        raise DeltasError(f"{path}: one factor is missing for {', '.join(lacking[:4])}")
    return {n: (tensors[f"{n}.down"].float(), tensors[f"{n}.up"].float()) for n in names}


def _packed(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors in order, cut into parts whose files stay within the limit."""
    room = PART_BYTES - _HEADER_BYTES
    parts: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room:
            raise DeltasError(f"{name} takes {size} bytes, more than a part; choose a lower rank")
        if used + size > room:
            parts.append({})
            used = 0
        parts[-1][name] = tensor
        used += size
    return parts


def _digest(deltas: Deltas) -> str:
    digest = hashlib.sha256(f"{deltas.rank} {_GRIDS[deltas.on_grid]}".encode())
    for name, pair in sorted(deltas.low.items()):
        digest.update(name.encode())
        for tensor in pair:
            digest.update(tensor.detach().half().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
