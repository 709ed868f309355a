"""The settings an evaluation runs through."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from offramp.models.exits.file import OperatingPoint, point_for
from offramp.models.sampling_params import NEVER, ExitCriterion, ExitMode, ExitSettings, KVFill
from offramp.server.lab.candidates import candidates_from
from offramp.server.lab.errors import LabError
from offramp.server.lab.runs import Run
from offramp.server.lab.workbench import Workbench

# Teacher-forced risk a sweep spans: from hardly any harm to clearly too much.
_LOW, _HIGH = 0.005, 0.2
# K,V fills and lossless runs are compared at about this risk.
_TYPICAL, _TYPICAL_QUALITY = 0.03, 0.95


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
    """Operating points, sweeps, fills and lossless, as ``args`` asks for; raises LabError.

    ``off`` are the answers at full depth, from which the sweeps' thresholds are drawn.
    """
    made = [_point(point) for point in points_asked(bench.file.points, args.points)]
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
    made += [
        Setting(f"prefill {bound:g}", "prefill", prefill(bench, bound)) for bound in args.prefill
    ]
    lossless = ExitSettings(mode=ExitMode.LOSSLESS, criterion=criterion)
    return [*made, Setting("lossless", "lossless", lossless)]


def typical_thresholds(bench: Workbench, off: Run) -> tuple[ExitCriterion, tuple[float, ...]]:
    """Thresholds to compare other things at: an operating point, or a typical risk.

    Of the points the loosest that promises 95 %, or else the strictest.

    Raises LabError where no thresholds skip anything.
    """
    points = bench.file.points
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


def points_asked(points: tuple[OperatingPoint, ...], asked: str) -> list[OperatingPoint]:
    """The points ``asked`` names: ``all``, ``none`` or qualities; raises LabError for others."""
    if asked in {"all", "none"}:
        return list(points) if asked == "all" else []
    found = []
    for word in asked.split(","):
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
    return ExitSettings(
        mode=ExitMode.ADAPTIVE, criterion=criterion, thresholds=thresholds, kv_fill=fill
    )


def prefill(bench: Workbench, bound: float) -> ExitSettings:
    """Prompt tokens leave where the gate's score reaches ``bound``; the answer's never do."""
    nobody = (NEVER,) * len(bench.file.heads)
    return ExitSettings(ExitMode.ADAPTIVE, thresholds=nobody, prefill_threshold=bound)


def _point(point: OperatingPoint) -> Setting:
    exits = adaptive(point.criterion, point.thresholds, point.kv_fill)
    return Setting(f"quality {point.quality:g}", "point", exits, point.quality)
