"""Rows of a step that the LM head reads, and what it made of them."""

from __future__ import annotations

from collections import abc
from itertools import islice

from offramp.models.step import (
    HeadRow,
    ScoredRow,
    SequenceRows,
    StepResult,
    TokenLogprobs,
)
from offramp.server.engine.sequence import Sequence


def head_row(sequence: Sequence, position: int, row: int) -> HeadRow:
    """How the token after ``position``, whose state is in ``row``, is chosen."""
    sampling, count = sequence.request.sampling, position + 1
    # Penalties must not see the drafts behind the row.
    cut = sampling.adjusts_logits and count < len(sequence.tokens)
    tokens = sequence.tokens[:count] if cut else sequence.tokens
    mask = None
    if sequence.grammar is not None:
        mask = sequence.grammar.mask(sequence.tokens[sequence.verified : count])
    return HeadRow(row, sampling, count - sequence.num_prompt, tokens, sequence.num_prompt, mask)


def head_rows(
    sequences: abc.Sequence[Sequence], work: abc.Sequence[SequenceRows]
) -> tuple[tuple[HeadRow, ...], tuple[ScoredRow, ...]]:
    """Rows above the last segment that make tokens, and those of prompts that are only read."""
    head: list[HeadRow] = []
    scored: list[ScoredRow] = []
    for sequence, item in zip(sequences, work, strict=True):
        top, unscored = sequence.request.sampling.prompt_logprobs or 0, sequence.unscored
        for position, row in zip(item.positions, item.rows, strict=True):
            if position >= sequence.verified - 1:
                head.append(head_row(sequence, position, row))
            if position in unscored:
                scored.append(ScoredRow(row, sequence.tokens[position + 1], top))
    return tuple(head), tuple(scored)


class HeadOutput:
    """What the LM head made in a step, given out in the order of `head_rows`."""

    def __init__(self, result: StepResult) -> None:
        logprobs = result.head_logprobs or (None,) * len(result.head_tokens)
        self._tokens = zip(result.head_tokens, logprobs, strict=True)
        self._scored = iter(result.scored)

    def tokens(self, count: int) -> tuple[list[int], tuple[TokenLogprobs, ...]]:
        """The next ``count`` tokens; log-probabilities are of all of them or of none."""
        made = list(islice(self._tokens, count))
        logprobs = tuple(own for _, own in made if own is not None)
        return [token for token, _ in made], logprobs

    def scored(self, sequence: Sequence) -> list[TokenLogprobs]:
        """What is known now of the prompt's tokens."""
        count = sum(position in sequence.unscored for position in sequence.chunk)
        return list(islice(self._scored, count))
