"""What the runner decides: who may leave, and which head speaks for whom."""

from __future__ import annotations

import pytest
import torch

from offramp.kernels.rows import HostRows, Span
from offramp.models.runner import Runner
from offramp.models.sampling_params import ExitCriterion, SamplingParams
from offramp.models.step import ExitCheck, HeadRow, RunSegments, SequenceRows, StepResult
from offramp.models.transformer import Transformer

from .passes import new_runner
from .small import EXITS, FAMILIES, VOCAB, make, new_cache, random_ids

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return make(FAMILIES["llama"], tmp_path_factory.mktemp("runner"))[1]


def ground(
    runner: Runner, thresholds: list[float | None], criterion: ExitCriterion = ExitCriterion.GATE
) -> StepResult:
    """Slots of one to three rows through the ground segment; slot i holds rows 3i .. ."""
    torch.manual_seed(3)
    work = []
    for index, threshold in enumerate(thresholds):
        count = index % 3 + 1
        rows = tuple(range(3 * index, 3 * index + count))
        check = None
        if threshold is not None:
            check = ExitCheck(criterion, threshold, HeadRow(rows[-1], GREEDY, 0, (1,), 1))
        ids = tuple(random_ids(count))
        work.append(SequenceRows(range(count), rows, [index], ids, check))
    return runner.run(RunSegments(0, 0, tuple(work)))


def test_a_slot_leaves_by_the_score_of_its_last_row(model: Transformer) -> None:
    runner = new_runner(model)
    ground(runner, [None] * 4)
    last = [0, 4, 8, 9]
    head = runner.exits.heads[0]
    scores = head.score(runner.hidden[last], model.config.rms_norm_eps).tolist()
    middle = sorted(scores)[2]
    result = ground(new_runner(model), [middle] * 4)
    assert result.scores == pytest.approx(scores, abs=1e-5)
    # Scores of one batch and of four rows agree up to rounding; the middle one itself may fall
    # on either side.
    decided = [
        (gate, score > middle)
        for gate, score in zip(result.leave, scores, strict=True)
        if abs(score - middle) > 1e-5
    ]
    assert len(decided) == 3
    assert all(gate == over for gate, over in decided)


def test_bounds_of_the_threshold(model: Transformer) -> None:
    """0 lets everyone go, above 1 nobody, and None is never asked."""
    result = ground(new_runner(model), [0.0, 1.01, None, 0.0])
    assert result.leave == (True, False, False, True)
    assert [score is None for score in result.scores] == [False, False, True, False]
    assert [token >= 0 for token in result.token_ids] == [True, False, False, True]


def test_no_checks_cost_no_gate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = new_runner(model)
    monkeypatch.setattr(type(runner.exits.heads[0]), "score", None)
    assert ground(runner, [None, None]).leave == (False, False)


def test_who_leaves_speaks_through_the_exits_head(model: Transformer) -> None:
    runner = new_runner(model)
    result = ground(runner, [0.0] * 5)
    states = runner.hidden[[0, 4, 8, 9, 13]]
    normed = runner.exits.heads[0].normed(states, model.config.rms_norm_eps)
    assert list(result.token_ids) == model.logits(normed).argmax(dim=-1).tolist()
    assert result.exit_head_rows == 5


def test_a_small_vocabulary_names_whole_tokens(model: Transformer) -> None:
    """The exits tell only some tokens apart, and answer with ids of the whole vocabulary."""
    vocab = torch.arange(5, VOCAB, 3)
    runner = new_runner(model, vocab=vocab)
    result = ground(runner, [0.0] * 5)
    states = runner.hidden[[0, 4, 8, 9, 13]]
    normed = runner.exits.heads[0].normed(states, model.config.rms_norm_eps)
    best = model.logits(normed)[:, vocab].argmax(dim=-1)
    assert list(result.token_ids) == vocab[best].tolist()


def test_a_biased_token_is_chosen_from_the_whole_vocabulary(model: Transformer) -> None:
    runner = new_runner(model, vocab=torch.arange(0, VOCAB, 2))
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logit_bias=((7, 1000.0),))
    check = ExitCheck(ExitCriterion.FIXED, 1.0, HeadRow(0, sampling, 0, (1,), 1))
    work = SequenceRows((0,), (0,), [0], (3,), check)
    assert runner.run(RunSegments(0, 0, (work,))).token_ids == (7,)


def test_prompt_rows_leave_by_their_own_gates(model: Transformer) -> None:
    runner = new_runner(model)
    ids = tuple(random_ids(6))
    eps = model.config.rms_norm_eps
    runner.run(RunSegments(0, 0, (SequenceRows(range(6), tuple(range(6)), [0, 1], ids),)))
    scores = runner.exits.heads[0].score(runner.hidden[:6], eps)
    bound = float(scores[:4].sort().values[1:3].mean())
    work = SequenceRows(range(6), tuple(range(6)), [0, 1], ids, None, bound, 4)
    result = runner.run(RunSegments(0, 0, (work,)))
    expected = tuple((scores[:4] >= bound).nonzero().squeeze(-1).tolist())
    assert result.prompt_left == (expected,)
    assert 0 < len(expected) < 4


def test_the_head_reads_full_depth_rows(model: Transformer) -> None:
    """Its rows are named by their place in the hidden buffer, in any order."""
    runner = new_runner(model)
    top, rows = len(EXITS), (11, 5, 0, 63, 7, 2, 30)
    before = torch.randn(len(rows), model.config.hidden_size) * 3
    work = (SequenceRows(range(4), rows[:4], [1, 2]), SequenceRows(range(3), rows[4:], [3, 4]))
    asked = (30, 5, 63)
    heads = tuple(HeadRow(row, GREEDY, 0, (1,), 1) for row in asked)
    runner.hidden[list(rows)] = before
    found = runner.run(RunSegments(top, top, work, heads)).head_tokens
    at = HostRows(
        [Span(item.positions, item.table) for item in work],
        runner.cache.block_size,
        model.rotary,
        model.device,
    )
    states = model.segments[top](before, at, runner.cache)[[rows.index(row) for row in asked]]
    assert list(found) == model.logits(model.normed(states)).argmax(dim=-1).tolist()
    assert len(set(found)) > 1


def test_segments_of_one_step_are_those_of_several(model: Transformer) -> None:
    ids = tuple(random_ids(5))
    tokens = []
    for steps in (((0, len(EXITS)),), tuple((i, i) for i in range(len(EXITS) + 1))):
        runner = new_runner(model)
        for first, last in steps:
            work = SequenceRows(range(5), tuple(range(5)), [0, 1], ids if first == 0 else ())
            top = last == len(EXITS)
            head = tuple(HeadRow(row, GREEDY, 0, (1,), 1) for row in range(5)) if top else ()
            result = runner.run(RunSegments(first, last, (work,), head))
            assert len(result.segment_seconds) == last + 1 - first
        tokens.append((result.head_tokens, runner.cache.pages.flatten(2, 3)[:, :, :5].clone()))
    assert tokens[0][0] == tokens[1][0]
    assert tokens[0][1].equal(tokens[1][1])


def test_a_segment_above_the_ground_reads_its_rows(model: Transformer) -> None:
    """The same states in other rows give the same states."""
    runner = new_runner(model)
    states = torch.randn(3, model.config.hidden_size)
    results = []
    for rows in ((1, 2, 3), (40, 9, 22)):
        runner.hidden[list(rows)] = states
        runner.run(RunSegments(1, 1, (SequenceRows(range(3), rows, [4]),)))
        results.append(runner.hidden[list(rows)].clone())
    assert results[0].equal(results[1])
    assert not results[0].equal(states)


def test_exits_must_match_the_model(model: Transformer) -> None:
    runner = new_runner(model)
    assert tuple(head.layer for head in runner.exits.heads) == EXITS
    with pytest.raises(ValueError, match="exit head"):
        Runner(model, runner.exits.heads[:1], new_cache(model), 8)
