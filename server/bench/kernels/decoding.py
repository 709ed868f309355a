"""Cases of ops that only the decode loop has: active rows, exits, scores and sampling.

``gather_rows`` lists the sequences that wait at a segment, ``apply_gate`` is an exit's gate,
``apply_exit`` its decision, ``finish_rows`` writes the head's tokens into their state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from offramp.kernels.active_rows import (
    EMPTY,
    ActiveRows,
    DecodeState,
    SegmentBatch,
    finish_rows,
    finish_rows_reference,
    gather_rows,
    gather_rows_reference,
)
from offramp.kernels.embed_rows import embed_rows
from offramp.kernels.exit_decision import (
    Fired,
    apply_exit,
    apply_exit_reference,
    apply_gate,
    apply_gate_reference,
)
from offramp.kernels.logit_scores import LogitScores, score_logits, score_logits_reference
from offramp.kernels.sampling import SamplingTable, sample_rows, sample_rows_reference
from offramp.models.exits.training.train import TrainOptions
from offramp.server.bench.kernels.case import (
    BLOCK,
    LONG,
    SHORT,
    Case,
    Setup,
    Work,
    cold_bytes,
    size_of,
)

# Bytes written for a token: stage, waited, depth; token, position, index, emitted.
_TOKEN = 3 * SHORT + 4 * LONG
# A segment above the first, at which rows may be held.
_UPPER = 1
_FLOOR = 0.5
# Standard deviation of logits: one token has a few per cent of the mass, as where a model is sure.
# With less, a draw falls so close to the border of two tokens that rounding may decide.
_SPREAD = 4
_SAMPLED = {"temperature 1": (0, 1.0), "top_k 50, top_p 0.9": (50, 0.9)}


def _states(setup: Setup, rows: int, count: int, stage: int) -> DecodeState:
    """``rows`` sequences, ``count`` of them at ``stage`` with a block for their next token."""
    blocks = -(-setup.context // BLOCK)
    states = DecodeState.empty(rows, blocks, setup.device)
    chosen = setup.order(rows)[:count]
    states.stage[chosen] = stage
    states.position.copy_(torch.tensor(setup.positions(rows)))
    states.end.copy_(states.position + 1)
    states.table.copy_(setup.order(rows * blocks).view(rows, blocks))
    return states


def _active(setup: Setup, states: DecodeState, count: int) -> SegmentBatch:
    """``count`` active rows in any of the sequences."""
    rows = len(states.stage)
    active = SegmentBatch.empty(rows, setup.device)
    active.seqs.copy_(setup.order(rows))
    active.positions.copy_(states.position[active.seqs.long()])
    active.places.copy_(setup.order(rows))
    active.count.fill_(count)
    return active


def _changed(states: DecodeState) -> Mapping[str, Tensor]:
    """What a launch changes of sequences."""
    names = ("stage", "waited", "token", "position", "index", "emitted", "depth")
    return {name: getattr(states, name) for name in names}


def _first(batch: object, count: int | Tensor, *names: str) -> dict[str, Tensor]:
    """The first ``count`` entries of the tensors with these names."""
    return {name: getattr(batch, name)[: int(count)] for name in names}


def gather_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """All sequences wait at an upper segment, and all become active rows."""
    states = _states(setup, rows, count, _UPPER)
    active = SegmentBatch.empty(rows, setup.device)
    holds = torch.tensor([[0.0, 0.0], [0.5, 4.0]], device=setup.device)
    given = (states, active, _UPPER, holds)
    yield Case(
        op="gather_rows",
        what="segment 1",
        rows=rows,
        # Stage, waited, position, end and a block of each, and the two numbers of the hold.
        work=Work(
            read=count * (2 * SHORT + 3 * LONG) + 2 * SHORT,
            written=count * (SHORT + 3 * LONG) + SHORT,
            flops=0,
        ),
        launches=[partial(gather_rows, *given, block_size=BLOCK)],
        reference=partial(gather_rows_reference, *given, block_size=BLOCK),
        results=lambda: {
            "count": active.count,
            **_first(active, count, "seqs", "positions", "places", "first_blocks"),
            "waited": states.waited,
        },
        empty=partial(states.stage.fill_, EMPTY),
    )


def finish_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """All active rows get the head's token."""
    states = _states(setup, rows, count, _UPPER)
    active, tokens = _active(setup, states, count), setup.tokens(rows)
    depth = setup.config.num_layers
    yield Case(
        op="finish_rows",
        what=f"from layer {depth}",
        rows=rows,
        # The sequence; its token, position and index.
        work=Work(count * (SHORT + 3 * LONG) + SHORT, count * _TOKEN, 0),
        launches=[partial(finish_rows, states, active, tokens, depth)],
        reference=partial(finish_rows_reference, states, active, tokens, depth),
        results=lambda: _changed(states),
        empty=active.count.zero_,
    )


def gate_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The gate's last layer, and the list of the rows above its floor, which are all."""
    width, size = TrainOptions().router, setup.dtype.itemsize
    states = _states(setup, rows, count, 0)
    active, fired = _active(setup, states, count), Fired.empty(rows, setup.device)
    inner, thresholds = setup.normal(rows, width), setup.thresholds(rows)
    weight, bias = setup.weight(1, width), setup.normal(1)
    given = (inner, weight, bias, _FLOOR, thresholds, states, active, fired)
    yield Case(
        op="apply_gate",
        what=f"gate of {width}",
        rows=rows,
        work=Work(
            # Of a row its inner values, sequence, stage and threshold.
            read=((count + 1) * width + 1) * size + count * 3 * SHORT + SHORT,
            # Stage and waited; row, sequence and score in the list.
            written=count * 5 * SHORT + SHORT,
            flops=2 * count * width,
        ),
        launches=[partial(apply_gate, *given)],
        reference=partial(apply_gate_reference, *given),
        results=lambda: {
            "count": fired.count,
            **_first(fired, fired.count, "rows", "seqs", "gate"),
            "stage": states.stage,
            "waited": states.waited,
        },
        empty=active.count.zero_,
        # Kernel and reference both sum in fp32.
        rounding=torch.float32,
    )


def exit_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """The exit's decision for the rows whose gate fired, which lets all of them leave."""
    states = _states(setup, rows, count, 1)
    active = _active(setup, states, count)
    leaving, tokens = SegmentBatch.empty(rows, setup.device), setup.tokens(rows)
    order = setup.order(rows, torch.int32)
    seqs = active.seqs[order.long()]
    total = torch.zeros(1, dtype=torch.int64, device=setup.device)
    fired = Fired(order, seqs, setup.uniform(rows), setup.count(count), total)
    scores = LogitScores(tokens, *(setup.uniform(rows) for _ in range(3)))
    fuse, thresholds = setup.normal(4, dtype=torch.float32), setup.thresholds(rows)
    depth = setup.config.num_layers // 2
    given = (fired, scores, tokens, fuse, thresholds, depth, states, active, leaving)
    yield Case(
        op="apply_exit",
        what=f"from layer {depth}",
        rows=rows,
        work=Work(
            # Row, sequence, three scores and the threshold; token, position and place of the row,
            # position and index of the sequence.
            read=count * (6 * SHORT + 5 * LONG) + 5 * SHORT,
            written=count * (SHORT + 2 * LONG + _TOKEN) + SHORT,
            flops=0,
        ),
        launches=[partial(apply_exit, *given)],
        reference=partial(apply_exit_reference, *given),
        results=lambda: {
            "count": leaving.count,
            **_first(leaving, leaving.count, "seqs", "positions", "places"),
            **_changed(states),
        },
        empty=fired.count.zero_,
    )


def embed_rows_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """Embeddings of other tokens every time."""
    config, size = setup.config, setup.dtype.itemsize
    table = setup.normal(config.vocab_size, config.hidden_size)
    seqs = ActiveRows(setup.order(rows, torch.int32), setup.count(count))
    hidden = setup.zeros(rows, config.hidden_size)
    row = config.hidden_size * size
    sets = [setup.tokens(rows) for _ in range(setup.copies.of(count * row))]

    def reference() -> None:
        hidden[seqs.chosen] = table[sets[0][seqs.chosen]]

    yield Case(
        op="embed_rows",
        what=f"{config.vocab_size}x{config.hidden_size}",
        rows=rows,
        work=Work(count * (row + SHORT + LONG) + SHORT, count * row, 0),
        launches=[partial(embed_rows, table, tokens, seqs, hidden) for tokens in sets],
        reference=reference,
        results=lambda: {"hidden": hidden},
        cold=min(len(sets) * count * row, size_of(table)),
        empty=seqs.count.zero_,
    )


def score_logits_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """Top token and scores of fp32 logits, for exits and greedy sampling."""
    vocab = setup.config.vocab_size
    logits, number = _logits(setup, rows), setup.count(count)
    scores = LogitScores.empty(rows, setup.device)
    yield Case(
        op="score_logits",
        what=f"vocabulary {vocab}",
        rows=rows,
        # Of each logit its distance, an exponential, a product and two sums.
        work=Work(4 * count * vocab + SHORT, count * (LONG + 3 * SHORT), 5 * count * vocab),
        launches=[partial(score_logits, values, number, scores) for (values,) in logits],
        reference=partial(score_logits_reference, logits[0][0], number, scores),
        results=lambda: _first(scores, count, "token", "top", "gap", "entropy"),
        cold=cold_bytes(logits),
        empty=number.zero_,
        rounding=torch.float32,
    )


def sample_rows_cases(setup: Setup, rows: int, count: int) -> Iterator[Case]:
    """Random tokens, with and without filters; greedy rows cost what empty ones do."""
    vocab = setup.config.vocab_size
    # The sequence, four parameters of 4 bytes, the seed and the index.
    row = 4 * vocab + 5 * SHORT + 2 * LONG
    for what, (top_k, top_p) in _SAMPLED.items():
        table = SamplingTable.greedy(rows, setup.device)
        table.temperature.fill_(1.0)
        table.top_k.fill_(top_k)
        table.top_p.fill_(top_p)
        table.seed.copy_(setup.order(rows))
        logits = _logits(setup, rows)
        seqs = ActiveRows(setup.order(rows, torch.int32), setup.count(count))
        index, tokens = setup.order(rows), setup.zeros(rows, dtype=torch.int64)
        given = (seqs, table, index, tokens)
        yield Case(
            op="sample_rows",
            what=what,
            rows=rows,
            # Of each logit its scaling, two logarithms and a sum; random words are of integers.
            work=Work(count * row + SHORT, count * LONG, 4 * count * vocab),
            launches=[partial(sample_rows, values, *given) for (values,) in logits],
            reference=partial(sample_rows_reference, logits[0][0], *given),
            results=partial(dict, tokens=tokens),
            cold=cold_bytes(logits),
            empty=seqs.count.zero_,
        )


def _logits(setup: Setup, rows: int) -> list[tuple[Tensor, ...]]:
    values = setup.normal(rows, setup.config.vocab_size, dtype=torch.float32)
    return setup.copied(values.mul_(_SPREAD))
