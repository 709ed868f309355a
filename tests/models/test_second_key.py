"""What gates, second keys and predictors are fitted to, and the draft vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offramp.models.exits.criteria import CRITERIA, ExitView, Trail, predictor_features
from offramp.models.exits.training.data import Answer, States, collect
from offramp.models.exits.training.second_key import (
    Draft,
    draft_vocab,
    fit_fuse,
    floor_for,
    full_log_prob,
    predict,
    two_key_scores,
)
from offramp.models.exits.training.train import (
    TrainOptions,
    exit_scores,
    fit_predictor,
    new_head,
    preference_targets,
    train_gate,
)
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import load_weights
from offramp.models.sampling_params import ExitCriterion
from offramp.models.transformer import Transformer

EXITS = (2, 3)
OPTIONS = TrainOptions(width=16, router=8, gate_epochs=30, batch=64, lr=1e-2)


def silent(name: str, done: int, total: int, loss: float) -> None:
    assert math.isfinite(loss), name


@pytest.fixture(scope="module")
def model(tiny_dir: Path) -> Transformer:
    config = config_from_hf(tiny_dir)
    return Transformer(config, load_weights(tiny_dir, config, dtype=torch.float32), EXITS, 256)


@pytest.fixture(scope="module")
def states(model: Transformer) -> States:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 320, (40, 20), generator=generator).tolist()
    return collect(model, [Answer(tuple(row[:4]), tuple(row[4:])) for row in ids])


def targets(*rows: list[float], weight: float = 1.0, cost: float = 0.0) -> list[list[float]]:
    depths = torch.linspace(0.5, 1, len(rows))
    found: list[list[float]] = preference_targets(
        torch.tensor(rows), depths, weight=weight, cost=cost
    ).tolist()
    return found


def test_an_exit_as_good_as_all_later_ones_is_undecided_but_for_cost() -> None:
    assert targets([-1.0], [-1.0], [-1.0]) == [[0.5], [0.5]]
    dearer = targets([-1.0], [-1.0], [-1.0], cost=4.0)
    assert dearer[0][0] == pytest.approx(1 / (1 + math.exp(-4 * 0.25)))
    assert dearer[1] == dearer[0]


def test_leaving_is_weighed_against_the_best_later_exit() -> None:
    """Utilities -3 now, -1 at the next exit, -2 at full depth."""
    found = targets([-3.0], [-1.0], [-2.0])
    assert found[0][0] == pytest.approx(1 / (1 + math.exp(2)))
    assert found[1][0] == pytest.approx(1 / (1 + math.exp(-1)))
    sharper = targets([-3.0], [-1.0], [-2.0], weight=2.0)
    assert sharper[0][0] == pytest.approx(1 / (1 + math.exp(4)))


def test_a_preference_turned_round_is_its_complement() -> None:
    here, there = targets([-2.0], [-0.5]), targets([-0.5], [-2.0])
    assert here[0][0] + there[0][0] == pytest.approx(1)


def test_a_gate_learns_the_wanted_scores(model: Transformer, states: States) -> None:
    head = new_head(2, model, OPTIONS)
    high = states.at[2][:, 0] > states.at[2][:, 0].median()
    train_gate(head, torch.where(high, 0.9, 0.2), states, OPTIONS, silent, 1e-5)
    scores = exit_scores(head, states.at[2], 1e-5)
    assert scores[high].mean() > scores[~high].mean() + 0.2


@pytest.mark.parametrize("always", [(), (7, 200)])
def test_the_vocabulary_holds_the_most_frequent_tokens(always: tuple[int, ...]) -> None:
    labels = torch.tensor([9] * 5 + [3] * 4 + [50] * 3 + [4] * 2 + [60])
    vocab = draft_vocab(labels, always, 320, 4)
    assert vocab is not None
    assert vocab.tolist() == sorted({3, 4, 9, 50, *always})


def test_tokens_that_never_occur_come_by_their_ids() -> None:
    vocab = draft_vocab(torch.tensor([9, 9, 3, 50, 8, 8]), (), 320, 7)
    assert vocab is not None
    assert vocab.tolist() == [0, 1, 2, 3, 8, 9, 50]


@pytest.mark.parametrize("count", [0, 320, 400])
def test_a_vocabulary_of_all_tokens_is_none(count: int) -> None:
    assert draft_vocab(torch.tensor([1, 2]), (0,), 320, count) is None


def test_choices_are_token_ids_of_the_vocabulary(model: Transformer, states: States) -> None:
    """The full head's best among the vocabulary's tokens; a label outside counts as disagreed."""
    head = new_head(3, model, OPTIONS)
    vocab = draft_vocab(states.labels, (), 320, 40)
    assert vocab is not None
    draft, whole = Draft(model, vocab), Draft(model, None)
    everything = whole.logits(head, states.at[3])
    assert draft.choices(head, states.at[3]).equal(vocab[everything[:, vocab].argmax(dim=-1)])
    outside = ~torch.isin(states.labels, vocab)
    assert outside.any()
    seen = predict([head], states, draft)[0]
    assert not seen.agrees[outside].any()
    assert (seen.log_prob[outside] == -20).all()


def test_what_is_observed_is_what_criteria_see(model: Transformer, states: States) -> None:
    heads = [new_head(layer, model, OPTIONS) for layer in EXITS]
    draft = Draft(model, draft_vocab(states.labels, (0, 2), 320, 80))
    seen = predict(heads, states, draft)
    low, high = (draft.logits(head, states.at[head.layer]) for head in heads)
    torch.testing.assert_close(seen[0].features, predictor_features(low, torch.zeros_like(low)))
    torch.testing.assert_close(seen[1].features, predictor_features(high, low))
    torch.testing.assert_close(seen[1].best, high.softmax(dim=-1).topk(2, dim=-1).values)
    full = full_log_prob(model, states)
    logits = model.logits(states.top.float())
    expected = -torch.nn.functional.cross_entropy(logits, states.labels, reduction="none")
    torch.testing.assert_close(full, expected)


def test_scores_are_those_of_serving(model: Transformer, states: States) -> None:
    """Second key and predictor, trained, give in a criterion's hands what training judged."""
    draft = Draft(model, draft_vocab(states.labels, (0, 2), 320, 80))
    head = replace(new_head(2, model, OPTIONS), fuse=torch.tensor([0.5, 1.0, -0.2, 0.1]), floor=0.5)
    seen = predict([head], states, draft)[0]
    right = seen.features[:, 4] > seen.features[:, 4].median()
    head = fit_predictor(head, seen.features, right, OPTIONS, silent)
    hidden, count = states.at[2].float(), len(states.labels)
    view = ExitView(
        head,
        hidden,
        lambda rows: draft.logits(head, rows),
        eps=1e-5,
        index=0,
        num_exits=2,
        rows=torch.arange(count),
        trail=Trail(count, torch.device("cpu")),
    )
    gate = exit_scores(head, states.at[2], 1e-5)
    served = CRITERIA[ExitCriterion.TWO_KEY].score(view)
    torch.testing.assert_close(served, two_key_scores(head, gate, seen.best))
    predicted = CRITERIA[ExitCriterion.PREDICTOR].score(view)
    assert ((predicted > 0.5) == right).double().mean() > 0.9


def test_the_second_key_recovers_known_weights() -> None:
    """Agreement drawn from a known combination of the keys; the fit must find its ranking."""
    generator = torch.Generator().manual_seed(3)
    gate = torch.rand(4000, generator=generator)
    top = torch.rand(4000, generator=generator) * 0.6 + 0.3
    best = torch.stack((top, (1 - top) * torch.rand(4000, generator=generator)), dim=1)
    logit = 1.5 * gate.logit() + 2 * top.logit()
    agrees = torch.rand(4000, generator=generator) < torch.sigmoid(logit)
    fuse = fit_fuse(gate, best, agrees)
    assert fuse[0] == pytest.approx(1.5, abs=0.25)
    assert fuse.equal(fuse.half().float())


@pytest.mark.parametrize("always", [True, False])
def test_agreement_without_variety_gives_finite_weights(always: bool) -> None:  # noqa: FBT001
    gate, best = torch.rand(50), torch.tensor([[0.6, 0.2]]).repeat(50, 1)
    fuse = fit_fuse(gate, best, torch.full((50,), always))
    assert fuse.isfinite().all()


def test_the_floor_loses_three_percent_of_the_sure() -> None:
    gate = torch.arange(200) / 200
    second = torch.where(torch.arange(200) >= 100, 0.95, 0.2)
    floor = floor_for(gate, second)
    lost = (gate[second >= 0.9] < floor).double().mean()
    assert float(lost) == pytest.approx(0.03)
    assert floor_for(gate, torch.full((200,), 0.5)) == 0.0
