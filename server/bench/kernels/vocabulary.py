"""Cases of ops on tables as long as the vocabulary: embeddings, scores of logits, sampling."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from offramp.kernels.active_rows import ActiveRows
from offramp.kernels.embed_rows import embed_rows
from offramp.kernels.logit_scores import LogitScores, score_logits, score_logits_reference
from offramp.kernels.sampling import SamplingTable, sample_rows, sample_rows_reference
from offramp.server.bench.kernels.case import Case, Work
from offramp.server.bench.kernels.setup import Setup, cold_bytes, size_of

_LONG, _SHORT = 8, 4
_SPREAD = 4
"""Standard deviation of logits: one token is a few per cent of the mass, as where texts are sure.

With less, a draw falls so close to the border of two tokens that rounding may decide.
"""
_SAMPLED = {"temperature 1": (0, 1.0), "top_k 50, top_p 0.9": (50, 0.9)}


def embed_rows_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """Embeddings of other tokens every time."""
    config, size = setup.config, setup.dtype.itemsize
    table = setup.normal(config.vocab_size, config.hidden_size)
    slots = ActiveRows(setup.order(rows, torch.int32), setup.count(count))
    hidden = setup.zeros(rows, config.hidden_size)
    row = config.hidden_size * size
    sets = [setup.tokens(rows) for _ in range(setup.copies.of(count * row))]

    def reference() -> None:
        hidden[slots.chosen] = table[sets[0][slots.chosen]]

    yield Case(
        op="embed_rows",
        what=f"{config.vocab_size}x{config.hidden_size}",
        rows=rows,
        work=Work(count * (row + _SHORT + _LONG) + _SHORT, count * row, 0),
        launches=[partial(embed_rows, table, tokens, slots, hidden) for tokens in sets],
        reference=reference,
        results=lambda: {"hidden": hidden},
        cold=min(len(sets) * count * row, size_of(table)),
        empty=slots.count.zero_,
    )


def score_logits_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """What exits and greedy sampling want to know of fp32 logits."""
    vocab = setup.config.vocab_size
    logits, number = _logits(setup, rows), setup.count(count)
    scores = LogitScores.empty(rows, setup.device)

    def launch(values: Tensor) -> None:
        score_logits(values, number, scores)

    def reference() -> None:
        score_logits_reference(logits[0][0], number, scores)

    yield Case(
        op="score_logits",
        what=f"vocabulary {vocab}",
        rows=rows,
        # Of each logit its distance, an exponential, a product and two sums.
        work=Work(4 * count * vocab + _SHORT, count * (_LONG + 3 * _SHORT), 5 * count * vocab),
        launches=[partial(launch, values) for (values,) in logits],
        reference=reference,
        results=lambda: {
            "token": scores.token[:count],
            "top": scores.top[:count],
            "gap": scores.gap[:count],
            "entropy": scores.entropy[:count],
        },
        cold=cold_bytes(logits),
        empty=number.zero_,
        rounding=torch.float32,
    )


def sample_rows_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """Random tokens, with and without filters; greedy rows cost what empty ones do."""
    for what, (top_k, top_p) in _SAMPLED.items():
        table = SamplingTable.greedy(rows, setup.device)
        table.temperature.fill_(1.0)
        table.top_k.fill_(top_k)
        table.top_p.fill_(top_p)
        table.seed.copy_(setup.order(rows))
        yield _sample_case(setup, what, table, rows, count)


def _sample_case(setup: Setup, what: str, table: SamplingTable, rows: int, count: int) -> Case:
    vocab = setup.config.vocab_size
    logits = _logits(setup, rows)
    slots = ActiveRows(setup.order(rows, torch.int32), setup.count(count))
    index, tokens = setup.order(rows), setup.zeros(rows, dtype=torch.int64)

    def launch(values: Tensor) -> None:
        sample_rows(values, slots, table, index, tokens)

    def reference() -> None:
        sample_rows_reference(logits[0][0], slots, table, index, tokens)

    # The slot, four parameters of 4 bytes, the seed and the index.
    row = 4 * vocab + 5 * _SHORT + 2 * _LONG
    return Case(
        op="sample_rows",
        what=what,
        rows=rows,
        # Of each logit its distance, an exponential and a sum.
        work=Work(count * row + _SHORT, count * _LONG, 3 * count * vocab),
        launches=[partial(launch, values) for (values,) in logits],
        reference=reference,
        results=lambda: {"tokens": tokens},
        cold=cold_bytes(logits),
        empty=slots.count.zero_,
    )


def _logits(setup: Setup, rows: int) -> list[tuple[Tensor, ...]]:
    values = setup.normal(rows, setup.config.vocab_size, dtype=torch.float32)
    return setup.copied(values.mul_(_SPREAD))
