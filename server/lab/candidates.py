"""Candidate thresholds of any criterion, from answers at full depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from offramp.models.exits.calibration import (
    Candidate,
    Scored,
    candidates,
    stepwise_candidates,
    teacher_forced,
    uniform_candidates,
)
from offramp.models.exits.criteria import STATEFUL
from offramp.models.exits.training.data import Answer, collect
from offramp.models.sampling_params import NEVER, ExitCriterion, ExitMode, ExitSettings, KVFill
from offramp.server.engine.bulk import Finished
from offramp.server.lab.scores import score
from offramp.server.lab.workbench import Workbench

# Answers a fill's harm is measured on, and the share of their tokens that leaves for it.
_PILOT = 96
_PILOT_SHARE = 1 / 3


def candidates_from(
    bench: Workbench,
    full: Sequence[Finished],
    criteria: Sequence[ExitCriterion],
    *,
    count: int = 9,
    low: float = 0.002,
    high: float = 0.08,
    fill: KVFill = KVFill.RECOMPUTE,
) -> dict[ExitCriterion, list[Candidate]]:
    """For each criterion candidates from careful to aggressive, judged on ``full``.

    ``full`` are answers at full depth; ``count``, ``low`` and ``high`` as in path.candidates. Where
    ``fill`` is not exact, the harm of its K,V is measured first and counted in.
    """
    answers = [Answer(item.request.prompt, tuple(item.token_ids)) for item in full]
    scored = score(bench.model, bench.file, collect(bench.model, answers), criteria)
    if fill is not KVFill.RECOMPUTE:
        scored = {
            name: replace(own, harm=fill_harm(bench, full, name, own, fill))
            for name, own in scored.items()
            if name not in STATEFUL
        } | {name: own for name, own in scored.items() if name in STATEFUL}
    return {name: _line(name, scored[name], count, low, high) for name in criteria}


def fill_harm(
    bench: Workbench,
    full: Sequence[Finished],
    criterion: ExitCriterion,
    scored: Scored,
    fill: KVFill,
) -> tuple[float, ...]:
    """How many later tokens disagree for each token that leaves, by exit.

    Each exit is opened alone, at the score the surest third of the tokens reaches; what
    free-running answers disagree beyond the exit's own errors is the harm of its filled K,V.
    """
    prompts = [item.request.prompt for item in full[:_PILOT]]
    harm = []
    for index in range(len(bench.file.heads)):
        bound = float(scored.scores[index].quantile(1 - _PILOT_SHARE))
        alone = tuple(bound if i == index else NEVER for i in range(len(bench.file.heads)))
        exits = ExitSettings(ExitMode.ADAPTIVE, criterion, alone, kv_fill=fill)
        run = bench.run(prompts, exits)
        layer = bench.file.heads[index].layer
        left = sum(item.exit_layers.count(layer) for item in run.finished)
        share = left / sum(run.judgement.tokens)
        own_errors, _ = teacher_forced(scored, alone)
        beyond = 1 - run.judgement.agreement - own_errors
        harm.append(max(0.0, beyond) / share if share else 0.0)
    return tuple(harm)


def _line(
    criterion: ExitCriterion, scored: Scored, count: int, low: float, high: float
) -> list[Candidate]:
    if criterion is ExitCriterion.FIXED:
        return stepwise_candidates(scored)
    # Scores that are no probability of being right, or one for the whole answer, share a threshold.
    if criterion in STATEFUL or criterion is ExitCriterion.PROMPT_DEPTH:
        return uniform_candidates(scored, count, low, high)
    return candidates(scored, count, low, high)
