"""Heads that are fitted to answers, and thresholds whose promise holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offramp.models.exits.training.decisions import (
    QUALITIES,
    Judged,
    PromptStates,
    calibrate,
    collect_states,
    fit_scale,
    fit_task,
    judge_task,
)

from .small import FAMILIES, LAYERS, make, new_cache, random_ids, their_logits

EPS = 1e-5
WIDTH = 12
AT = (1, 3, 6)


def states_of(answers: Tensor, strengths: tuple[float, ...], classes: int = 3) -> PromptStates:
    """States whose last position hints at the answer, the stronger the higher the layer."""
    count = len(answers)
    hints = torch.randn(classes, WIDTH)
    last = torch.randn(count, len(strengths), WIDTH)
    for place, strength in enumerate(strengths):
        last[:, place] += strength * hints[answers]
    mean = torch.randn(count, len(strengths), WIDTH)
    return PromptStates(AT, last.half(), mean.half(), torch.zeros(count, WIDTH))


def shares(judged: Judged, truth: Tensor) -> list[float]:
    right = [float((own == truth).float().mean()) for own in (*judged.answers, judged.full)]
    return [round(each, 3) for each in right]


def test_separable_answers_are_learnt() -> None:
    """And only as well as a layer tells them."""
    answers = torch.randint(0, 3, (900,))
    states = states_of(answers, (0.0, 0.7, 8.0))
    heads = fit_task(states.select(torch.arange(600)), answers[:600], 3, EPS)
    assert heads.layers == AT
    assert heads.weight.shape == (3, 3, 2 * WIDTH)
    assert heads.bias.shape == (3, 3)
    judged = judge_task(
        heads, states.select(torch.arange(600, 900)), EPS, answers[600:], labelled=True
    )
    assert judged.truth is not None
    assert judged.truth.equal(answers[600:])
    assert (judged.layers, judged.num_layers) == (AT[:2], AT[2])
    low, middle, high = shares(judged, answers[600:])
    assert low < 0.45
    assert 0.5 < middle < 0.97
    assert high == 1


def test_the_mean_is_learnt_from_too() -> None:
    answers = torch.randint(0, 2, (600,))
    states = states_of(answers, (0.0, 0.0, 0.0), 2)
    states.mean[:, 0, 0] += 8 * answers.half() - 4
    heads = fit_task(states.select(torch.arange(400)), answers[:400], 2, EPS)
    judged = judge_task(
        heads, states.select(torch.arange(400, 600)), EPS, answers[400:], labelled=False
    )
    # Without labels they are the model's own, which are given at full depth.
    assert judged.truth is None
    assert judged.full.equal(answers[400:])
    assert shares(judged, answers[400:])[0] > 0.95


def test_an_answer_that_no_row_has_is_never_given() -> None:
    answers = torch.randint(0, 2, (300,))
    states = states_of(answers, (2.0, 4.0, 8.0))
    heads = fit_task(states, answers, 3, EPS)
    judged = judge_task(heads, states, EPS, answers, labelled=True)
    assert 2 not in judged.full
    assert 2 not in judged.answers
    assert torch.isfinite(heads.weight).all()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_states_are_those_of_each_prompt_alone(tmp_path: Path, family: str) -> None:
    """Whatever their order and however they fall together."""
    theirs, model = make(FAMILIES[family], tmp_path)
    prompts = [random_ids(length) for length in (9, 1, 30, 4, 17, 30)]
    done: list[int] = []
    states = collect_states(model, new_cache(model, 20), prompts, (2, 5, LAYERS), done.append)
    assert done[-1] == len(prompts)
    assert done == sorted(done)
    assert len(done) > 1
    assert states.layers == (2, 5, LAYERS)
    for index, prompt in enumerate(prompts):
        with torch.inference_mode():
            out = theirs.model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        for place, layer in enumerate((2, 5)):
            own = out.hidden_states[layer][0]
            torch.testing.assert_close(
                states.last[index, place].float(), own[-1], rtol=4e-3, atol=4e-3
            )
            torch.testing.assert_close(
                states.mean[index, place].float(), own.mean(0), rtol=4e-3, atol=4e-3
            )
        logits = model.logits(states.final[index : index + 1])[0]
        torch.testing.assert_close(logits, their_logits(theirs, prompt)[-1], rtol=1e-3, atol=1e-3)


def judged_of(
    answers: list[list[int]], chances: list[list[float]], full: list[int], truth: list[int] | None
) -> Judged:
    known = None if truth is None else torch.tensor(truth)
    return Judged(
        (2, 4), 6, torch.tensor(answers), torch.tensor(chances), torch.tensor(full), known
    )


ANSWERS = [[0, 1, 0, 1], [1, 1, 1, 0]]
CHANCES = [[0.9, 0.6, 0.5, 0.2], [0.8, 0.95, 0.8, 0.3]]
FULL_DEPTH = [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("bounds", "answers", "layers"),
    [
        ((0.7, 0.7), [0, 1, 1, 1], [2, 4, 4, 6]),
        ((0.9, 2.0), [0, 0, 0, 1], [2, 6, 6, 6]),
        ((0.0, 0.0), [0, 1, 0, 1], [2, 2, 2, 2]),
        ((2.0, 0.3), [1, 1, 1, 0], [4, 4, 4, 4]),
        ((2.0, 2.0), [1, 0, 0, 1], [6, 6, 6, 6]),
    ],
)
def test_who_leaves_where(bounds: tuple[float, ...], answers: list[int], layers: list[int]) -> None:
    found, depth = judged_of(ANSWERS, CHANCES, FULL_DEPTH, None).leave(bounds)
    assert found.tolist() == answers
    assert depth.tolist() == layers


def test_losses_without_labels_count_what_is_not_full_depths() -> None:
    judged = judged_of(ANSWERS, CHANCES, FULL_DEPTH, None)
    assert judged.losses((0.7, 0.7)).tolist() == [1, 1, 1, 0]
    assert judged.losses((2.0, 2.0)).tolist() == [0, 0, 0, 0]


def test_losses_with_labels_are_made_up_for_where_full_depth_was_wrong() -> None:
    judged = judged_of(ANSWERS, CHANCES, FULL_DEPTH, [1, 1, 1, 1])
    # Worse, better, better, both right.
    assert judged.losses((0.7, 0.7)).tolist() == [1, 0, 0, 0.5]
    assert judged.losses((2.0, 2.0)).tolist() == [0.5] * 4


def synthetic(count: int, seed: int, *, honest: float = 1.0, labelled: bool = False) -> Judged:
    """Answers after two layers that are right as often as their chances say, to the ``honest``."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randint(0, 2, (count,), generator=generator)
    chances = 1 - 0.5 * torch.rand(2, count, generator=generator) ** 3
    right = torch.rand(2, count, generator=generator) < honest * chances
    answers = torch.where(right, full, 1 - full)
    truth = None
    if labelled:
        wrong = torch.rand(count, generator=generator) < 0.1
        truth = torch.where(wrong, 1 - full, full)
    return Judged((2, 4), 6, answers, chances, full, truth)


@pytest.mark.parametrize("labelled", [False, True])
def test_points_go_as_far_as_they_may(labelled: bool) -> None:  # noqa: FBT001 (parametrised)
    judged, held_out = synthetic(20_000, 1, labelled=labelled), synthetic(20_000, 2)
    points = calibrate(judged, held_out)
    qualities = [point.quality for point in points]
    assert qualities == [q for q in QUALITIES if q in qualities]
    assert len(points) >= 3
    bounds = [point.thresholds for point in points]
    assert all(len(set(own)) == 1 for own in bounds)
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[-1]
    depths = [point.mean_layer for point in points]
    assert depths == sorted(depths)
    for point in points:
        answers, depth = held_out.leave(point.thresholds)
        assert point.agreement == pytest.approx(float((answers == held_out.full).float().mean()))
        assert point.mean_layer == pytest.approx(float(depth.float().mean()))


@pytest.mark.parametrize("labelled", [False, True])
def test_promises_are_kept(labelled: bool) -> None:  # noqa: FBT001 (parametrised)
    """On inputs that nobody saw, but for one calibration in twenty."""
    unseen = synthetic(100_000, 999, labelled=labelled)
    broken = dict.fromkeys(QUALITIES, 0)
    made = dict.fromkeys(QUALITIES, 0)
    for seed in range(40):
        judged = synthetic(400, seed, labelled=labelled)
        for point in calibrate(judged, judged):
            made[point.quality] += 1
            lost = float(unseen.losses(point.thresholds).double().mean())
            allowed = 1 - point.quality if not labelled else 1 - point.quality / 2
            broken[point.quality] += lost > allowed
    assert made[0.9] > 20
    # Five in a hundred are allowed; more than six of forty come by chance once in 300.
    assert max(broken.values()) <= 6


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0])
def test_the_scale_is_found_again(factor: float) -> None:
    """Where full depth is less sure of its answers than the heads are of foreseeing them."""
    states = states_of(torch.randint(0, 3, (500,)), (0.0, 0.0, 0.0))
    heads = fit_task(states, torch.randint(0, 3, (500,)), 3, EPS)
    heads = replace(heads, weight=heads.weight * 0, bias=torch.tensor([[4.0, 0.0, -4.0]] * 3))
    chances = (factor * torch.tensor([4.0, 0.0, -4.0])).softmax(0).expand(500, 3)
    assert fit_scale(heads, states, EPS, chances) == pytest.approx(factor, rel=0.06)


def test_nothing_is_promised_where_answers_disagree() -> None:
    """However sure they are."""
    assert calibrate(synthetic(5000, 1, honest=0.5), synthetic(100, 2)) == ()


def test_a_few_rows_show_little() -> None:
    points = calibrate(synthetic(60, 1), synthetic(60, 2))
    assert 0.995 not in [point.quality for point in points]


def test_with_labels_only_what_full_depth_would_have_known_is_lost() -> None:
    """Answers that differ from full depth's and are as often right may all leave."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randint(0, 2, (4000,), generator=generator)
    full, early = (
        torch.where(torch.rand(4000, generator=generator) < 0.8, truth, 1 - truth) for _ in range(2)
    )
    chances = torch.full((1, 4000), 0.8)
    judged = Judged((2,), 6, early[None], chances, full, truth)
    points = calibrate(judged, judged)
    assert points
    assert points[0].thresholds[0] <= 0.8
    assert points[0].mean_layer == 2
    assert points[0].agreement < 0.75
    unlabelled = Judged((2,), 6, early[None], chances, full)
    kept = calibrate(unlabelled, unlabelled)
    assert all(point.mean_layer == 6 for point in kept)
