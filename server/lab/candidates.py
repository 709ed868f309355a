"""Candidate thresholds of any criterion, from answers at full depth.

Every criterion's scores are computed from hidden states that were kept, without an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.models.exits.calibration import (
    Candidate,
    Scored,
    candidates,
    stepwise_candidates,
    teacher_forced,
    uniform_candidates,
)
from offramp.models.exits.criteria import CRITERIA, ExitView, Trail
from offramp.models.exits.file import ExitFile
from offramp.models.exits.head import ExitHead
from offramp.models.exits.training.data import Answer, States, collect
from offramp.models.sampling_params import NEVER, ExitCriterion, ExitMode, ExitSettings, KVFill
from offramp.models.transformer import Transformer
from offramp.server.engine.offline import Finished
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
        for name, own in scored.items():
            if CRITERIA[name].compares_exits:
                continue
            scored[name] = replace(own, harm=fill_harm(bench, full, name, own, fill))
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
    rule = CRITERIA[criterion]
    if not criterion.needs_threshold:
        return stepwise_candidates(scored)
    # Scores that are no probability of being right share one threshold.
    find = candidates if rule.calibrated else uniform_candidates
    return find(scored, count, low, high)


# Rows scored together; some criteria keep the logits of the exit below.
_ROWS = 256


@torch.inference_mode()
def score(
    model: Transformer, file: ExitFile, states: States, criteria: Sequence[ExitCriterion]
) -> dict[ExitCriterion, Scored]:
    """Each criterion's scores at every exit of ``file`` for n positions of ``states``.

    Every row is scored at every exit, as if none had left below.
    """
    count, exits = len(states.labels), len(file.heads)
    scores = {criterion: torch.zeros(exits, count) for criterion in criteria}
    right = torch.zeros(exits, count, dtype=torch.bool)
    for begin in range(0, count, _ROWS):
        rows = slice(begin, min(begin + _ROWS, count))
        trail = Trail(rows.stop - begin, model.device)
        for index, head in enumerate(file.heads):
            hidden = states.at[head.layer][rows].to(model.dtype)
            view = _FullView(model, file, hidden, index, trail)
            best = view.all_logits.argmax(dim=-1)
            tokens = best if file.vocab is None else file.vocab[best]
            right[index, rows] = (tokens == states.labels[rows]).cpu()
            for criterion in criteria:
                scores[criterion][index, rows] = CRITERIA[criterion].score(view).float().cpu()
    first = _first_rows(states.answer_of.cpu())
    for name in criteria:
        if CRITERIA[name].decides_for_answer:
            scores[name] = scores[name][:, first]
    layers = tuple(head.layer for head in file.heads)
    depth = model.config.num_layers
    return {name: Scored(values, right, layers, depth) for name, values in scores.items()}


class _FullView(ExitView):
    """Rows whose logits are all made at once: here every criterion looks at every row."""

    def __init__(
        self, model: Transformer, file: ExitFile, hidden: Tensor, index: int, trail: Trail
    ) -> None:
        head = file.heads[index]
        super().__init__(
            head,
            hidden,
            lambda states: exit_logits(model, file, head, states),
            eps=model.config.rms_norm_eps,
            index=index,
            num_exits=len(file.heads),
            rows=torch.arange(len(hidden), device=hidden.device),
            trail=trail,
        )
        self.all_logits = exit_logits(model, file, head, hidden)

    def logits(self, at: Tensor) -> Tensor:
        """See ExitView."""
        return self.all_logits[at]


def exit_logits(model: Transformer, file: ExitFile, head: ExitHead, hidden: Tensor) -> Tensor:
    """Logits [n, tokens the exits tell apart] in fp32 of exit states [n, d]."""
    normed = head.normed(hidden, model.config.rms_norm_eps)
    if file.vocab is None:
        return model.logits(normed)
    return F.linear(normed, model.head_rows(file.vocab)).float()


def _first_rows(owner: Tensor) -> Tensor:
    """For each position [n] the index of the first position of the same answer."""
    count = len(owner)
    answers = int(owner.max()) + 1 if count else 0
    first = torch.full((answers,), count, dtype=torch.long)
    first.scatter_reduce_(0, owner, torch.arange(count), "amin")
    return first[owner]
