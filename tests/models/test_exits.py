"""Exits from training to file and back, on the tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from offramp.models.exits.file import (
    FORMAT,
    ExitFile,
    ExitFileError,
    check_fit,
    load_exits,
    read_metadata,
    shipped_exits,
)
from offramp.models.exits.head import ExitHead
from offramp.models.exits.points import CoarsePoint, OperatingPoint
from offramp.models.exits.training.data import Answer, States, collect
from offramp.models.exits.training.pipeline import Judged, judge, split_answers, train_exits
from offramp.models.exits.training.second_key import Draft
from offramp.models.exits.training.train import (
    Objective,
    TrainOptions,
    exit_scores,
    new_head,
    threshold_for,
    train_adapter,
)
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.models.sampling_params import ExitCriterion, KVFill
from offramp.models.transformer import Transformer

EXITS = (2, 3)
OPTIONS = TrainOptions(
    precision=0.8,
    width=48,
    router=16,
    epochs=8,
    gate_epochs=8,
    batch=64,
    vocab_sample=200,
    vocab=120,
)
CPU = torch.device("cpu")


def silent(name: str, done: int, total: int, loss: float) -> None:
    assert done <= total
    assert loss == loss, name  # noqa: PLR0124 (NaN is the one number that differs from itself)


@pytest.fixture(scope="module")
def model(tiny_dir: Path) -> Transformer:
    config = config_from_hf(tiny_dir)
    weights = load_weights(tiny_dir, config, dtype=torch.float32)
    return Transformer(config, weights, EXITS, 256)


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    generator = torch.Generator().manual_seed(2)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 320, (count,), generator=generator).tolist())

    return [Answer(ids(3 + i % 9), ids(5 + i % 17)) for i in range(90)]


@pytest.fixture(scope="module")
def states(model: Transformer, answers: list[Answer]) -> States:
    return collect(model, answers)


@pytest.fixture(scope="module")
def trained(model: Transformer, states: States) -> ExitFile:
    return train_exits(
        model,
        states,
        fingerprint="f" * 32,
        data={"answers": 90},
        options=OPTIONS,
        report=silent,
    )


def load(path: Path, name: str = "f" * 32, width: int = 64) -> ExitFile:
    return load_exits(path, fingerprint=name, hidden_size=width, dtype=torch.float32, device=CPU)


@torch.inference_mode()
def test_states_equal_transformers(tiny_dir: Path, answers: list[Answer], states: States) -> None:
    """Every position that makes an answer token, in whatever batch it was computed."""
    theirs: Any = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    for index in (0, 17, 89):
        item = answers[index]
        ids = torch.tensor([[*item.prompt, *item.answer[:-1]]])
        out = theirs(input_ids=ids, output_hidden_states=True)
        mine = states.where(states.answer_of == index)
        first = len(item.prompt) - 1
        assert mine.labels.tolist() == out.logits[0, first:].argmax(dim=-1).tolist()
        for layer in EXITS:
            expected = out.hidden_states[layer][0, first:]
            torch.testing.assert_close(mine.at[layer].float(), expected, rtol=2e-3, atol=2e-3)
        top = out.hidden_states[-1][0, first:]
        torch.testing.assert_close(mine.top.float(), top, rtol=2e-3, atol=2e-3)


def test_a_new_head_is_the_plain_final_norm(model: Transformer, states: States) -> None:
    """Untrained, an exit says what the model's own head says of its state."""
    head = new_head(2, model, OPTIONS)
    hidden = states.at[2][:20].float()
    plain = model.logits(model.normed(hidden)).argmax(dim=-1)
    assert Draft(model, None).choices(head, states.at[2][:20]).equal(plain)
    assert exit_scores(head, states.at[2][:5], 1e-5).tolist() == [0.5] * 5


def test_training_brings_agreement(model: Transformer, states: States) -> None:
    options = replace(OPTIONS, epochs=20, lr=1e-2)
    head = new_head(3, model, options)
    before = (Draft(model, None).choices(head, states.at[3]) == states.labels).double().mean()
    losses: list[float] = []
    held_out = states, Draft(model, None)
    curve = train_adapter(
        head, model, states, options, lambda *args: losses.append(args[3]), held_out
    )
    assert curve[-1]["loss"] < curve[0]["loss"]
    after = (Draft(model, None).choices(head, states.at[3]) == states.labels).double().mean()
    assert losses[-1] < losses[0]
    assert after > before + 0.1
    assert not head.scale.requires_grad


def test_the_pipeline_trains_every_exit_and_judges_it(trained: ExitFile) -> None:
    assert [head.layer for head in trained.heads] == list(EXITS)
    assert set(trained.metrics["exits"]) == {"2", "3"}
    assert trained.metrics["judged_tokens"] > 0
    assert 0.0 <= trained.metrics["layers_skipped"] < 1.0
    assert trained.data["answers"] == 90
    assert trained.data["train_tokens"] > trained.data["gate_tokens"] > 0
    for head in trained.heads:
        assert 0.0 <= head.threshold <= 1.01
        assert head.router_down.abs().sum() > 0
        assert head.fuse is not None
        assert head.predictor_up is not None
        assert head.predictor_up.shape == (32, 12)
        curve = trained.metrics["curves"][str(head.layer)]
        assert [row["epoch"] for row in curve] == list(range(OPTIONS.epochs + 1))
        assert curve[-1]["loss"] < curve[0]["loss"]


def test_a_file_brings_back_what_was_saved(trained: ExitFile, tmp_path: Path) -> None:
    path = tmp_path / "new" / "exits.safetensors"
    trained.save(path)
    loaded = load(path)
    assert loaded.metrics == trained.metrics
    assert loaded.data == trained.data
    assert loaded.vocab is not None
    assert trained.vocab is not None
    assert loaded.vocab.equal(trained.vocab)
    for mine, theirs in zip(trained.heads, loaded.heads, strict=True):
        assert (mine.layer, mine.threshold) == (theirs.layer, theirs.threshold)
        assert mine.floor == theirs.floor
        for name in ("scale", "gate_up", "down", "norm", "router_up", "fuse", "predictor_down"):
            assert getattr(theirs, name).equal(getattr(mine, name).half().float())
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    metadata = read_metadata(path)
    assert metadata["format"] == FORMAT
    assert metadata["exit_layers"] == list(EXITS)


def test_exits_of_another_model_are_refused(trained: ExitFile, tmp_path: Path) -> None:
    path = tmp_path / "exits.safetensors"
    trained.save(path)
    with pytest.raises(ExitFileError, match=r"another model.*offramp exits train"):
        load(path, "0" * 32)
    with pytest.raises(ExitFileError, match=r"2\.down has the shape|2\.scale has the shape"):
        load(path, width=32)


def test_files_that_are_no_exit_files_are_named(trained: ExitFile, tmp_path: Path) -> None:
    path = tmp_path / "exits.safetensors"
    with pytest.raises(ExitFileError, match=r"exits\.safetensors"):
        load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ExitFileError, match="cannot be read"):
        load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ExitFileError, match="not an exit file"):
        load(path)
    trained.save(path)
    metadata = read_metadata(path)
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    save_file({"2.scale": torch.ones(64)}, path, text)
    with pytest.raises(ExitFileError, match="lacks tensors of exit 2: down, gate_up"):
        load(path)


def point(quality: float, *thresholds: float) -> OperatingPoint:
    return OperatingPoint(
        quality=quality,
        confidence=0.95,
        criterion=ExitCriterion.TWO_KEY,
        kv_fill=KVFill.PROJECT,
        thresholds=thresholds,
        agreement=quality,
        layers_skipped=0.1,
        mean_depth=3.0,
        prompts=10,
        tokens=100,
    )


def test_operating_points_survive_by_rising_quality(trained: ExitFile, tmp_path: Path) -> None:
    path = tmp_path / "exits.safetensors"
    points = (point(0.98, 0.9, 0.8), point(0.95, 0.7, 0.8))
    # With exact keys and values lower scores are enough.
    exact = replace(point(0.96, 0.6, 0.6), kv_fill=KVFill.RECOMPUTE)
    replace(trained, points=(*points, exact)).save(path)
    assert load(path).points == (points[1], exact, points[0])


def test_what_coarse_inputs_keep_survives(trained: ExitFile, tmp_path: Path) -> None:
    path = tmp_path / "exits.safetensors"
    trained.save(path)
    assert load(path).coarse is None
    coarse = CoarsePoint(0.98, 0.95, 0.99, 100, 6400)
    replace(trained, coarse=coarse).save(path)
    assert load(path).coarse == coarse


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ((point(0.9, 0.9, 0.8), point(0.95, 0.9, 0.7)), "not monotone: quality 0.95"),
        ((point(0.9, 0.9),), "needs 2 thresholds"),
        ((point(1.5, 0.9, 0.8),), "lie between 0 and 1"),
    ],
)
def test_operating_points_that_contradict_themselves_are_refused(
    trained: ExitFile, tmp_path: Path, points: tuple[OperatingPoint, ...], said: str
) -> None:
    path = tmp_path / "exits.safetensors"
    replace(trained, points=points).save(path)
    with pytest.raises(ExitFileError, match=said):
        load(path)


def test_an_unknown_criterion_in_a_file_is_refused(trained: ExitFile, tmp_path: Path) -> None:
    path = tmp_path / "exits.safetensors"
    replace(trained, points=(point(0.9, 0.9, 0.8),)).save(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"two_key", b"two_kez"))
    with pytest.raises(ExitFileError, match=r"broken operating point.*two_kez"):
        load(path)


def test_damaged_tensors_are_refused(trained: ExitFile, tmp_path: Path) -> None:
    path = tmp_path / "exits.safetensors"
    first = trained.heads[0]
    poisoned = replace(first, scale=first.scale * torch.nan)
    replace(trained, heads=(poisoned, *trained.heads[1:])).save(path)
    with pytest.raises(ExitFileError, match=r"2\.scale has values that are not numbers"):
        load(path)
    trained.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExitFileError, match="cannot be read"):
        load(path)


COARSE = json.dumps(
    {"quality": 0.98, "confidence": 0.95, "agreement": 0.99, "prompts": 100, "tokens": 6400}
)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("operating_points", "{}", "operating_points is no list"),
        ("operating_points", "[1]", "broken operating point"),
        ("exit_layers", '["2", "3"]', "exit_layers is no list of whole numbers"),
        ("exit_layers", "[3, 2]", "do not fit together"),
        ("exit_layers", "2", "exit_layers is no list"),
        ("thresholds", '[0.9, "high"]', "thresholds is no list of numbers"),
        ("thresholds", "[0.9, NaN]", "thresholds is no list of numbers"),
        ("floors", "[0.9, null]", "floors is no list of numbers"),
        ("metrics", "[]", "metrics is no object"),
        ("data", '{"weights": "int5"}', "'int5' is not a valid Weights"),
        ("coarse_inputs", "[]", "coarse inputs are no object"),
        ("coarse_inputs", '{"quality": 0.9}', "coarse inputs are no object of agreement, conf"),
        ("coarse_inputs", COARSE.replace("0.98", '"high"'), "coarse inputs have values that are"),
        ("coarse_inputs", COARSE.replace("0.98", "1.5"), "of coarse inputs lie between 0 and 1"),
    ],
)
def test_wrong_metadata_is_refused_by_name(
    trained: ExitFile, tmp_path: Path, key: str, value: str, said: str
) -> None:
    path = tmp_path / "exits.safetensors"
    trained.save(path)
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in read_metadata(path).items()}
    save_file(load_file(path), path, text | {key: value})
    with pytest.raises(ExitFileError, match=rf"exits\.safetensors.*{said}"):
        read_metadata(path)


@pytest.mark.parametrize("value", [float("nan"), "high", True])
def test_a_point_without_numbers_is_refused(
    trained: ExitFile, tmp_path: Path, value: float
) -> None:
    path = tmp_path / "exits.safetensors"
    for wrong in (point(0.9, value, 0.8), replace(point(0.9, 0.9, 0.8), agreement=value)):
        replace(trained, points=(wrong,)).save(path)
        with pytest.raises(ExitFileError, match=r"broken operating point.*not numbers"):
            load(path)


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("down", (64, 5)),
        ("gate_up", (96, 63)),
        ("norm", (63,)),
        ("router_up", (16, 65)),
        ("router_down", (2, 16)),
        ("fuse", (3,)),
        ("predictor_up", (32, 11)),
        ("kv_map", (10, 63)),
    ],
)
def test_wrong_shapes_are_refused(
    trained: ExitFile, tmp_path: Path, field: str, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "exits.safetensors"
    changed: dict[str, Any] = {field: torch.zeros(shape)}
    heads = (replace(trained.heads[0], **changed), trained.heads[1])
    replace(trained, heads=heads).save(path)
    with pytest.raises(ExitFileError, match=r"exits\.safetensors: tensor 2\..* has the shape"):
        load(path)


@pytest.mark.parametrize("ids", [[], [3, 2], [1, 1], [-1, 2], [[1, 2]]])
def test_a_vocabulary_out_of_order_is_refused(
    trained: ExitFile, tmp_path: Path, ids: list[int]
) -> None:
    path = tmp_path / "exits.safetensors"
    replace(trained, vocab=torch.tensor(ids)).save(path)
    with pytest.raises(ExitFileError, match=r"exits\.safetensors: vocab is n"):
        load(path)


def test_exits_that_do_not_fit_the_model_are_refused(trained: ExitFile, model: Transformer) -> None:
    path, shape = Path("exits.safetensors"), model.config
    check_fit(path, trained, shape)
    low, high = trained.heads
    rows: dict[str, Any] = {"kv_map": torch.zeros(3, 64)}
    for heads, vocab, said in (
        ((low, replace(high, layer=4)), None, "exit 4 is not inside"),
        ((replace(low, layer=0), high), None, "exit 0 is not inside"),
        ((replace(low, **rows), high), None, "kv_map has 3 rows"),
        ((low, high), torch.tensor([1, shape.vocab_size]), "vocab has the token"),
    ):
        with pytest.raises(ExitFileError, match=rf"exits\.safetensors: .*{said}"):
            check_fit(path, replace(trained, heads=heads, vocab=vocab), shape)


def test_a_file_has_the_usual_mode_and_ordered_metadata(trained: ExitFile, tmp_path: Path) -> None:
    path, plain = tmp_path / "exits.safetensors", tmp_path / "plain"
    trained.save(path)
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


def test_gates_learn_agreement_unless_told_otherwise() -> None:
    assert TrainOptions().objective is Objective.AGREEMENT


def test_no_exits_are_shipped_for_strangers() -> None:
    assert shipped_exits("0" * 32) is None


@pytest.mark.weights
def test_exits_are_shipped_for_the_embedded_model(smollm2_dir: Path) -> None:
    config = config_from_hf(smollm2_dir)
    own = fingerprint(load_weights(smollm2_dir, config, dtype=torch.bfloat16))
    path = shipped_exits(own)
    assert path is not None
    heads = load(path, own, config.hidden_size).heads
    assert all(0 < head.layer < config.num_layers for head in heads)
    assert any(head.threshold <= 1.0 for head in heads)


@pytest.mark.parametrize(
    ("right", "precision", "expected"),
    [
        ([1, 1, 0, 1, 0], 1.0, (0.8, 0.4)),
        ([1, 1, 0, 1, 0], 0.75, (0.6, 0.8)),
        ([1, 1, 1, 1, 1], 0.98, (0.5, 1.0)),
        ([0, 0, 0, 0, 0], 0.5, (1.01, 0.0)),
        ([0, 1, 1, 1, 1], 0.8, (0.5, 1.0)),
    ],
)
def test_the_lowest_threshold_that_keeps_the_precision(
    right: list[int], precision: float, expected: tuple[float, float]
) -> None:
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    shuffled = torch.tensor([2, 0, 4, 1, 3])
    found = threshold_for(scores[shuffled], torch.tensor(right)[shuffled].bool(), precision)
    assert found == pytest.approx(expected)


def test_equal_scores_leave_together() -> None:
    """A threshold cannot part tokens of one score, so all of them count."""
    scores = torch.tensor([0.9, 0.7, 0.7, 0.7])
    right = torch.tensor([True, True, False, False])
    threshold, share = threshold_for(scores, right, 0.9)
    leaves = scores >= threshold
    assert float(right[leaves].double().mean()) >= 0.9
    assert share == pytest.approx(float(leaves.double().mean()))


def test_a_token_counts_at_the_first_exit_that_lets_it_go(model: Transformer) -> None:
    heads: list[ExitHead] = [
        replace(new_head(layer, model, OPTIONS), threshold=0.5) for layer in EXITS
    ]
    gate = torch.tensor([0.1, 0.2, 0.3, 0.9])
    low = Judged(
        torch.tensor([0.9, 0.1, 0.1, 0.1]), gate, torch.tensor([False, False, False, True])
    )
    high = Judged(
        torch.tensor([0.9, 0.9, 0.2, 0.9]), gate, torch.tensor([True, True, False, False])
    )
    metrics = judge(heads, [low, high], 4)
    assert metrics["agreement"] == 0.5
    assert metrics["layers_skipped"] == (2 + 1 + 1) / 16
    assert metrics["exits"]["2"]["leaves"] == 0.25
    assert metrics["exits"]["3"]["leaves"] == 0.5
    assert metrics["exits"]["2"]["by_gate"]["share_right_at_0.98"] == 0.25
    assert metrics["exits"]["2"]["by_second_key"]["share_right_at_0.98"] == 0.0


@pytest.mark.parametrize("count", [4, 50, 2000])
def test_answers_are_split_into_four_parts(count: int) -> None:
    split = split_answers(count, 0)
    parts = torch.stack([split.adapter, split.gate, split.key, split.judge])
    assert parts.int().sum(dim=0).eq(1).all()
    assert parts.any(dim=1).all()
    assert split.adapter.sum() * 2 >= count or count == 4
    again = split_answers(count, 0)
    assert again.judge.equal(split.judge)
    assert again.gate.equal(split.gate)
