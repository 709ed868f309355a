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

from offramp.kernels.weight_formats import WeightFormat, can_hold
from offramp.models.config import ModelConfig
from offramp.models.exits.deltas import Deltas, apply_deltas, new_deltas
from offramp.models.exits.head import ExitHead
from offramp.models.exits.training import tune
from offramp.models.exits.training.compare import compare, with_exits
from offramp.models.exits.training.data import Answer
from offramp.models.exits.training.train import TrainOptions, plain_head
from offramp.models.exits.training.training_model import DenseModel
from offramp.models.exits.training.tune import (
    Batch,
    Curriculum,
    TuneOptions,
    Tuner,
    active_exits,
    dropout_rates,
    exit_weights,
    make_batches,
)
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import load_weights
from offramp.models.transformer import Transformer, identity_projection
from tests.models.test_grid import on_grid

EXITS = (2, 3)
CPU = torch.device("cpu")
OPTIONS = TuneOptions(
    rank=16, lr=5e-3, epochs=20, batch_tokens=500, vocab_sample=0, layer_dropout=0.05
)


@dataclass
class Parts:
    """What a tuner changes."""

    deltas: Deltas
    heads: list[ExitHead]
    maps: dict[int, tuple[Tensor, Tensor]]


@dataclass
class Setting:
    config: ModelConfig
    weights: dict[str, Tensor]
    base: DenseModel
    answers: list[Answer]

    def parts(self, rank: int = 16) -> Parts:
        deltas = new_deltas(self.weights, self.config, fingerprint="f" * 32, rank=rank, seed=0)
        sizes = TrainOptions(width=32, router=8)
        heads = [plain_head(n, self.weights["final_norm"], sizes) for n in EXITS]
        model = Transformer(self.config, self.weights, EXITS, 64)
        maps = {}
        for n in EXITS:
            weight, _ = identity_projection(model, n)
            maps[n] = weight.clone(), torch.zeros(len(weight))
        return Parts(deltas, heads, maps)

    def tuner(self, parts: Parts, options: TuneOptions) -> Tuner:
        return Tuner(self.base, parts.deltas, parts.heads, parts.maps, options)

    def compared(self, parts: Parts, answers: list[Answer], *, rounded: bool = False) -> Any:
        deltas = parts.deltas.stored() if rounded else parts.deltas
        model = self.base.with_deltas(deltas.low)
        return compare(self.base, model, parts.heads, parts.maps, answers)


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
    found = setting.compared(setting.parts(), setting.answers)
    assert found["kept_choices"] == 1.0
    assert found["divergence"] == pytest.approx(0.0, abs=1e-6)
    assert found["perplexity"]["before"] == found["perplexity"]["after"]
    for row in found["exits"].values():
        assert row["shared_before"] == row["shared_after"] == row["adapter_after"]
    assert found["tokens"] == sum(len(item.answer) for item in setting.answers)


def test_figures_are_those_of_the_whole_vocabulary(setting: Setting) -> None:
    """One answer, by hand."""
    item = setting.answers[7]
    found = setting.compared(setting.parts(), [item])
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
    parts = setting.parts()
    losses: list[float] = []
    setting.tuner(parts, OPTIONS).train(
        setting.answers, lambda _name, _done, _total, loss: losses.append(loss)
    )
    found = setting.compared(parts, setting.answers, rounded=True)
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
        parts = setting.parts()
        options = replace(OPTIONS, epochs=4, exit_weight=weight)
        setting.tuner(parts, options).train(setting.answers, silent)
        drift.append(setting.compared(parts, setting.answers)["divergence"])
    assert drift[0] < drift[1] / 2


def factors(parts: Parts) -> Tensor:
    pairs = parts.deltas.low.values()
    return torch.cat([factor.flatten() for pair in pairs for factor in pair])


def test_adapters_have_a_head_start(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a tenth of the training the backbone stays as it is."""
    monkeypatch.setattr(tune, "_REPORT_STEPS", 1)
    options = replace(OPTIONS, epochs=20)
    total = 20 * len(make_batches(setting.answers, OPTIONS.batch_tokens, CPU))
    changed = []
    for steps in (total // 10, total // 5 + 2):
        parts = setting.parts()
        fresh = factors(parts)
        adapter = parts.heads[0].norm.clone()
        tuner = setting.tuner(parts, options)

        def stop(*_: Any, tuner: Tuner = tuner, steps: int = steps) -> None:
            if tuner.step == steps:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tuner.train(setting.answers, stop)
        changed.append(not factors(parts).equal(fresh))
        assert not parts.heads[0].norm.equal(adapter)
    assert changed == [False, True]


@pytest.mark.parametrize("sample", [0, 120])
def test_a_resumed_tuning_is_the_uninterrupted_one(
    sample: int, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, epochs=3, vocab_sample=sample)
    whole = setting.parts()
    setting.tuner(whole, options).train(setting.answers, silent)
    monkeypatch.setattr(tune, "_CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(tune, "_REPORT_STEPS", 1)
    checkpoint, calls = tmp_path / "tuning.pt", []

    def stop_at_4(*call: Any) -> None:
        calls.append(call)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setting.tuner(setting.parts(), options).train(setting.answers, stop_at_4, checkpoint)
    resumed = setting.parts()
    tuner = setting.tuner(resumed, options)
    tuner.train(setting.answers, silent, checkpoint)
    assert tuner.step == 3 * len(make_batches(setting.answers, 500, CPU))
    assert factors(resumed).equal(factors(whole))
    for mine, theirs in zip(resumed.heads, whole.heads, strict=True):
        assert mine.gate_up.equal(theirs.gate_up)
    for layer, (weight, bias) in whole.maps.items():
        assert weight.equal(resumed.maps[layer][0])
        assert bias.equal(resumed.maps[layer][1])


def test_tuning_ends_when_its_time_is_over(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that gains a second whenever somebody looks at it."""
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    parts = setting.parts()
    tuner = setting.tuner(parts, replace(OPTIONS, epochs=1000, minutes=0.1))
    tuner.train(setting.answers, silent)
    assert 0 < tuner.step <= 6
    assert tuner.seconds >= 6
    assert factors(parts).isfinite().all()
    assert not factors(parts).requires_grad


def test_in_a_share_of_the_sequences_tokens_may_leave(setting: Setting) -> None:
    """All of a sequence at one bound, but never a prompt's last token."""
    batch = make_batches(setting.answers, 5000, CPU)[0]
    assert batch.first.sum() == len(batch.ids)
    for leaving, least, most in ((0.0, 0, 0), (0.5, 15, 45), (1.0, 60, 60)):
        bounds = tune._bounds(batch, leaving, torch.Generator().manual_seed(4))
        assert bounds[batch.first].isinf().all()
        own = [set(bounds[(batch.owner == n) & ~batch.first].tolist()) for n in range(60)]
        assert all(len(values) == 1 for values in own)
        finite = [value for values in own for value in values if math.isfinite(value)]
        assert least <= len(finite) <= most
        assert all(0.5 <= value <= 1 for value in finite)


def test_keys_and_values_of_those_who_left_are_learnt(setting: Setting) -> None:
    """Only where tokens leave do the maps get a gradient."""
    for leaving, moves in ((0.0, False), (1.0, True)):
        parts = setting.parts()
        before = {layer: weight.clone() for layer, (weight, _) in parts.maps.items()}
        # Of 320 tokens none is ever half sure here.
        options = replace(OPTIONS, epochs=4, leaving=leaving)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tune, "_bounds", lambda batch, share, _: _bounds(batch, share))
            setting.tuner(parts, options).train(setting.answers, silent)
        # After layer 3 nobody leaves: who does has left before.
        assert parts.maps[2][0].equal(before[2]) != moves
        assert parts.maps[3][0].equal(before[3])


def _bounds(batch: Batch, share: float) -> Tensor:
    """Every second answer token leaves at the first exit, the others at none."""
    bounds = torch.full(batch.labels.shape, math.inf)
    if share:
        bounds[::2] = 0.0
    return bounds


def test_figures_with_exits(setting: Setting) -> None:
    parts = setting.parts()
    nobody, everybody = with_exits(
        setting.base, parts.heads, parts.maps, setting.answers, (1.1, 0.0)
    )
    assert nobody == {"bound": 1.1, "skipped": 0.0, "agreement": 1.0, "wrong_at_exits": 0.0}
    tokens = sum(len(item.answer) for item in setting.answers)
    # All but the first token of an answer leave after layer 2 of 4.
    assert everybody["skipped"] == pytest.approx((tokens - 60) / tokens / 2, abs=1e-4)
    assert everybody["agreement"] == pytest.approx(1 - everybody["wrong_at_exits"], abs=1e-4)
    assert everybody["agreement"] < 0.9


def test_weights_on_a_grid_are_trained_as_they_are_served(setting: Setting) -> None:
    weights = dict(setting.weights)
    for seed, name in enumerate(f"layers.{n}.{own}" for n in range(4) for own in ("o", "down")):
        rows, columns = weights[name].shape
        weights[name] = on_grid(rows, columns, seed) / 8
    grids = replace(setting, weights=weights, base=DenseModel(setting.config, weights, 64))
    parts = grids.parts()
    parts.deltas = replace(parts.deltas, on_grid=True)
    tuner = grids.tuner(parts, replace(OPTIONS, epochs=10))
    tuner.train(setting.answers, silent)
    merged = apply_deltas(weights, parts.deltas)
    assert not merged["layers.2.down"].equal(weights["layers.2.down"])
    for name, weight in tuner._rounded().items():
        assert can_hold(WeightFormat.INT4, merged[name])
        torch.testing.assert_close(weight.float(), merged[name], rtol=0.01, atol=1e-6)
    assert not can_hold(WeightFormat.INT4, merged["layers.2.qkv"])
    served = DenseModel(setting.config, merged, 64)
    found = compare(grids.base, served, parts.heads, parts.maps, setting.answers)
    for row in found["exits"].values():
        assert row["adapter_after"] > row["shared_before"] + 0.05


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
