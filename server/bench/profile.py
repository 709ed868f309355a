"""Where the milliseconds of a decode step go, as a table and a picture."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from offramp.kernels.native import library
from offramp.models.sampling_params import ExitSettings, SamplingParams
from offramp.server.bench.common import BenchError
from offramp.server.bench.device import bandwidth
from offramp.server.bench.targets import Prompt
from offramp.server.engine.build import runner_of
from offramp.server.engine.engine import Engine
from offramp.server.engine.offline import run_all
from offramp.server.engine.request import EngineOutput, GenerationRequest


def require_matplotlib() -> None:
    """Raise BenchError, before any work is done, where the picture cannot be drawn."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise BenchError("--profile needs matplotlib: pip install 'offramp[train]'") from error


def profile(
    engine: Engine, prompts: Sequence[Prompt], concurrency: Sequence[int], max_tokens: int
) -> dict[str, Any]:
    """Milliseconds of each part of a decode step at full depth, for each number of streams.

    A step is a token of every stream. Beside them the time that reading all weights once takes at
    the bandwidth that reading memory reaches here: no step at one stream can be faster.
    """
    read = _weight_bytes(engine)
    rows = [_steps(engine, prompts, streams, max_tokens) for streams in concurrency]
    # Last: freeing the memory that it reads would stop a step for 80 ms.
    _, rate = bandwidth(torch.device("cpu"))
    return {
        "weight_bytes": read,
        "bandwidth_bytes_per_s": round(rate),
        "weights_once_ms": round(1e3 * read / rate, 3),
        "rows": rows,
    }


def profile_text(found: dict[str, Any]) -> str:
    """The same as a table."""
    parts = list(found["rows"][0]["parts_ms"])
    lines = ["| ms a step | " + " | ".join(f"{r['streams']} streams" for r in found["rows"]) + " |"]
    lines.append("|---|" + "---|" * len(found["rows"]))
    for part in parts:
        values = " | ".join(f"{row['parts_ms'][part]:.2f}" for row in found["rows"])
        lines.append(f"| {part} | {values} |")
    lines.append("| all | " + " | ".join(f"{row['step_ms']:.2f}" for row in found["rows"]) + " |")
    lines.append(
        f"\nreading the weights once: {found['weights_once_ms']:.2f} ms "
        f"({found['weight_bytes'] / 1e6:.0f} MB at "
        f"{found['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s)\n"
    )
    return "\n".join(lines)


def draw(found: dict[str, Any], title: str, path: Path) -> None:
    """The same as bars, one for each number of streams."""
    figure_module = importlib.import_module("matplotlib.figure")
    colours = importlib.import_module("matplotlib").colormaps["tab20"].colors
    rows = found["rows"]
    figure = figure_module.Figure(figsize=(9, 1.6 + 0.8 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    names = [f"{row['streams']} streams" if row["streams"] > 1 else "1 stream" for row in rows]
    for colour, part in zip(colours, rows[0]["parts_ms"], strict=False):
        width = [row["parts_ms"][part] for row in rows]
        axes.barh(names, width, left=left, label=part, color=colour)
        left = [a + b for a, b in zip(left, width, strict=True)]
    for name, total in zip(names, left, strict=True):
        # On white, because the line of the weights may cross it.
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{total:.1f} ms", (total, name), fontsize=8, bbox=paper, **place)
    axes.axvline(found["weights_once_ms"], color="black", linestyle="--", linewidth=1)
    axes.annotate(
        " weights once from memory",
        (found["weights_once_ms"], 1.01),
        xycoords=("data", "axes fraction"),
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(left))
    axes.set_xlabel("milliseconds of a decode step")
    figure.suptitle(title, fontsize=10)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path)


class _Timed:
    """An engine whose last step is timed by parts of layers; see EngineProtocol."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.info = engine.info
        self.add, self.abort = engine.add, engine.abort
        self.parts: dict[str, float] = {}
        self._kernels = library()

    @property
    def has_work(self) -> bool:
        """See Engine."""
        return self.engine.has_work

    def step(self) -> EngineOutput:
        """See Engine."""
        if self._kernels is None:
            return self.engine.step()
        with self._kernels.timing() as self.parts:
            return self.engine.step()


def _steps(
    engine: Engine, prompts: Sequence[Prompt], streams: int, max_tokens: int
) -> dict[str, Any]:
    """Means over the steps in which every stream gets a token, after a round of warm-up."""
    timed = _Timed(engine)
    spent: dict[str, float] = defaultdict(float)
    steps = 0

    def observe(output: EngineOutput) -> None:
        nonlocal steps
        stats = output.stats
        if stats is None or stats.prefill_rows or stats.decode_rows != streams:
            return
        for name, seconds in timed.parts.items():
            spent[name] += seconds
        layers = stats.seconds - stats.head_seconds
        spent["rest of segments"] += layers - sum(timed.parts.values())
        spent["LM head, sampling"] += stats.head_seconds
        spent["planning, committing"] += stats.host_seconds
        steps += stats.head_seconds > 0

    for turn in ("warm-up", "measured"):
        spent.clear()
        steps = 0
        requests = [
            GenerationRequest(
                f"{streams} {turn} {number}",
                prompts[number % len(prompts)],
                SamplingParams(max_tokens=max_tokens, temperature=0.0),
                ExitSettings(),
            )
            for number in range(streams)
        ]
        run_all(timed, requests, concurrency=streams, observe=observe)
    if not steps:
        raise BenchError("--profile saw no step of all streams; raise --max-tokens")
    parts = {name: round(1e3 * seconds / steps, 6) for name, seconds in spent.items()}
    return {"streams": streams, "parts_ms": parts, "step_ms": round(sum(parts.values()), 3)}


def _weight_bytes(engine: Engine) -> int:
    return runner_of(engine).model.weight_bytes
