"""Ways to fill the K,V of skipped layers, at one fixed set of thresholds."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from offramp.models.sampling_params import ExitCriterion, KVFill
from offramp.server.lab.exit_files import read_exact, write_beside_deltas
from offramp.server.lab.options import say
from offramp.server.lab.runs import figures
from offramp.server.lab.settings import OFF, Setting, adaptive, typical_thresholds
from offramp.server.lab.workbench import Workbench, open_workbench

_WITHOUT_MAP = (KVFill.ABSENT, KVFill.COPY, KVFill.PROJECT)
_WITH_MAP = (KVFill.PROJECT, KVFill.RECOMPUTE)


def fill_rows(
    args: argparse.Namespace, bench: Workbench, prompts: Sequence[tuple[int, ...]]
) -> list[dict[str, Any]]:
    """One row a fill: absent, copy, identity projection, fitted projection, recompute.

    Every exit is taken that the thresholds allow, so that all fills answer for the same exits. The
    fitted map is left out where the file has none.
    """
    off = bench.run(prompts, OFF.exits)
    rows = [{**OFF.to_json(), **figures(off, bench.model.config.num_layers).to_json()}]
    criterion, thresholds = typical_thresholds(bench, off)
    mapped = any(head.kv_map is not None for head in bench.file.heads)
    with tempfile.TemporaryDirectory() as folder:
        path = _without_maps(bench, args.exits, Path(folder) / "identity.safetensors")
        for exits, fills in ((path, _WITHOUT_MAP), (args.exits, _WITH_MAP)):
            rows += _of_file(args, exits, fills, prompts, criterion, thresholds)
    return [row for row in rows if mapped or row["name"] != "project, fitted map"]


def _of_file(
    args: argparse.Namespace,
    exits: Path,
    fills: Sequence[KVFill],
    prompts: Sequence[tuple[int, ...]],
    criterion: ExitCriterion,
    thresholds: tuple[float, ...],
) -> list[dict[str, Any]]:
    bench = open_workbench(argparse.Namespace(**{**vars(args), "exits": exits}), every_exit=True)
    rows = []
    for fill in fills:
        name = str(fill)
        if fill is KVFill.PROJECT:
            name += ", fitted map" if exits == args.exits else ", identity"
        say(name)
        setting = Setting(name, "fill", adaptive(criterion, thresholds, fill))
        run = bench.run(prompts, setting.exits)
        rows.append({**setting.to_json(), **figures(run, bench.model.config.num_layers).to_json()})
    return rows


def _without_maps(bench: Workbench, source: Path, path: Path) -> Path:
    """The exits of ``source`` whose projection takes the exit state for every layer's input."""
    file = read_exact(bench, source)
    heads = tuple(replace(head, kv_map=None, kv_bias=None) for head in file.heads)
    write_beside_deltas(replace(file, heads=heads), source, path)
    return path
