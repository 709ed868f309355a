"""An exit file written again with changes, and the deltas that lie beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from offramp.models.exits.deltas import delta_paths
from offramp.models.exits.file import ExitFile, load_exits
from offramp.server.lab.errors import LabError
from offramp.server.lab.workbench import Workbench


def read_exact(bench: Workbench, path: Path) -> ExitFile:
    """The file in fp32, which holds its fp16 exactly, whatever the model of ``bench`` runs in."""
    return load_exits(
        path,
        fingerprint=bench.file.fingerprint,
        hidden_size=bench.model.config.hidden_size,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def write_beside_deltas(file: ExitFile, source: Path, target: Path) -> None:
    """Save ``file``, made from ``source``, as ``target``, and take the deltas of ``source`` along.

    Raises LabError where that cannot be written.
    """
    try:
        file.save(target)
        if target.resolve() != source.resolve():
            for path in delta_paths(source):
                name = target.stem + path.name.removeprefix(source.stem)
                shutil.copyfile(path, target.with_name(name))
    except OSError as error:
        raise LabError(f"{target}: {error.strerror}") from error
