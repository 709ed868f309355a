"""Pictures of an evaluation; matplotlib is needed here alone."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offramp.server.lab.options import LabError

# Matplotlib's own order of colours, told apart by shape as well.
_MARKERS = "osD^vP*Xhd<>"


def require_matplotlib() -> None:
    """Raise LabError, before any work is done, where pictures cannot be drawn."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise LabError("the pictures need matplotlib: pip install 'offramp[train]'") from error


def draw(rows: Sequence[dict[str, Any]], x: str, label: str, title: str, path: Path) -> None:
    """Agreement over ``rows[...][x]``: a line per criterion of the sweep, other rows as points."""
    require_matplotlib()
    # Figure without pyplot: no window system, no global state.
    figure_module = importlib.import_module("matplotlib.figure")
    figure = figure_module.Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    criteria = list(dict.fromkeys(row["criterion"] for row in rows if row["kind"] == "sweep"))
    for marker, criterion in zip(_MARKERS, criteria, strict=False):
        line = [r for r in rows if r["kind"] == "sweep" and r["criterion"] == criterion]
        line.sort(key=lambda row: row[x])
        axes.plot(
            [row[x] for row in line],
            [row["agreement"] for row in line],
            marker=marker,
            markersize=4,
            label=criterion,
        )
    for kind, marker, colour in (("point", "*", "black"), ("off", "s", "grey")):
        marked = [row for row in rows if row["kind"] == kind]
        if marked:
            axes.scatter(
                [row[x] for row in marked],
                [row["agreement"] for row in marked],
                marker=marker,
                s=130 if kind == "point" else 40,
                color=colour,
                zorder=3,
                label={"point": "operating points", "off": "off"}[kind],
            )
    for (across, up), text in _labels(rows, x).items():
        axes.annotate(text, (across, up), textcoords="offset points", xytext=(7, 6), fontsize=8)
    # Labels of the outermost points stay inside.
    axes.margins(x=0.1, y=0.08)
    axes.set_xlabel(label)
    axes.set_ylabel("agreement with full depth (share of tokens)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def _labels(rows: Sequence[dict[str, Any]], x: str) -> dict[tuple[float, float], str]:
    """Qualities of the operating points by place; those of one place share a label."""
    texts: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        if row["kind"] == "point":
            texts.setdefault((row[x], row["agreement"]), []).append(f"{row['quality']:.4g}")
    return {place: ", ".join(each) for place, each in texts.items()}
