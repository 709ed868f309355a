"""``offramp exits train-draft`` on the tiny model: results, interruptions, refusals, serving."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image

from offramp.kernels.native import library
from offramp.models.exits.draft_head import load_draft_head, read_draft_metadata, rounded
from offramp.models.exits.training import draft as training
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.models.sampling_params import DraftSource, ExitMode, ExitSettings, SamplingParams
from offramp.server.commands.exits import main
from offramp.server.config import EngineConfig
from offramp.server.engine import draft_trials
from offramp.server.engine.build import build_engine
from offramp.server.engine.engine import Engine
from offramp.server.engine.governor import HeadPlan
from offramp.server.engine.offline import Finished, run_all
from offramp.server.engine.request import GenerationRequest

from .engine.test_engine_machine import host_of

SIZES = ["--epochs", "2", "--batch", "64", "--vocab", "100", "--device", "cpu"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(2)
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = torch.randint(3, 60, (60, 14), generator=generator).tolist()
    lines = [json.dumps({"prompt": row[:4], "answer": row[4:]}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def train(tiny_dir: Path, answers: Path, out: Path, *more: str) -> int:
    words = ["train-draft", "--model", str(tiny_dir), "--out", str(out), "--answers", str(answers)]
    return main([*words, *SIZES, *more])


@pytest.fixture(scope="module")
def head(tiny_dir: Path, answers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head as it is trained by default."""
    path = tmp_path_factory.mktemp("head") / "a.draft.safetensors"
    assert train(tiny_dir, answers, path) == 0
    return path


def test_equal_seeds_give_equal_files(
    tiny_dir: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{name}.draft.safetensors" for name in "abc"]
    for path, seed in zip(files, "001", strict=True):
        assert train(tiny_dir, answers, path, "--seed", seed) == 0
    first, again, other = (path.read_bytes() for path in files)
    assert first == again
    assert first != other
    printed = json.loads(capsys.readouterr().out.splitlines()[0])
    assert printed == read_draft_metadata(files[0])["metrics"]


def test_the_head_learns_and_says_how_well_it_guesses(tiny_dir: Path, head: Path) -> None:
    metadata = read_draft_metadata(head)
    curve = metadata["metrics"]["curve"]
    assert [row["epoch"] for row in curve] == [0, 1, 2]
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.04
    assert metadata["layers"] == [1, 2, 4]
    assert metadata["data"] == {"answers": 57, "tokens": 570, "sources": ["answers.jsonl"]}
    shares = [share for share, _ in metadata["chances"]]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert len(metadata["metrics"]["acceptance"]) == 3
    config = config_from_hf(tiny_dir)
    own = fingerprint(load_weights(tiny_dir, config, dtype=torch.float32))
    found = load_draft_head(head, fingerprint=own, config=config).head
    # Every token of the answers can be guessed.
    assert set(range(3, 60)) < set(found.vocab.tolist())
    assert len(found.vocab) == 100
    assert torch.equal(found.fuse, rounded(found.fuse))


@pytest.mark.skipif(library() is None, reason="needs the C kernels")
@pytest.mark.parametrize(("weights", "moved"), [("int8", (0, 0.02)), ("int4", (0.02, 1))])
def test_a_head_for_rounded_weights(
    tiny_dir: Path, answers: Path, head: Path, tmp_path: Path, weights: str, moved: Any
) -> None:
    """States are those of the rounded model; the head is the model's own all the same."""
    out = tmp_path / "r.draft.safetensors"
    assert train(tiny_dir, answers, out, "--weights", weights) == 0
    config = config_from_hf(tiny_dir)
    own = fingerprint(load_weights(tiny_dir, config, dtype=torch.float32))
    assert load_draft_head(out, fingerprint=own, config=config).head.layers == (1, 2, 4)
    metadata, plain = (read_draft_metadata(path)["metrics"] for path in (out, head))
    assert moved[0] < abs(metadata["curve"][0]["loss"] - plain["curve"][0]["loss"]) < moved[1]
    assert metadata["curve"][-1]["loss"] < metadata["curve"][0]["loss"]


@pytest.mark.skipif(library() is None, reason="needs the C kernels")
def test_answers_of_rounded_weights(tiny_dir: Path, tmp_path: Path) -> None:
    """They are made by an engine with the weights that the states are made with."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"tell me about {number}" for number in range(60)))
    found = {}
    for weights in ("auto", "int4"):
        kept, out = tmp_path / f"{weights}.jsonl", tmp_path / f"{weights}.draft.safetensors"
        words = ["--prompts", str(prompts), "--save-answers", str(kept), "--max-tokens", "12"]
        words = ["--model", str(tiny_dir), "--out", str(out), *words, "--weights", weights]
        assert main(["train-draft", *words, *SIZES]) == 0
        found[weights] = kept.read_text()
    assert found["auto"] != found["int4"]


class Interruption(Exception):
    pass


def test_an_interrupted_training_goes_on_to_the_same_head(
    tiny_dir: Path,
    answers: Path,
    head: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, work = tmp_path / "b.draft.safetensors", tmp_path / "work"
    learn = training.DraftTrainer._learn
    steps = []

    def interrupted(self: training.DraftTrainer, *args: Any) -> float:
        steps.append(self.step)
        if len(steps) == 12:
            raise Interruption
        return learn(self, *args)

    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(training.DraftTrainer, "_learn", interrupted)
    with pytest.raises(Interruption):
        train(tiny_dir, answers, out, "--work", str(work))
    assert not out.exists()
    assert train(tiny_dir, answers, out, "--work", str(work)) == 0
    assert steps[11] == steps[12] == 11
    assert out.read_bytes() == head.read_bytes()


@pytest.mark.timeout(120)
def test_answers_of_any_length_are_trained_on_to_the_end(tiny_dir: Path, tmp_path: Path) -> None:
    """Epochs are of equally many steps, however the answers fall together in them."""
    generator = torch.Generator().manual_seed(3)
    path, out = tmp_path / "answers.jsonl", tmp_path / "e.draft.safetensors"
    sizes = torch.randint(1, 40, (70,), generator=generator).tolist()
    rows = [torch.randint(3, 60, (3 + size,), generator=generator).tolist() for size in sizes]
    lines = [json.dumps({"prompt": row[:3], "answer": row[3:]}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    assert train(tiny_dir, path, out, "--epochs", "5", "--batch", "50") == 0
    curve = read_draft_metadata(out)["metrics"]["curve"]
    assert [row["epoch"] for row in curve] == [0, 1, 2, 3, 4, 5]
    steps = curve[1]["step"]
    assert [row["step"] for row in curve] == [steps * epoch for epoch in range(6)]


def test_training_goes_on_from_a_head(
    tiny_dir: Path, answers: Path, head: Path, tmp_path: Path
) -> None:
    """It begins where the head is, with its layers and vocabulary."""
    out = tmp_path / "f.draft.safetensors"
    assert train(tiny_dir, answers, out, "--start", str(head), "--vocab", "50") == 0
    before, after = read_draft_metadata(head), read_draft_metadata(out)
    # Vectors are kept in fp16.
    begun = after["metrics"]["curve"][0]["loss"]
    assert begun == pytest.approx(before["metrics"]["loss"], abs=0.01)
    assert after["layers"] == before["layers"]
    config = config_from_hf(tiny_dir)
    own = fingerprint(load_weights(tiny_dir, config, dtype=torch.float32))
    first, second = (load_draft_head(p, fingerprint=own, config=config) for p in (head, out))
    assert second.head.vocab.equal(first.head.vocab)
    assert not second.head.qkv.equal(first.head.qkv)


def test_layers_beside_a_head_to_start_from_are_refused(
    tiny_dir: Path, answers: Path, head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "g.draft.safetensors"
    assert train(tiny_dir, answers, out, "--start", str(head), "--layers", "2,4") == 1
    assert "--layers" in capsys.readouterr().err


def test_minutes_end_the_training(tiny_dir: Path, answers: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.draft.safetensors"
    more = ("--epochs", "100000", "--minutes", "0.02")
    assert train(tiny_dir, answers, out, *more) == 0
    curve = read_draft_metadata(out)["metrics"]["curve"]
    assert 0 < curve[-1]["epoch"] < 100000


def test_a_picture_of_the_curve(tiny_dir: Path, answers: Path, tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    out = tmp_path / "d.draft.safetensors"
    assert train(tiny_dir, answers, out, "--plot", str(picture)) == 0
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(1 << 20)
    assert len(colours or ()) > 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "1,2"], "the last one 4"),
        (["--layers", "2,9"], "the last one 4"),
        (["--out", "a.safetensors"], "ends in .draft.safetensors"),
        (["--answers", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(
    tiny_dir: Path,
    answers: Path,
    tmp_path: Path,
    words: Sequence[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(tiny_dir, answers, tmp_path / "x.draft.safetensors", *words) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_work_of_other_options_is_not_continued(
    tiny_dir: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "x.draft.safetensors"
    assert train(tiny_dir, answers, out, "--work", str(work)) == 0
    assert train(tiny_dir, answers, out, "--work", str(work), "--layers", "2,4") == 1
    assert "other options (layers)" in capsys.readouterr().err


def test_info_shows_what_a_draft_head_holds(head: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(head)]) == 0
    assert json.loads(capsys.readouterr().out) == read_draft_metadata(head)


Kernels = Literal["auto", "torch"]


def engine_with(tiny_dir: Path, head: str, kernels: Kernels = "auto") -> Engine:
    config = EngineConfig(
        device="cpu",
        exits="none",
        draft_head=head,
        max_num_seqs=8,
        max_model_len=200,
        kernels=kernels,
    )
    return build_engine(config, tiny_dir, model_name="tiny", check_invariants=True)


GREEDY = SamplingParams(max_tokens=40, temperature=0.0)
SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, top_k=3, seed=5)
PROMPTS = [(5, 6, 7), tuple(range(20, 60)), (9, 10) * 4, (77,) * 12, tuple(range(20, 60))]


def answer(engine: Engine, mode: ExitMode, sampling: SamplingParams, name: str) -> list[Finished]:
    requests = [
        GenerationRequest(f"{name} {mode} {index}", prompt, sampling, ExitSettings(mode))
        for index, prompt in enumerate(PROMPTS)
    ]
    return run_all(engine, requests, concurrency=3)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_with_a_draft_head_are_those_of_full_depth(
    tiny_dir: Path,
    head: Path,
    sampling: SamplingParams,
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of a second turn, whose prompt is partly cached, and of requests without drafts."""
    monkeypatch.setattr(draft_trials, "_MANY", {False: 1000, True: 1000})
    engine = engine_with(tiny_dir, str(head), kernels)
    governor = host_of(engine).governor
    plans = iter([HeadPlan(3, 0.0, (-1.0,) * 3), HeadPlan(0, 1.0, ())] * 10_000)
    governor.head_plan = lambda rows, luck=1.0: next(plans)  # type: ignore[method-assign]
    off = answer(engine, ExitMode.OFF, sampling, "first")
    found = answer(engine, ExitMode.LOSSLESS, sampling, "first")
    assert [item.token_ids for item in found] == [item.token_ids for item in off]
    again = answer(engine, ExitMode.LOSSLESS, sampling, "again")
    assert [item.token_ids for item in again] == [item.token_ids for item in off]
    drafts = [item.stats.drafts for item in found if item.stats]
    assert all(own[DraftSource.HEAD][0] > 10 for own in drafts)
    passes = [item.stats.passes for item in off if item.stats]
    assert passes == [len(item.token_ids) for item in off]


@pytest.mark.parametrize(
    ("choice", "message"),
    [("nowhere.draft.safetensors", "no such file"), ("model.safetensors", "format")],
)
def test_a_draft_head_that_is_none_is_refused(
    tiny_dir: Path, choice: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_dir)
    with pytest.raises(Exception, match=message):
        engine_with(tiny_dir, choice)


@pytest.mark.parametrize("dtype", ["float16", "int16"])
def test_half_precision_pages_hold_the_heads_entries_too(
    tiny_dir: Path,
    head: Path,
    dtype: Literal["float16", "int16"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draft_trials, "_MANY", {False: 1000, True: 1000})
    if library() is None:
        pytest.skip("there is no C compiler")
    config = EngineConfig(
        device="cpu",
        exits="none",
        draft_head=str(head),
        kv_cache_dtype=dtype,
        max_model_len=200,
    )
    engine = build_engine(config, tiny_dir, model_name="tiny", check_invariants=True)
    plan = HeadPlan(3, 0.0, (-1.0,) * 3)
    host_of(engine).governor.head_plan = lambda rows, luck=1.0: plan  # type: ignore[method-assign]
    off = answer(engine, ExitMode.OFF, GREEDY, "half")
    found = answer(engine, ExitMode.LOSSLESS, GREEDY, "half")
    assert [item.token_ids for item in found] == [item.token_ids for item in off]
    assert sum(item.stats.drafted for item in found if item.stats) > 100


def test_a_model_without_a_shipped_draft_head_has_none(tiny_dir: Path) -> None:
    assert not engine_with(tiny_dir, "auto").info.draft_head
    assert not engine_with(tiny_dir, "none").info.draft_head
