"""The settings an evaluation runs through, and the comparison of ways to fill K,V."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offramp.models.exits.points import OperatingPoint, point_for
from offramp.models.sampling_params import NEVER, ExitCriterion, ExitMode, ExitSettings, KVFill
from offramp.server.lab.candidates import candidates_from
from offramp.server.lab.options import LabError, say
from offramp.server.lab.runs import Run, figures
from offramp.server.lab.workbench import Workbench, open_workbench, read_exact, write_beside_deltas

# Teacher-forced risk a sweep spans: from hardly any harm to clearly too much.
_LOW, _HIGH = 0.005, 0.2
# K,V fills and lossless runs are compared at about this risk.
_TYPICAL, _TYPICAL_QUALITY = 0.03, 0.95
_IDENTITY, _FITTED = "project, identity", "project, fitted map"


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run.

    ``kind`` is ``off``, ``point``, ``sweep``, ``fill``, ``prefill`` or ``lossless``.
    """

    name: str
    kind: str
    exits: ExitSettings
    quality: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "mode": str(self.exits.mode),
            "criterion": str(self.exits.criterion),
            "kv_fill": str(self.exits.kv_fill),
            "thresholds": self.exits.thresholds,
            "quality": self.quality,
        }


OFF = Setting("off", "off", ExitSettings())


def settings_for(args: argparse.Namespace, bench: Workbench, off: Run) -> list[Setting]:
    """Operating points, sweeps, fills and lossless, as ``args`` say; raises LabError.

    ``off`` are the answers at full depth, from which the sweeps' thresholds are drawn.
    """
    made = []
    for point in points_named(bench.file.points, args.points):
        exits = adaptive(point.criterion, point.thresholds, point.kv_fill)
        fill = "" if point.kv_fill is KVFill.PROJECT else f", {point.kv_fill}"
        made.append(Setting(f"quality {point.quality:g}{fill}", "point", exits, point.quality))
    sweeps = candidates_from(
        bench, off.finished, args.criteria, count=args.steps, low=_LOW, high=_HIGH
    )
    for criterion, line in sweeps.items():
        for number, each in enumerate(line, start=1):
            exits = adaptive(criterion, each.thresholds, KVFill.PROJECT)
            made.append(Setting(f"{criterion} {number}", "sweep", exits))
    criterion, thresholds = typical_thresholds(bench, off)
    made += [
        Setting(f"fill {fill}", "fill", adaptive(criterion, thresholds, fill))
        for fill in args.fills
    ]
    # Prompt tokens leave where the gate's score reaches the bound; the answer's never do.
    never = (NEVER,) * len(bench.file.heads)
    for bound in args.prefill:
        exits = ExitSettings(ExitMode.ADAPTIVE, thresholds=never, prefill_threshold=bound)
        made.append(Setting(f"prefill {bound:g}", "prefill", exits))
    lossless = ExitSettings(mode=ExitMode.LOSSLESS, criterion=criterion)
    return [*made, Setting("lossless", "lossless", lossless)]


def typical_thresholds(bench: Workbench, off: Run) -> tuple[ExitCriterion, tuple[float, ...]]:
    """Thresholds to compare other things at: an operating point, or a typical risk.

    Of the points with projected K,V, if there are any, the loosest that promises 95 %, or else the
    strictest.

    Raises LabError where no thresholds skip anything.
    """
    points = bench.file.points
    points = tuple(each for each in points if each.kv_fill is KVFill.PROJECT) or points
    if points:
        point = point_for(points, _TYPICAL_QUALITY) or points[-1]
        return point.criterion, point.thresholds
    criterion = ExitCriterion.TWO_KEY
    line = candidates_from(bench, off.finished, [criterion], count=1, low=_TYPICAL, high=_TYPICAL)[
        criterion
    ]
    if not line:
        raise LabError("no thresholds skip a layer at a bearable risk; train better exits")
    return criterion, line[-1].thresholds


def points_named(points: tuple[OperatingPoint, ...], wanted: str) -> list[OperatingPoint]:
    """The points that ``wanted`` names: ``all``, ``none`` or qualities; LabError for others."""
    if wanted in {"all", "none"}:
        return list(points) if wanted == "all" else []
    found = []
    for word in wanted.split(","):
        matching = [point for point in points if f"{point.quality:g}" == word.strip()]
        if not matching:
            known = ", ".join(f"{point.quality:g}" for point in points) or "none"
            raise LabError(
                f"the exit file has no operating point of quality {word}; it has {known}"
            )
        found += matching
    return found


def adaptive(criterion: ExitCriterion, thresholds: tuple[float, ...], fill: KVFill) -> ExitSettings:
    """Settings of adaptive exits."""
    return ExitSettings(ExitMode.ADAPTIVE, criterion, thresholds, kv_fill=fill)


def fill_rows(
    args: argparse.Namespace, bench: Workbench, prompts: Sequence[tuple[int, ...]]
) -> list[dict[str, Any]]:
    """One row a fill: absent, copy, identity projection, fitted projection, recompute.

    Every exit is taken that the thresholds allow, so that all fills answer for the same exits. The
    fitted map is left out where the file has none.
    """
    layers = bench.model.config.num_layers
    off = bench.run(prompts, OFF.exits)
    rows = [{**OFF.to_json(), **figures(off, layers).to_json()}]
    criterion, thresholds = typical_thresholds(bench, off)
    file = read_exact(bench, args.exits)
    # Without a map the projection takes the exit state for every layer's input.
    heads = tuple(replace(head, kv_map=None, kv_bias=None) for head in file.heads)
    mapped = any(head.kv_map is not None for head in bench.file.heads)
    with tempfile.TemporaryDirectory() as folder:
        without = Path(folder) / "identity.safetensors"
        write_beside_deltas(replace(file, heads=heads), args.exits, without)
        for exits, named in (
            (without, {"absent": KVFill.ABSENT, "copy": KVFill.COPY, _IDENTITY: KVFill.PROJECT}),
            (args.exits, {_FITTED: KVFill.PROJECT, "recompute": KVFill.RECOMPUTE}),
        ):
            own = argparse.Namespace(**{**vars(args), "exits": exits})
            opened = open_workbench(own, every_exit=True)
            for name, fill in named.items():
                if mapped or name != _FITTED:
                    say(name)
                    setting = Setting(name, "fill", adaptive(criterion, thresholds, fill))
                    run = opened.run(prompts, setting.exits)
                    rows.append({**setting.to_json(), **figures(run, layers).to_json()})
    return rows
