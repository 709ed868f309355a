"""``offramp exits calibrate``: thresholds that keep a promised agreement, into the exit file.

Half of the prompts draw up candidates (full-depth answers, teacher-forced), the other half tries
them on free-running answers, careful ones first, and judges each answer at full depth.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.models.sampling_params import ExitCriterion, ExitMode, ExitSettings, KVFill
from offramp.server.lab import options
from offramp.server.lab.errors import LabError
from offramp.server.lab.tables import table

if TYPE_CHECKING:
    from offramp.models.exits.calibration import Candidate
    from offramp.server.engine.bulk import Finished
    from offramp.server.lab.runs import Run
    from offramp.server.lab.selection import Choice, Trial
    from offramp.server.lab.workbench import Workbench

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 (has no public name)

# What `auto` does depends on the machine's costs, and is never worse than `project`.
_FILLS = (KVFill.PROJECT, KVFill.COPY, KVFill.RECOMPUTE)
_HIGHEST_RISK = 0.08
# A budget may be worth any quality, so its candidates go on for longer.
_HIGHEST_RISK_FOR_DEPTH = 0.4
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
    options.add_options(parser)
    parser.add_argument(
        "--quality", type=options.qualities, default=(), help="such as 0.95,0.98: share agreeing"
    )
    parser.add_argument("--confidence", type=options.quality, default=0.95, help="[0.95]")
    parser.add_argument(
        "--mean-depth", type=options.depths, default=(), help="layers per token to stay within"
    )
    parser.add_argument(
        "--criterion",
        choices=[each.value for each in ExitCriterion],
        default=ExitCriterion.TWO_KEY.value,
        help="[two_key]",
    )
    parser.add_argument(
        "--kv-fill",
        choices=[each.value for each in _FILLS],
        default=KVFill.PROJECT.value,
        help="how K,V of skipped layers are made [project]",
    )
    parser.add_argument(
        "--candidates", type=options.positive, default=9, help="thresholds to try at most [9]"
    )
    parser.add_argument("--out", type=Path, help="exit file to write; in place if unset")
    parser.set_defaults(command=options.guarded("calibrate", calibrate))


def calibrate(args: argparse.Namespace) -> int:
    """Run the calibration; raises LabError where a quality or depth is out of reach.

    Points that were reached are written all the same.
    """
    from offramp.server.lab.prices import StepLog, priced  # noqa: PLC0415
    from offramp.server.lab.workbench import open_workbench  # noqa: PLC0415

    if not args.quality and not args.mean_depth:
        raise LabError("name a --quality or a --mean-depth to calibrate for")
    # A promise must not lean on exits that did not pay here and were not taken.
    bench = open_workbench(args, every_exit=True)
    prompts = bench.prompts(args.prompts, args.limit, args.seed)
    drawing, trying = prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]
    too_few = _drop_unshowable(args, len(drawing), len(trying))
    options.say(f"{len(drawing)} answers at full depth for candidates")
    steps = StepLog()
    full = bench.answer(drawing, ExitSettings(), steps)
    found = _candidates(args, bench, full)
    runs = _try(args, bench, trying, found)
    costs = priced([steps, *(run.steps for run in runs)])
    off = costs[0] / sum(len(item.token_ids) for item in full)
    seconds = [cost / sum(run.judgement.tokens) for cost, run in zip(costs[1:], runs, strict=True)]
    trials = _trials(bench.model.config.num_layers, found, runs, seconds)
    choices, missed = _choices(args, trials, len(found))
    missed = [*too_few, *missed]
    if not choices:
        raise LabError("; ".join([*missed, "nothing was written"]))
    _write(args, bench, choices, trials)
    rows = [_row(args, choice, trials, off) for choice in choices]
    document = {
        "criterion": args.criterion,
        "kv_fill": args.kv_fill,
        "confidence": args.confidence,
        "prompts": {"candidates": len(drawing), "trials": len(trying)},
        "off_seconds_per_token": off,
        "cost": _COST,
        "points": rows,
        "trials": [_trial_row(trial) for trial in trials],
    }
    sys.stdout.write(table(_COLUMNS, rows) + "\n\n" + json.dumps(document) + "\n")
    if missed:
        # What was reached took long to show; it is kept.
        raise LabError("; ".join([*missed, "the points that were reached are written"]))
    return 0


def _drop_unshowable(args: argparse.Namespace, drawing: int, trying: int) -> list[str]:
    """Take from ``args`` the qualities that not even faultless answers could show.

    Returns what is to be said of them; raises LabError at once where nothing else is asked for.
    """
    from offramp.models.exits.calibration import (  # noqa: PLC0415
        answers_needed,
        betting_p_value,
        upper_bound,
    )

    if not drawing:
        raise LabError("one prompt cannot be split into halves")
    alpha = 1 - args.confidence
    missed, kept = [], []
    for quality in args.quality:
        needed = answers_needed(1 - quality, alpha)
        if trying >= needed:
            kept.append(quality)
        else:
            p_value = betting_p_value([0.0] * trying, 1 - quality, alpha)
            best = 1 - upper_bound([0.0] * trying, args.confidence)
            missed.append(
                f"quality {quality:g} at confidence {args.confidence:g} needs {2 * needed} prompts "
                f"or more; {drawing + trying} can show {best:.4f} at best (p = {p_value:.2g} for "
                f"{quality:g} even if every token agreed)"
            )
    if not kept and not args.mean_depth:
        raise LabError("; ".join(missed))
    args.quality = tuple(kept)
    return missed


def _candidates(
    args: argparse.Namespace, bench: Workbench, full: Sequence[Finished]
) -> list[Candidate]:
    from offramp.server.lab.candidates import candidates_from  # noqa: PLC0415

    criterion = ExitCriterion(args.criterion)
    high = _HIGHEST_RISK_FOR_DEPTH if args.mean_depth else _HIGHEST_RISK
    fill = KVFill(args.kv_fill)
    found = candidates_from(bench, full, [criterion], count=args.candidates, high=high, fill=fill)[
        criterion
    ]
    if not found:
        raise LabError(
            f"no thresholds of {criterion} skip a layer with at most {high:.0%} of tokens wrong; "
            "train better exits"
        )
    return found


def _try(
    args: argparse.Namespace,
    bench: Workbench,
    prompts: Sequence[tuple[int, ...]],
    found: Sequence[Candidate],
) -> list[Run]:
    """Free-running answers of each candidate until nothing asked for can come of the rest."""
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
        losses = run.judgement.losses
        if quality_left:
            quality_left = betting_p_value(losses, 1 - args.quality[0], alpha) <= alpha
        if depth_left:
            depth_left = _depth(run) > min(args.mean_depth)
        options.say(
            f"candidate {number} of {len(found)}: {run.judgement.agreement:.4f} agree, "
            f"{_depth(run):.2f} layers a token"
        )
        if not quality_left and not depth_left:
            break
    return runs


def _depth(run: Run) -> float:
    layers = sum(item.stats.layers_executed for item in run.finished if item.stats is not None)
    return layers / sum(run.judgement.tokens)


def _trials(
    num_layers: int, found: Sequence[Candidate], runs: Sequence[Run], seconds: Sequence[float]
) -> list[Trial]:
    from offramp.server.lab.selection import Trial  # noqa: PLC0415

    return [
        Trial(
            candidate=candidate,
            losses=tuple(run.judgement.losses),
            tokens=sum(run.judgement.tokens),
            agreement=run.judgement.agreement,
            mean_depth=_depth(run),
            layers_skipped=1 - _depth(run) / num_layers,
            seconds=cost,
        )
        # Candidates after the last run were not tried.
        for candidate, run, cost in zip(found, runs, seconds, strict=False)
    ]


def _choices(
    args: argparse.Namespace, trials: Sequence[Trial], tried: int
) -> tuple[list[Choice], list[str]]:
    """What was shown of what was asked for, and what is said of the rest."""
    from offramp.server.lab.selection import (  # noqa: PLC0415
        best_quality,
        fastest,
        monotone,
        p_values,
        within_depth,
    )

    choices: list[Choice] = []
    missed: list[str] = []
    for quality in args.quality:
        choice = fastest(trials, quality, args.confidence)
        if choice is not None:
            choices.append(choice)
            continue
        p_value = p_values(trials, quality, args.confidence)[0]
        best = best_quality(trials, args.confidence)
        missed.append(
            f"quality {quality:g} is out of reach: the best shown at confidence "
            f"{args.confidence:g} is {best:.4f}, and the most careful thresholds have "
            f"p = {p_value:.2g} for {quality:g}"
        )
    for depth in args.mean_depth:
        choice = within_depth(trials, depth, args.confidence, tried)
        if choice is not None and choice.quality > 0:
            choices.append(choice)
            continue
        least = min(trial.mean_depth for trial in trials)
        missed.append(
            f"a mean depth of {depth:g} is out of reach: the least measured is {least:.2f}"
        )
    return monotone(choices), missed


def _write(
    args: argparse.Namespace, bench: Workbench, choices: Sequence[Choice], trials: Sequence[Trial]
) -> None:
    """Put the chosen points into the file; everything else that holds beside them stays."""
    from dataclasses import replace  # noqa: PLC0415

    from offramp.models.exits.file import points_of  # noqa: PLC0415
    from offramp.server.lab.exit_files import read_exact, write_beside_deltas  # noqa: PLC0415
    from offramp.server.lab.selection import joined, operating_point  # noqa: PLC0415

    criterion, fill = ExitCriterion(args.criterion), KVFill(args.kv_fill)
    file = read_exact(bench, args.exits)
    new = [
        operating_point(
            choice,
            trials[choice.trial],
            confidence=args.confidence,
            criterion=criterion,
            kv_fill=fill,
        )
        for choice in choices
    ]
    points, wrong = joined(file.points, new)
    for point in wrong:
        options.say(f"the earlier point of quality {point.quality:g} contradicts them: dropped")
    out = args.out or args.exits
    rows = [point.to_json() for point in points]
    changed = replace(file, points=points_of(out, rows, len(file.heads)))
    write_beside_deltas(changed, args.exits, out)


def _row(
    args: argparse.Namespace, choice: Choice, trials: Sequence[Trial], off: float
) -> dict[str, Any]:
    """One chosen point for the table."""
    from offramp.server.lab.selection import p_values  # noqa: PLC0415

    trial = trials[choice.trial]
    return {
        "quality": choice.quality,
        "p_value": p_values([trial], choice.quality, args.confidence)[0],
        "speed_up": off / trial.seconds,
        **_trial_row(trial),
    }


def _trial_row(trial: Trial) -> dict[str, Any]:
    return {
        "thresholds": [round(value, 5) for value in trial.candidate.thresholds],
        "foreseen_agreement": round(1 - trial.candidate.risk, 5),
        "foreseen_layers_skipped": round(trial.candidate.skipped, 5),
        "agreement": round(trial.agreement, 5),
        "answer_agreement": round(1 - sum(trial.losses) / len(trial.losses), 5),
        "mean_depth": round(trial.mean_depth, 4),
        "layers_skipped": round(trial.layers_skipped, 5),
        "seconds_per_token": trial.seconds,
        "tokens": trial.tokens,
    }
