"""Tuning a backbone for its exits, on the tiny model."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.models.config import ModelConfig
from offramp.models.exits.deltas import Deltas, new_deltas
from offramp.models.exits.head import ExitHead
from offramp.models.exits.training import tune
from offramp.models.exits.training.data import Answer
from offramp.models.exits.training.train import TrainOptions, plain_head
from offramp.models.exits.training.training_model import DenseModel
from offramp.models.exits.training.tune import (
    Curriculum,
    TuneOptions,
    Tuner,
    active_exits,
    compare,
    dropout_rates,
    exit_weights,
    make_batches,
)
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import load_weights

EXITS = (2, 3)
CPU = torch.device("cpu")
OPTIONS = TuneOptions(
    rank=16, lr=5e-3, epochs=20, batch_tokens=500, vocab_sample=0, layer_dropout=0.05
)


@dataclass
class Setting:
    config: ModelConfig
    weights: dict[str, Tensor]
    base: DenseModel
    answers: list[Answer]

    def parts(self, rank: int = 16) -> tuple[Deltas, list[ExitHead]]:
        deltas = new_deltas(self.weights, self.config, fingerprint="f" * 32, rank=rank, seed=0)
        sizes = TrainOptions(width=32, router=8)
        return deltas, [plain_head(n, self.weights["final_norm"], sizes) for n in EXITS]


@pytest.fixture(scope="module")
def setting(tiny_dir: Path) -> Setting:
    config = config_from_hf(tiny_dir)
    weights = load_weights(tiny_dir, config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(3, 320, (60, 24), generator=generator).tolist()
    answers = [Answer(tuple(row[:4]), tuple(row[4 : 16 + i % 8])) for i, row in enumerate(rows)]
    return Setting(config, weights, DenseModel(config, weights, 64), answers)


def silent(name: str, done: int, total: int, loss: float) -> None:
    assert 0 <= done <= total
    assert math.isfinite(loss), name


def test_an_untuned_backbone_compares_as_itself(setting: Setting) -> None:
    deltas, heads = setting.parts()
    found = compare(setting.base, setting.base.with_deltas(deltas.low), heads, setting.answers)
    assert found["kept_choices"] == 1.0
    assert found["divergence"] == pytest.approx(0.0, abs=1e-6)
    assert found["perplexity"]["before"] == found["perplexity"]["after"]
    for row in found["exits"].values():
        assert row["shared_before"] == row["shared_after"] == row["adapter_after"]
    assert found["tokens"] == sum(len(item.answer) for item in setting.answers)


def test_figures_are_those_of_the_whole_vocabulary(setting: Setting) -> None:
    """One answer, by hand."""
    deltas, heads = setting.parts()
    item = setting.answers[7]
    found = compare(setting.base, setting.base.with_deltas(deltas.low), heads, [item])
    ids = torch.tensor([[*item.prompt, *item.answer[:-1]]])
    with torch.no_grad():
        states = setting.base(ids, EXITS)
        rows = slice(len(item.prompt) - 1, None)
        logits, low = (
            setting.base.normed(hidden[0, rows]) @ setting.base.lm_head.t()
            for hidden in (states.last, states.at[2])
        )
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(item.answer))
    assert found["perplexity"]["before"] == pytest.approx(math.exp(nll), rel=1e-4)
    agrees = (low.argmax(-1) == logits.argmax(-1)).double().mean()
    assert found["exits"]["2"]["shared_before"] == pytest.approx(float(agrees), abs=1e-4)


def test_tuning_brings_the_exits_near_and_holds_the_full_depth(setting: Setting) -> None:
    deltas, heads = setting.parts()
    losses: list[float] = []
    Tuner(setting.base, deltas, heads, OPTIONS).train(
        setting.answers, lambda _name, _done, _total, loss: losses.append(loss)
    )
    tuned = setting.base.with_deltas(deltas.stored().low)
    found = compare(setting.base, tuned, heads, setting.answers)
    assert losses[-1] < losses[0]
    for row in found["exits"].values():
        assert row["shared_after"] > row["shared_before"] + 0.05
        assert row["adapter_after"] > row["shared_before"] + 0.1
    assert found["divergence"] < 0.15
    assert found["kept_choices"] > 0.75


def test_the_full_depth_is_held_by_its_own_loss(setting: Setting) -> None:
    """The heavier the exits weigh, the further the full depth drifts."""
    drift = []
    for weight in (0.1, 10.0):
        deltas, heads = setting.parts()
        options = replace(OPTIONS, epochs=4, exit_weight=weight)
        Tuner(setting.base, deltas, heads, options).train(setting.answers, silent)
        tuned = setting.base.with_deltas(deltas.low)
        drift.append(compare(setting.base, tuned, heads, setting.answers)["divergence"])
    assert drift[0] < drift[1] / 2


def factors(deltas: Deltas) -> Tensor:
    return torch.cat([factor.flatten() for pair in deltas.low.values() for factor in pair])


def test_adapters_have_a_head_start(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a tenth of the training the backbone stays as it is."""
    monkeypatch.setattr(tune, "_REPORT_STEPS", 1)
    options = replace(OPTIONS, epochs=20)
    total = 20 * len(make_batches(setting.answers, OPTIONS.batch_tokens, CPU))
    changed = []
    for steps in (total // 10, total // 5 + 2):
        deltas, heads = setting.parts()
        fresh = factors(deltas)
        adapter = heads[0].norm.clone()
        tuner = Tuner(setting.base, deltas, heads, options)

        def stop(*_: Any, tuner: Tuner = tuner, steps: int = steps) -> None:
            if tuner.step == steps:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tuner.train(setting.answers, stop)
        changed.append(not factors(deltas).equal(fresh))
        assert not heads[0].norm.equal(adapter)
    assert changed == [False, True]


@pytest.mark.parametrize("sample", [0, 120])
def test_a_resumed_tuning_is_the_uninterrupted_one(
    sample: int, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, epochs=3, vocab_sample=sample)
    whole, heads = setting.parts()
    Tuner(setting.base, whole, heads, options).train(setting.answers, silent)
    monkeypatch.setattr(tune, "_CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(tune, "_REPORT_STEPS", 1)
    checkpoint, calls = tmp_path / "tuning.pt", []

    def stop_at_4(*call: Any) -> None:
        calls.append(call)
        if len(calls) == 4:
            raise KeyboardInterrupt

    deltas, first = setting.parts()
    with pytest.raises(KeyboardInterrupt):
        Tuner(setting.base, deltas, first, options).train(setting.answers, stop_at_4, checkpoint)
    resumed, second = setting.parts()
    tuner = Tuner(setting.base, resumed, second, options)
    tuner.train(setting.answers, silent, checkpoint)
    assert tuner.step == 3 * len(make_batches(setting.answers, 500, CPU))
    assert factors(resumed).equal(factors(whole))
    for mine, theirs in zip(second, heads, strict=True):
        assert mine.gate_up.equal(theirs.gate_up)


def test_tuning_ends_when_its_time_is_over(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that gains a second whenever somebody looks at it."""
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    deltas, heads = setting.parts()
    tuner = Tuner(setting.base, deltas, heads, replace(OPTIONS, epochs=1000, minutes=0.1))
    tuner.train(setting.answers, silent)
    assert 0 < tuner.step <= 6
    assert tuner.seconds >= 6
    assert factors(deltas).isfinite().all()
    assert not factors(deltas).requires_grad


def test_dropout_rises_exponentially_to_its_highest() -> None:
    rates = dropout_rates(31, 0.2)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.2)
    assert rates[15] == pytest.approx(0.2 * (math.sqrt(2) - 1))
    steps = rates.diff()
    assert (steps.diff() > 0).all()


def test_deeper_exits_weigh_more_and_all_together_the_total() -> None:
    weights = exit_weights((10, 20, 30), [True, True, True], 1.5)
    assert weights == pytest.approx([0.25, 0.5, 0.75])
    assert exit_weights((10, 20, 30), [False, True, False], 1.5) == [0.0, 1.5, 0.0]
    assert exit_weights((10, 20), [False, False], 1.5) == [0.0, 0.0]


def test_curricula() -> None:
    turns = [active_exits(Curriculum.ROTATE, 3, step, 0.5).index(True) for step in range(6)]
    assert turns == [0, 1, 2, 0, 1, 2]
    grown = [active_exits(Curriculum.GRADUAL, 3, 0, at) for at in (0.0, 0.2, 0.4, 0.9)]
    assert grown == [
        [False, False, True],
        [False, True, True],
        [True, True, True],
        [True, True, True],
    ]
    assert active_exits(Curriculum.ALL, 2, 0, 0.0) == [True, True]


def test_batches_hold_every_answer_token_once(setting: Setting) -> None:
    batches = make_batches(setting.answers, 200, CPU)
    assert all(batch.ids.numel() <= 200 for batch in batches)
    labels = [token for batch in batches for token in batch.labels.tolist()]
    assert sorted(labels) == sorted(token for item in setting.answers for token in item.answer)
    for batch in batches:
        # Each row's token is followed by its label, unless that ends the answer.
        flat = batch.ids.flatten().tolist()
        pairs = list(zip(batch.rows.tolist(), batch.labels.tolist(), strict=True))
        for (row, label), (following, _) in itertools.pairwise(pairs):
            if following == row + 1:
                assert flat[following] == label
