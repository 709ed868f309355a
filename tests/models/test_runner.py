"""What the runner decides: who may leave, and which head speaks for whom."""

from __future__ import annotations

import pytest
import torch

from offramp.models.runner import Runner
from offramp.models.sampling_params import SamplingParams
from offramp.models.step import HeadRow, RunHead, RunSegment, SlotRows
from offramp.models.transformer import Transformer

from .rides import new_runner
from .small import EXITS, FAMILIES, VOCAB, make, new_cache, random_ids

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return make(FAMILIES["llama"], tmp_path_factory.mktemp("runner"))[1]


def ground(runner: Runner, thresholds: list[float | None]) -> tuple[bool, ...]:
    """Slots of one to three rows through the ground segment; slot i holds rows 3i .. ."""
    torch.manual_seed(3)
    work = []
    for index, threshold in enumerate(thresholds):
        count = index % 3 + 1
        rows = tuple(range(3 * index, 3 * index + count))
        work.append(SlotRows(0, rows, [index], tuple(random_ids(count)), threshold))
    return runner.run(RunSegment(0, tuple(work))).leave


def test_a_slot_leaves_by_the_score_of_its_last_row(model: Transformer) -> None:
    runner = new_runner(model)
    ground(runner, [None] * 4)
    last = [0, 4, 8, 9]
    scores = runner.exits[0].score(runner.hidden[last], model.config.rms_norm_eps).tolist()
    middle = sorted(scores)[2]
    leave = ground(new_runner(model), [middle] * 4)
    # Scores of one batch and of four rows agree up to rounding; the middle one itself may fall
    # on either side.
    decided = [
        (gate, score > middle)
        for gate, score in zip(leave, scores, strict=True)
        if abs(score - middle) > 1e-5
    ]
    assert len(decided) == 3
    assert all(gate == over for gate, over in decided)


def test_bounds_of_the_threshold(model: Transformer) -> None:
    """0 lets everyone go, above 1 nobody, and None is never asked."""
    runner = new_runner(model)
    assert ground(runner, [0.0, 1.01, None, 0.0]) == (True, False, False, True)


def test_no_thresholds_cost_no_gate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = new_runner(model)
    monkeypatch.setattr(type(runner.exits[0]), "score", None)
    assert ground(runner, [None, None]) == (False, False)


def test_each_row_speaks_through_the_head_of_its_exit(model: Transformer) -> None:
    """Rows of full depth and of both exits in one step, in mixed order."""
    runner = new_runner(model)
    runner.hidden.copy_(torch.randn(runner.hidden.shape) * 3)
    points = [1, None, 0, 0, None, 1, 0]
    rows = [11, 5, 0, 63, 7, 2, 30]
    step = RunHead(
        tuple(
            HeadRow(row, point, GREEDY, 0, (1,), 1) for row, point in zip(rows, points, strict=True)
        )
    )
    expected = []
    for row, point in zip(rows, points, strict=True):
        state = runner.hidden[row : row + 1]
        eps = model.config.rms_norm_eps
        normed = model.normed(state) if point is None else runner.exits[point].normed(state, eps)
        expected.append(int(model.logits(normed).argmax()))
    assert list(runner.run(step).token_ids) == expected
    assert len({token for token in expected if token < VOCAB}) > 2


def test_a_segment_above_the_ground_reads_its_rows(model: Transformer) -> None:
    """The same states in other rows give the same states."""
    runner = new_runner(model)
    states = torch.randn(3, model.config.hidden_size)
    results = []
    for rows in ((1, 2, 3), (40, 9, 22)):
        runner.hidden[list(rows)] = states
        runner.run(RunSegment(1, (SlotRows(0, rows, [4]),)))
        results.append(runner.hidden[list(rows)].clone())
    assert results[0].equal(results[1])
    assert not results[0].equal(states)


def test_exits_must_match_the_model(model: Transformer) -> None:
    runner = new_runner(model)
    assert tuple(head.layer for head in runner.exits) == EXITS
    with pytest.raises(ValueError, match="exit head"):
        Runner(model, runner.exits[:1], new_cache(model), 8)
