"""``offramp exits calibrate``: thresholds that keep a promised agreement, into the exit file.

Half of the prompts draw up candidates (full-depth answers, teacher-forced), the other half tries
them on free-running answers, careful ones first, and judges each answer at full depth. With
``--activation-dtype int8`` it is found instead what inputs of 8 bits keep without any exit.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from offramp.models.sampling_params import ExitCriterion, ExitMode, ExitSettings, KVFill
from offramp.server.lab.options import (
    Commands,
    LabError,
    add_options,
    depths,
    guarded,
    positive,
    qualities,
    quality,
    say,
    table,
)

if TYPE_CHECKING:
    from offramp.models.exits.calibration import Candidate
    from offramp.server.engine.offline import Finished
    from offramp.server.lab.runs import Run
    from offramp.server.lab.selection import Choice, Trial
    from offramp.server.lab.workbench import Workbench

# What `auto` does depends on the machine's costs, and is never worse than `project`.
_FILLS = (KVFill.PROJECT, KVFill.COPY, KVFill.RECOMPUTE)
_HIGHEST_RISK = 0.08
# A budget may be worth any quality, so its candidates go on for longer.
_HIGHEST_RISK_FOR_DEPTH = 0.4
# A promise of inputs is one of so many below 1.
_QUALITY_STEPS = 1000
_COST = (
    "seconds per token: the run's own steps, each at the median time of equal steps over all runs"
)
_COLUMNS = (
    ("quality", "quality", "{:.4f}"),
    ("p-value", "p_value", "{:.2g}"),
    ("agreement", "agreement", "{:.4f}"),
    ("teacher-forced", "foreseen_agreement", "{:.4f}"),
    ("layers skipped", "layers_skipped", "{:.2%}"),
    ("depth", "mean_depth", "{:.2f}"),
    ("x off", "speed_up", "{:.3f}"),
    ("thresholds", "thresholds", "{}"),
)


def add_parser(commands: Commands) -> None:
    """Add ``calibrate`` to the sub-commands of ``offramp exits``."""
    parser = commands.add_parser(
        "calibrate", help="find thresholds that keep a quality", allow_abbrev=False
    )
    add_options(parser)
    add = parser.add_argument
    add("--quality", type=qualities, default=(), help="such as 0.95,0.98: share agreeing")
    add("--confidence", type=quality, default=0.95, help="[0.95]")
    add("--mean-depth", type=depths, default=(), help="layers per token to stay within")
    criteria = [each.value for each in ExitCriterion]
    add("--criterion", choices=criteria, default=ExitCriterion.TWO_KEY.value, help="[two_key]")
    add(
        "--kv-fill",
        choices=[each.value for each in _FILLS],
        default=KVFill.PROJECT.value,
        help="how K,V of skipped layers are made [project]",
    )
    add("--candidates", type=positive, default=9, help="thresholds to try at most [9]")
    add(
        "--activation-dtype",
        choices=("int8",),
        help="find instead what inputs of 8 bits keep, in all layers",
    )
    add("--out", type=Path, help="exit file to write; in place if unset")
    parser.set_defaults(command=guarded("calibrate", calibrate))


def calibrate(args: argparse.Namespace) -> int:
    """Run the calibration; raises LabError where a quality or depth is out of reach.

    Points that were reached are written all the same.
    """
    # Imported here, as in all of this module, so that --help needs no torch.
    from offramp.server.lab import selection  # noqa: PLC0415
    from offramp.server.lab.runs import StepLog, priced  # noqa: PLC0415
    from offramp.server.lab.workbench import open_workbench  # noqa: PLC0415

    if args.activation_dtype:
        return _calibrate_inputs(args)
    if not args.quality and not args.mean_depth:
        raise LabError("name a --quality or a --mean-depth to calibrate for")
    # A promise must not lean on exits that did not pay here and were not taken.
    bench = open_workbench(args, every_exit=True)
    prompts = bench.prompts(args.prompts, args.limit, args.seed)
    drawing, trying = prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]
    if not drawing:
        raise LabError("one prompt cannot be split into halves")
    too_few = selection.too_few_prompts(args.quality, args.confidence, len(drawing), len(trying))
    args.quality = tuple(each for each in args.quality if each not in too_few)
    if not args.quality and not args.mean_depth:
        raise LabError("; ".join(too_few.values()))
    say(f"{len(drawing)} answers at full depth for candidates")
    steps = StepLog()
    full = bench.answer(drawing, ExitSettings(), steps)
    found = _candidates(args, bench, full)
    runs = _try(args, bench, trying, found)
    costs = priced([steps, *(run.steps for run in runs)])
    off = costs[0] / sum(len(item.token_ids) for item in full)
    trials = [
        selection.trial_of(candidate, run, bench.model.config.num_layers, cost)
        # Candidates after the last run were not tried.
        for candidate, run, cost in zip(found, runs, costs[1:], strict=False)
    ]
    choices, missed = selection.choose(
        trials, args.quality, args.mean_depth, args.confidence, tried=len(found)
    )
    missed = [*too_few.values(), *missed]
    if not choices:
        raise LabError("; ".join([*missed, "nothing was written"]))
    _write(args, bench, choices, trials)
    rows = [
        selection.choice_row(choice, trials[choice.trial], args.confidence, off)
        for choice in choices
    ]
    document = {
        "criterion": args.criterion,
        "kv_fill": args.kv_fill,
        "confidence": args.confidence,
        "prompts": {"candidates": len(drawing), "trials": len(trying)},
        "off_seconds_per_token": off,
        "cost": _COST,
        "points": rows,
        "trials": [selection.trial_row(trial) for trial in trials],
    }
    sys.stdout.write(table(_COLUMNS, rows) + "\n\n" + json.dumps(document) + "\n")
    if missed:
        # What was reached took long to show; it is kept.
        raise LabError("; ".join([*missed, "the points that were reached are written"]))
    return 0


def _calibrate_inputs(args: argparse.Namespace) -> int:
    """Judge answers of 8-bit inputs at full depth with 16 bits, and note what they keep."""
    from offramp.models.exits.calibration import upper_bound  # noqa: PLC0415
    from offramp.models.exits.points import CoarsePoint  # noqa: PLC0415
    from offramp.server.lab.workbench import (  # noqa: PLC0415
        open_workbench,
        read_exact,
        write_beside_deltas,
    )

    if args.quality or args.mean_depth:
        raise LabError("--activation-dtype has one quality, which is measured: name none")
    bench = open_workbench(args, every_exit=False, activation_dtype=args.activation_dtype)
    prompts = bench.prompts(args.prompts, args.limit, args.seed)
    judged = bench.run(prompts, ExitSettings()).judgement
    bound = 1 - upper_bound(judged.losses, args.confidence)
    # Downwards, so that the promise holds.
    quality = math.floor(bound * _QUALITY_STEPS) / _QUALITY_STEPS
    if quality <= 0:
        raise LabError("so few answers show no quality at all")
    point = CoarsePoint(
        quality, args.confidence, judged.agreement, len(prompts), sum(judged.tokens)
    )
    changed = replace(read_exact(bench, args.exits), coarse=point)
    write_beside_deltas(changed, args.exits, args.out or args.exits)
    sys.stdout.write(json.dumps(asdict(point)) + "\n")
    return 0


def _candidates(
    args: argparse.Namespace, bench: Workbench, full: Sequence[Finished]
) -> list[Candidate]:
    from offramp.server.lab.candidates import candidates_from  # noqa: PLC0415

    criterion, fill = ExitCriterion(args.criterion), KVFill(args.kv_fill)
    high = _HIGHEST_RISK_FOR_DEPTH if args.mean_depth else _HIGHEST_RISK
    lines = candidates_from(bench, full, [criterion], count=args.candidates, high=high, fill=fill)
    if not lines[criterion]:
        raise LabError(
            f"no thresholds of {criterion} skip a layer with at most {high:.0%} of tokens wrong; "
            "train better exits"
        )
    return lines[criterion]


def _try(
    args: argparse.Namespace,
    bench: Workbench,
    prompts: Sequence[tuple[int, ...]],
    found: Sequence[Candidate],
) -> list[Run]:
    """Free-running answers of each candidate, until the rest can reach no quality or depth."""
    from offramp.models.exits.calibration import betting_p_value  # noqa: PLC0415

    alpha = 1 - args.confidence
    runs: list[Run] = []
    quality_left, depth_left = bool(args.quality), bool(args.mean_depth)
    for number, candidate in enumerate(found, start=1):
        exits = ExitSettings(
            mode=ExitMode.ADAPTIVE,
            criterion=ExitCriterion(args.criterion),
            thresholds=candidate.thresholds,
            kv_fill=KVFill(args.kv_fill),
        )
        run = bench.run(prompts, exits)
        runs.append(run)
        if quality_left:
            p_value = betting_p_value(run.judgement.losses, 1 - args.quality[0], alpha)
            quality_left = p_value <= alpha
        if depth_left:
            depth_left = run.mean_depth > min(args.mean_depth)
        say(
            f"candidate {number} of {len(found)}: {run.judgement.agreement:.4f} agree, "
            f"{run.mean_depth:.2f} layers a token"
        )
        if not quality_left and not depth_left:
            break
    return runs


def _write(
    args: argparse.Namespace, bench: Workbench, choices: Sequence[Choice], trials: Sequence[Trial]
) -> None:
    """Put the chosen points into the file; everything else that holds beside them stays."""
    from offramp.models.exits.file import points_of  # noqa: PLC0415
    from offramp.server.lab.selection import joined, operating_point  # noqa: PLC0415
    from offramp.server.lab.workbench import read_exact, write_beside_deltas  # noqa: PLC0415

    file = read_exact(bench, args.exits)
    new = [
        operating_point(
            choice,
            trials[choice.trial],
            confidence=args.confidence,
            criterion=ExitCriterion(args.criterion),
            kv_fill=KVFill(args.kv_fill),
        )
        for choice in choices
    ]
    points, wrong = joined(file.points, new)
    for point in wrong:
        say(f"the earlier point of quality {point.quality:g} contradicts them: dropped")
    out = args.out or args.exits
    rows = [point.to_json() for point in points]
    changed = replace(file, points=points_of(out, rows, len(file.heads)))
    write_beside_deltas(changed, args.exits, out)
