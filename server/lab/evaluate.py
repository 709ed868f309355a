"""``offramp exits eval``: what exits cost in quality and bring in time, on prompts held out.

Every setting runs the same prompts, between two runs with exits off; the speed of a setting is
relative to these two, so a machine whose speed drifts drifts for both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from offramp.models.sampling_params import ExitCriterion, KVFill
from offramp.server.lab.options import (
    Commands,
    LabError,
    add_options,
    guarded,
    positive,
    say,
    table,
)

if TYPE_CHECKING:
    from offramp.server.lab.settings import Setting
    from offramp.server.lab.tasks import Item
    from offramp.server.lab.workbench import Workbench

    TaskItems = Mapping[str, Sequence[Item]]

T = TypeVar("T")

_COLUMNS = (
    ("setting", "name", "{}"),
    ("agreement", "agreement", "{:.4f}"),
    ("per answer", "answer_agreement", "{:.4f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("length", "length", "{:.1f}"),
    ("repetition", "repetition", "{:.3f}"),
    ("distinct-2", "distinct_2", "{:.3f}"),
    ("layers skipped", "layers_skipped", "{:.2%}"),
    ("depth", "mean_depth", "{:.2f}"),
    ("prompt skipped", "prompt_skipped", "{:.2%}"),
    ("TTFT ms", "ttft_ms", "{:.0f}"),
    ("tokens/s", "tokens_per_s", "{:.1f}"),
    ("x off", "speed_up", "{:.3f}"),
    ("ITL p99 ms", "itl_p99_ms", "{:.1f}"),
)
_PICTURES = (
    ("layers_skipped", "layers skipped (share)", "Quality against work", "quality-layers.png"),
    ("speed_up", "tokens per second relative to off", "Quality against speed", "quality-speed.png"),
)


def add_parser(commands: Commands) -> None:
    """Add ``eval`` to the sub-commands of ``offramp exits``."""
    parser = commands.add_parser(
        "eval", help="measure quality and speed on held-out prompts", allow_abbrev=False
    )
    add_options(parser)
    add = parser.add_argument
    add("--tasks", type=_tasks, default={}, help="gsm8k=FILE,arc=FILE,ag_news=FILE")
    add("--points", default="all", help="all, none, or qualities such as 0.95,0.98")
    criteria = (ExitCriterion.TWO_KEY, ExitCriterion.MAX_PROB)
    add("--criteria", type=_each(ExitCriterion), default=criteria)
    fills = (KVFill.PROJECT, KVFill.COPY, KVFill.RECOMPUTE)
    add("--fills", type=_each(KVFill), default=fills)
    add("--prefill", type=_bounds, default=(), help="gate scores at which prompt tokens leave")
    add("--steps", type=positive, default=5, help="of each sweep [5]")
    add("--every-exit", action="store_true", help="leave also where it does not pay in time")
    add("--fill-table", action="store_true", help="only compare ways to fill K,V, then end")
    add("--out", type=Path, required=True, help="folder for results")
    parser.set_defaults(command=guarded("eval", evaluate))


def evaluate(args: argparse.Namespace) -> int:
    """Run the evaluation; raises LabError for what cannot be done."""
    from offramp.server.lab.plots import draw, require_matplotlib  # noqa: PLC0415
    from offramp.server.lab.settings import fill_rows  # noqa: PLC0415
    from offramp.server.lab.tasks import load_task  # noqa: PLC0415
    from offramp.server.lab.workbench import open_workbench  # noqa: PLC0415

    if not args.fill_table:
        require_matplotlib()
    bench = open_workbench(args, every_exit=args.every_exit)
    prompts = bench.prompts(args.prompts, args.limit, args.seed)
    tasks = {
        task: load_task(task, path, args.limit, args.seed) for task, path in args.tasks.items()
    }
    name = "fills" if args.fill_table else "eval"
    rows = (
        fill_rows(args, bench, prompts) if args.fill_table else _rows(args, bench, prompts, tasks)
    )
    document = {
        "model": args.model,
        "prompts": len(prompts),
        "max_tokens": args.max_tokens,
        "concurrency": args.concurrency,
        "exits_taken": "every" if args.every_exit or args.fill_table else "where they pay",
        "rows": rows,
    }
    columns = [*_COLUMNS, *((task, f"task_{task}", "{:.3f}") for task in tasks)]
    text = table(columns, rows)
    _write(args.out, name, text, document)
    if not args.fill_table:
        for key, label, title, file in _PICTURES:
            draw(rows, key, label, title, args.out / file)
    sys.stdout.write(text + "\n\n" + json.dumps(document) + "\n")
    return 0


def _rows(
    args: argparse.Namespace, bench: Workbench, prompts: Sequence[tuple[int, ...]], tasks: TaskItems
) -> list[dict[str, Any]]:
    """One row a setting, the first with exits off."""
    from offramp.server.lab.runs import figures, speed  # noqa: PLC0415
    from offramp.server.lab.settings import OFF, settings_for  # noqa: PLC0415

    layers = bench.model.config.num_layers
    # The first steps of a process are slow.
    bench.answer(prompts[: args.concurrency], OFF.exits)
    off = bench.run(prompts, OFF.exits)
    plain = figures(off, layers).to_json()
    rows = [{**OFF.to_json(), **plain, "speed_up": 1.0, **_task_scores(bench, OFF, tasks)}]
    before = speed(off.finished)
    for setting in settings_for(args, bench, off):
        say(setting.name)
        run = bench.run(prompts, setting.exits)
        after = speed(bench.answer(prompts, OFF.exits))
        found = figures(run, layers)
        ratio = found.tokens_per_s / ((before + after) / 2)
        scores = (
            _task_scores(bench, setting, tasks) if setting.kind in {"point", "lossless"} else {}
        )
        rows.append({**setting.to_json(), **found.to_json(), "speed_up": round(ratio, 4), **scores})
        before = after
    return rows


def _task_scores(bench: Workbench, setting: Setting, tasks: TaskItems) -> dict[str, float]:
    """Share of right answers of each task."""
    from offramp.server.lab.tasks import TASKS  # noqa: PLC0415

    scores = {}
    for name, items in tasks.items():
        encoded = zip(items, bench.encode([item.prompt for item in items]), strict=True)
        asked = [(item, ids) for item, ids in encoded if ids is not None]
        if not asked:
            raise LabError(f"no question of task {name} leaves room for an answer")
        finished = bench.answer([ids for _, ids in asked], setting.exits)
        texts = [bench.text(answer.token_ids) for answer in finished]
        right = [
            TASKS[name].right(item, text) for (item, _), text in zip(asked, texts, strict=True)
        ]
        scores[f"task_{name}"] = round(sum(right) / len(right), 5)
    return scores


def _write(folder: Path, name: str, text: str, document: Mapping[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(
            json.dumps(document, indent=2) + "\n", encoding="utf-8"
        )
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise LabError(f"{folder}: {error.strerror}") from error


def _tasks(text: str) -> dict[str, Path]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and path for name, _, path in pairs):
        raise argparse.ArgumentTypeError("must be NAME=FILE, separated by commas")
    return {name: Path(path) for name, _, path in pairs}


def _each(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Reads values of ``kind`` that are separated by commas."""

    def values(text: str) -> tuple[T, ...]:
        try:
            return tuple(map(kind, text.split(",")))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return values


def _bounds(text: str) -> tuple[float, ...]:
    bounds = _each(float)(text)
    if not all(0 <= bound <= 1 for bound in bounds):
        raise argparse.ArgumentTypeError("gate scores lie in 0 to 1")
    return bounds
