"""A picture of the training: how each exit did on held-out positions after every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp.models.errors import ModelError


class PlotError(ModelError):
    """Pictures cannot be drawn here."""


def check_plot() -> None:
    """Raise PlotError if matplotlib is missing; to be called before hours of training."""
    try:
        import matplotlib  # noqa: F401, ICN001, PLC0415 (an extra; most commands do not need it)
    except ImportError as error:
        raise PlotError(
            "a plot needs matplotlib, which is not installed: pip install 'offramp[train]'"
        ) from error


def plot_curves(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw agreement and loss over the epochs as a PNG, one line per exit.

    ``curves`` holds, by exit layer, rows of ``epoch``, ``agreement`` (share) and ``loss`` (nats).
    """
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Exit adapters on held-out answers")
    panels = (
        ("agreement", 100, "agreement with full depth (% of tokens)"),
        ("loss", 1, "distillation loss (nats per token)"),
    )
    for axes, (name, factor, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for layer, rows in curves.items():
            epochs = [row["epoch"] for row in rows]
            values = [factor * row[name] for row in rows]
            axes.plot(epochs, values, marker="o", markersize=4, label=f"exit after layer {layer}")
        axes.set_xlabel("epochs of training")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    # The format is named, so the file may be called anything; no date keeps equal runs equal.
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
