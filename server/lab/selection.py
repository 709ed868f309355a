"""From trials of candidate thresholds to operating points with a promise.

Candidates come in a fixed order from careful to aggressive, drawn up on other prompts than those
of the trials; so for each quality the candidates are tested one after the other at the full level
until the first that fails (Learn then Test, arXiv 2110.01052, with fixed-sequence testing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offramp.models.exits.calibration import (
    Candidate,
    answers_needed,
    betting_p_value,
    fixed_sequence,
    upper_bound,
)
from offramp.models.exits.points import OperatingPoint
from offramp.models.sampling_params import ExitCriterion, KVFill
from offramp.server.lab.runs import Run

# What two different settings of one file differ in at least, so that their order is clear.
_STEP = 1e-4


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate tried on free-running answers.

    ``losses`` are the answers' shares of tokens that differ from full depth; ``seconds`` the
    measured cost of a token; ``mean_depth`` and ``layers_skipped`` count layers really run.
    """

    candidate: Candidate
    losses: tuple[float, ...]
    tokens: int
    agreement: float
    mean_depth: float
    layers_skipped: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Choice:
    """Trial number ``trial`` and the ``quality`` it is known to keep."""

    trial: int
    quality: float


def trial_of(candidate: Candidate, run: Run, num_layers: int, seconds: float) -> Trial:
    """What ``run`` showed of a candidate; ``seconds`` is the cost of the whole run."""
    tokens = sum(run.judgement.tokens)
    return Trial(
        candidate=candidate,
        losses=tuple(run.judgement.losses),
        tokens=tokens,
        agreement=run.judgement.agreement,
        mean_depth=run.mean_depth,
        layers_skipped=1 - run.mean_depth / num_layers,
        seconds=seconds / tokens,
    )


def too_few_prompts(
    wanted: Sequence[float], confidence: float, drawing: int, trying: int
) -> Mapping[float, str]:
    """The qualities that not even faultless answers to ``trying`` prompts could show, and why.

    ``drawing`` is the number of prompts that candidates are drawn up on.
    """
    alpha = 1 - confidence
    missed = {}
    for quality in wanted:
        needed = answers_needed(1 - quality, alpha)
        if trying < needed:
            p_value = betting_p_value([0.0] * trying, 1 - quality, alpha)
            best = 1 - upper_bound([0.0] * trying, confidence)
            missed[quality] = (
                f"quality {quality:g} at confidence {confidence:g} needs {2 * needed} prompts "
                f"or more; {drawing + trying} can show {best:.4f} at best (p = {p_value:.2g} for "
                f"{quality:g} even if every token agreed)"
            )
    return missed


def choose(
    trials: Sequence[Trial],
    qualities: Sequence[float],
    depths: Sequence[float],
    confidence: float,
    *,
    tried: int,
) -> tuple[list[Choice], list[str]]:
    """A choice for each quality and mean depth that was reached, and why the others were not.

    ``tried`` is the number of candidates, as in within_depth.
    """
    choices: list[Choice] = []
    missed: list[str] = []
    for quality in qualities:
        choice = fastest(trials, quality, confidence)
        if choice is not None:
            choices.append(choice)
            continue
        p_value = p_values(trials, quality, confidence)[0]
        missed.append(
            f"quality {quality:g} is out of reach: the best shown at confidence "
            f"{confidence:g} is {best_quality(trials, confidence):.4f}, and the most careful "
            f"thresholds have p = {p_value:.2g} for {quality:g}"
        )
    for depth in depths:
        choice = within_depth(trials, depth, confidence, tried)
        if choice is not None and choice.quality > 0:
            choices.append(choice)
            continue
        least = min(trial.mean_depth for trial in trials)
        missed.append(
            f"a mean depth of {depth:g} is out of reach: the least measured is {least:.2f}"
        )
    return monotone(choices), missed


def p_values(trials: Sequence[Trial], quality: float, confidence: float) -> list[float]:
    """Of H0: the answers' mean share of agreeing tokens is below ``quality``, for each trial."""
    alpha = 1 - confidence
    return [betting_p_value(trial.losses, 1 - quality, alpha) for trial in trials]


def fastest(trials: Sequence[Trial], quality: float, confidence: float) -> Choice | None:
    """The cheapest trial shown to keep ``quality`` with ``confidence``; None if there is none."""
    shown = fixed_sequence(p_values(trials, quality, confidence), _level(confidence))
    if not shown:
        return None
    return Choice(min(range(shown), key=lambda index: trials[index].seconds), quality)


def within_depth(
    trials: Sequence[Trial], depth: float, confidence: float, tried: int
) -> Choice | None:
    """The most careful trial that runs at most ``depth`` layers a token; None if none does.

    Which one that is depends on its own measured depth, so its quality is a lower bound that holds
    for all ``tried`` candidates at once (Bonferroni).
    """
    for index, trial in enumerate(trials):
        if trial.mean_depth <= depth:
            shared = 1 - _level(confidence) / tried
            return Choice(index, 1 - upper_bound(trial.losses, shared))
    return None


def best_quality(trials: Sequence[Trial], confidence: float) -> float:
    """The highest quality any trial shows by itself, in ``confidence``."""
    return max(1 - upper_bound(trial.losses, confidence) for trial in trials)


def monotone(choices: Sequence[Choice]) -> list[Choice]:
    """The same choices by rising quality and carefulness.

    Where a more aggressive trial claims more than a more careful one, its claim is lowered; a lower
    quality is always true too.
    """
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda each: (each.trial, -each.quality)):
        quality = choice.quality
        if kept and choice.trial != kept[-1].trial:
            quality = min(quality, kept[-1].quality - _STEP)
        kept.append(Choice(choice.trial, quality))
    return kept[::-1]


def choice_row(choice: Choice, trial: Trial, confidence: float, off: float) -> dict[str, Any]:
    """One chosen point for the table; ``off`` is the cost of a token at full depth."""
    return {
        "quality": choice.quality,
        "p_value": p_values([trial], choice.quality, confidence)[0],
        "speed_up": off / trial.seconds,
        **trial_row(trial),
    }


def trial_row(trial: Trial) -> dict[str, Any]:
    """One trial for the document."""
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


def operating_point(
    choice: Choice, trial: Trial, *, confidence: float, criterion: ExitCriterion, kv_fill: KVFill
) -> OperatingPoint:
    """What the exit file keeps of a choice and its trial."""
    return OperatingPoint(
        quality=round(choice.quality, 6),
        confidence=confidence,
        criterion=criterion,
        kv_fill=kv_fill,
        thresholds=trial.candidate.thresholds,
        agreement=trial.agreement,
        layers_skipped=trial.layers_skipped,
        mean_depth=trial.mean_depth,
        prompts=len(trial.losses),
        tokens=trial.tokens,
    )


def joined(
    earlier: Sequence[OperatingPoint], new: Sequence[OperatingPoint]
) -> tuple[list[OperatingPoint], list[OperatingPoint]]:
    """Points of a file with ``new`` ones, and those of ``earlier`` that contradict a new one.

    Earlier points of a new one's criterion, fill and quality give way to it.
    """

    def promise(point: OperatingPoint) -> tuple[ExitCriterion, KVFill, float]:
        return point.criterion, point.kv_fill, point.quality

    promised = set(map(promise, new))
    other = [point for point in earlier if promise(point) not in promised]
    wrong = [point for point in other if any(_contradict(point, each) for each in new)]
    return [*(point for point in other if point not in wrong), *new], wrong


def _contradict(one: OperatingPoint, other: OperatingPoint) -> bool:
    loose, strict = sorted((one, other), key=lambda point: point.quality)
    return strict.contradicts(loose)


def _level(confidence: float) -> float:
    # So that 1 - 0.95 is 0.05 and a p-value just there is not lost to rounding.
    return round(1 - confidence, 12)
