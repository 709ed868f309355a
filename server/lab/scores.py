"""Scores of every exit criterion on states that were kept, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.models.exits.calibration import Scored
from offramp.models.exits.criteria import CRITERIA, ExitView, Trail
from offramp.models.exits.file import ExitFile
from offramp.models.exits.head import ExitHead
from offramp.models.exits.training.data import States
from offramp.models.sampling_params import ExitCriterion
from offramp.models.transformer import Transformer

# Rows that pass all exits together; some criteria keep the logits of the exit below.
_ROWS = 256


@torch.inference_mode()
def score(
    model: Transformer, file: ExitFile, states: States, criteria: Sequence[ExitCriterion]
) -> dict[ExitCriterion, Scored]:
    """What each criterion says at every exit of ``file`` about n positions of ``states``.

    Every row is shown to every exit, as if nobody had left below.
    """
    count, exits = len(states.labels), len(file.heads)
    scores = {criterion: torch.zeros(exits, count) for criterion in criteria}
    right = torch.zeros(exits, count, dtype=torch.bool)
    for begin in range(0, count, _ROWS):
        rows = slice(begin, min(begin + _ROWS, count))
        trail = Trail(rows.stop - begin, model.config.hidden_size, model.device)
        for index, head in enumerate(file.heads):
            hidden = states.at[head.layer][rows].to(model.dtype)
            view = _FullView(model, file, hidden, index, trail)
            best = view.all_logits.argmax(dim=-1)
            tokens = best if file.vocab is None else file.vocab[best]
            right[index, rows] = (tokens == states.labels[rows]).cpu()
            for criterion in criteria:
                scores[criterion][index, rows] = CRITERIA[criterion].score(view).float().cpu()
    if ExitCriterion.PROMPT_DEPTH in scores:
        first = _first_rows(states.answer_of.cpu())
        scores[ExitCriterion.PROMPT_DEPTH] = scores[ExitCriterion.PROMPT_DEPTH][:, first]
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
