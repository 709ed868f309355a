"""A work folder: finished parts of a long training run, so that it can be taken up again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.models.errors import ModelError

Part = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and plain values."""

_OPTIONS = "options.json"


class WorkError(ModelError):
    """The work folder belongs to another run, or is damaged."""


class Work:
    """Parts of one run under ``folder``; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path, options: Mapping[str, Any]) -> Work:
        """The folder of a run with these ``options`` (plain values), made if it is missing.

        Raises WorkError if it belongs to a run with other options, naming them.
        """
        wanted = json.loads(json.dumps(dict(options)))
        path = folder / _OPTIONS
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise WorkError(f"{path} is damaged: {error}") from error
            differ = sorted(
                name for name in {*wanted, *found} if wanted.get(name) != found.get(name)
            )
            if differ:
                raise WorkError(
                    f"{folder} belongs to a run with other options ({', '.join(differ)}); "
                    "take another folder, or the same options"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        return cls(folder)

    def path(self, name: str) -> Path | None:
        """Where a file of this name lies; None without a folder."""
        return None if self.folder is None else self.folder / name

    def part(self, name: str, make: Callable[[], Part]) -> Part:
        """The part of this name: as it was kept, or made now and kept.

        Raises WorkError if what was kept is damaged.
        """
        path = self.path(f"{name}.safetensors")
        if path is None:
            return make()
        if path.exists():
            return _read(path)
        tensors, values = make()
        partial = path.with_suffix(".partial")
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(plain, partial, {"values": json.dumps(values)})
        partial.replace(path)
        return _read(path)


def _read(path: Path) -> Part:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            values = json.loads((file.metadata() or {})["values"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WorkError(f"{path} is damaged; delete it to have it made again: {error}") from error
    return tensors, values
