"""States along answers: read from files or made on the spot, and the batches of guesses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offramp.models.config import Weights
from offramp.models.exits.training import draft_data as module
from offramp.models.exits.training.data import Answer
from offramp.models.exits.training.draft_data import (
    ComputedFeatures,
    collect_features,
    make_batch,
)
from offramp.models.exits.training.pipeline import Work
from offramp.models.exits.training.training_model import DenseModel
from offramp.models.families import config_from_hf
from offramp.models.loading.formats import choose
from offramp.models.loading.safetensors import load_weights
from offramp.models.transformer import Transformer

LAYERS = (1, 2, 4)
CPU = torch.device("cpu")
# The last one has a guess, its second, but no third.
ANSWERS = [
    Answer((5, 6, 7), (8, 9, 10, 11)),
    Answer((12,), (13, 14)),
    Answer((15, 16), (17, 18, 19)),
]


@pytest.fixture(scope="module")
def model(tiny_dir: Path) -> DenseModel:
    config = config_from_hf(tiny_dir)
    return DenseModel(config, load_weights(tiny_dir, config, dtype=torch.float32), 64)


@pytest.mark.parametrize("room", [0, 1500, 10**9])
def test_states_made_on_the_spot_are_those_of_files(
    model: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Kept or made again, in any company."""
    stored = collect_features(model, ANSWERS, LAYERS, Work(tmp_path), lambda _: None)
    monkeypatch.setattr(module, "_free_memory", lambda _: 2 * room)
    computed = ComputedFeatures(model, ANSWERS, LAYERS)
    for group in ([0], [2, 1], [0, 1, 2], [1, 2, 0]):
        torch.testing.assert_close(
            computed.states(group), stored.states(group), rtol=0.02, atol=0.02
        )
    some = computed.select([2, 0])
    assert some.answers == [ANSWERS[2], ANSWERS[0]]
    torch.testing.assert_close(some.states([1]), stored.states([0]), rtol=0.02, atol=0.02)


def test_states_of_the_served_model_are_the_same(
    model: DenseModel, tiny_dir: Path, tmp_path: Path
) -> None:
    """Of each answer in any company, but for the sixteen bits that the other computes in."""
    weights = load_weights(tiny_dir, model.config, dtype=torch.float32)
    served = Transformer(model.config, weights, (), 64, choose(Weights.FP32, weights))
    answers = [*ANSWERS, Answer(tuple(range(20, 60)), (3, 4)), *ANSWERS] * 40
    (tmp_path / "theirs").mkdir()
    theirs = collect_features(model, answers, LAYERS, Work(tmp_path / "theirs"), lambda _: None)
    (tmp_path / "ours").mkdir()
    ours = collect_features(served, answers, LAYERS, Work(tmp_path / "ours"), lambda _: None)
    every = range(len(answers))
    found, wanted = ours.states(every).float(), theirs.states(every).float()
    assert found.shape == wanted.shape
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    assert torch.equal(ours.states([0]), ours.states([4]))


def test_chains_of_guesses(model: DenseModel) -> None:
    """Each is one entry behind the guess it follows, in its own text, while there is an answer."""
    batch = make_batch(ComputedFeatures(model, ANSWERS, LAYERS), [0, 1, 2], 3, CPU)
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 10, 12, 13, 15, 16, 17, 18]
    assert batch.following.tolist() == [6, 7, 8, 9, 10, 11, 13, 14, 16, 17, 18, 19]
    assert batch.positions.tolist() == [*range(6), *range(2), *range(4)]
    assert batch.starts.tolist() == [0, 6, 8]
    assert (batch.longest, batch.most_chains) == (6, 3)
    assert batch.places.tolist() == [*range(6), 6, 7, 12, 13, 14, 15]
    assert batch.before.tolist() == [3, 1, 2]
    first, second, third = batch.steps
    assert first.rows.tolist() == [3, 4, 5, 7, 10, 11]
    assert first.chains.tolist() == [0, 1, 2, 3, 6, 7]
    assert second.rows.tolist() == [4, 5, 11]
    assert second.chains.tolist() == [0, 1, 6]
    assert second.after.tolist() == [0, 1, 4]
    assert third.rows.tolist() == [5]
    assert third.after.tolist() == [0]
