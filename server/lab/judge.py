"""What the full-depth model says of answers, each in the context of its own text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offramp.models.exits.training.data import Answer, batches, lay_out
from offramp.models.transformer import Transformer

# Rows whose logits exist at a time: 50 MB each 256 rows at a vocabulary of 50,000.
_ROWS = 256


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of each answer: its tokens, those that differ from full depth, the sum of their log p."""

    tokens: tuple[int, ...]
    wrong: tuple[int, ...]
    log_probs: tuple[float, ...]

    @property
    def losses(self) -> list[float]:
        """Share of each answer's tokens that differ from the full-depth model's choice."""
        return [wrong / tokens for wrong, tokens in zip(self.wrong, self.tokens, strict=True)]

    @property
    def agreement(self) -> float:
        """Share of all tokens that are the full-depth model's choice."""
        return 1 - sum(self.wrong) / sum(self.tokens)

    @property
    def mean_agreement(self) -> float:
        """Mean over answers of the share of their tokens that agree."""
        return 1 - sum(self.losses) / len(self.tokens)

    @property
    def perplexity(self) -> float:
        """Of the tokens under the full model: exp of their mean negative log probability."""
        return math.exp(-sum(self.log_probs) / sum(self.tokens))


@torch.inference_mode()
def judge(model: Transformer, answers: Sequence[Answer]) -> Judgement:
    """Judge answers of at least one token each, with exact K,V (teacher-forced at full depth).

    Memory: the K,V of about a thousand tokens and the logits of 256 rows.
    """
    wrong = [0] * len(answers)
    log_probs = [0.0] * len(answers)
    order = sorted(range(len(answers)), key=lambda i: len(answers[i].prompt))
    for batch in batches(answers, order):
        layout = lay_out(model, [(index, answers[index]) for index in batch])
        hidden = layout.hidden
        for segment in model.segments:
            hidden = segment(hidden, layout.ctx)
        emitted = torch.tensor([token for index in batch for token in answers[index].answer])
        rows = zip(layout.rows.split(_ROWS), emitted.split(_ROWS), strict=True)
        owners = layout.owner.split(_ROWS)
        for (place, tokens), owner in zip(rows, owners, strict=True):
            logits = model.logits(model.normed(hidden[place]))
            said = tokens.to(logits.device)
            differs = (logits.argmax(-1) != said).tolist()
            log_p = logits.log_softmax(-1).gather(1, said[:, None]).squeeze(1).tolist()
            for index, miss, value in zip(owner.tolist(), differs, log_p, strict=True):
                wrong[index] += miss
                log_probs[index] += value
    return Judgement(tuple(len(item.answer) for item in answers), tuple(wrong), tuple(log_probs))
