"""``offramp exits train --backbone tuned`` on the tiny model: one exit file and its deltas."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.models.exits.deltas import (
    apply_deltas,
    delta_paths,
    load_deltas,
    tuned_fingerprint,
)
from offramp.models.exits.file import ExitFile, load_exits, read_metadata
from offramp.models.exits.training import pipeline
from offramp.models.exits.training.train import train_gate
from offramp.models.exits.training.tune import Tuner
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.server.commands import tune_backbone
from offramp.server.commands.exits import main

ROOT = Path(__file__).parents[2]
SIZES = ["--width", "16", "--router", "8", "--epochs", "2", "--vocab", "100", "--device", "cpu"]
TUNING = ["--rank", "4", "--tune-epochs", "3", "--batch-tokens", "300", "--tune-lr", "0.005"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(2)
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = torch.randint(3, 320, (60, 14), generator=generator).tolist()
    lines = [json.dumps({"prompt": row[:4], "answer": row[4:]}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def train(tiny_dir: Path, answers: Path, out: Path, *more: str) -> int:
    words = ["train", "--model", str(tiny_dir), "--out", str(out), "--exit-layers", "2,3"]
    return main([*words, "--answers", str(answers), *SIZES, *more])


def tuned(tiny_dir: Path, answers: Path, out: Path, *more: str) -> int:
    return train(tiny_dir, answers, out, "--backbone", "tuned", *TUNING, *more)


def exits_of(path: Path, model: str) -> ExitFile:
    cpu = torch.device("cpu")
    return load_exits(path, fingerprint=model, hidden_size=64, dtype=torch.float32, device=cpu)


@pytest.fixture(scope="module")
def made(tiny_dir: Path, answers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned exit file; tests that write beside it take a copy."""
    path = tmp_path_factory.mktemp("tuned") / "exits.safetensors"
    assert tuned(tiny_dir, answers, path) == 0
    return path


def test_exits_belong_to_the_model_with_its_deltas(tiny_dir: Path, made: Path) -> None:
    config = config_from_hf(tiny_dir)
    weights = load_weights(tiny_dir, config, dtype=torch.float32)
    deltas = load_deltas(delta_paths(made), fingerprint=fingerprint(weights))
    assert deltas.rank == 4
    merged = apply_deltas(weights, deltas)
    assert not torch.allclose(merged["layers.1.gate_up"], weights["layers.1.gate_up"])
    file = exits_of(made, tuned_fingerprint(deltas))
    assert [head.layer for head in file.heads] == [2, 3]
    assert file.data["backbone"] == "tuned"


def test_before_and_after_are_in_the_metrics(made: Path) -> None:
    report = read_metadata(made)["metrics"]["backbone"]
    assert set(report["perplexity"]) == {"before", "after"}
    assert set(report["exits"]) == {"2", "3"}
    assert report["divergence"] > 0
    assert 0.5 < report["kept_choices"] < 1
    assert [row["bound"] for row in report["leaving"]] == [0.99, 0.97, 0.95, 0.9, 0.8]


def test_info_names_the_deltas(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(made)]) == 0
    assert json.loads(capsys.readouterr().out)["deltas"] == ["exits.deltas-1-of-1.safetensors"]


def test_a_frozen_training_removes_the_deltas_of_an_earlier_one(
    tiny_dir: Path, answers: Path, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made.parent, tmp_path / "copy")
    out = tmp_path / "copy" / made.name
    assert train(tiny_dir, answers, out) == 0
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("stage", ["comparing", "gates"])
def test_an_interrupted_tuning_continues_and_gives_the_same_files(
    stage: str,
    tiny_dir: Path,
    answers: Path,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, work = tmp_path / made.name, ["--work", str(tmp_path / "work")]

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stage == "comparing":
            patch.setattr(tune_backbone, "compare", interrupted)
        else:
            patch.setattr(pipeline, "train_gate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuned(tiny_dir, answers, out, *work)
    assert (tmp_path / "work" / "backbone.safetensors").exists() == (stage == "gates")
    calls: list[str] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls.append(function.__name__)
            return function(*args)

        return run

    monkeypatch.setattr(pipeline, "train_gate", counted(train_gate))
    monkeypatch.setattr(Tuner, "train", counted(Tuner.train))
    assert tuned(tiny_dir, answers, out, *work) == 0
    assert calls.count("train") == (0 if stage == "gates" else 1)
    assert calls.count("train_gate") == 2
    for path in made.parent.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_other_tuning_options_are_refused(
    tiny_dir: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "exits.safetensors", ["--work", str(tmp_path / "work")]
    assert train(tiny_dir, answers, out, *work) == 0
    capsys.readouterr()
    assert tuned(tiny_dir, answers, out, *work) == 1
    assert "other options (backbone, tuning)" in capsys.readouterr().err


def test_training_starts_from_an_earlier_file(
    tiny_dir: Path,
    answers: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From its adapters and maps, and without the head start of new ones."""
    first = tmp_path / "first.safetensors"
    assert train(tiny_dir, answers, first) == 0
    begun: list[tuple[Tuner, float]] = []

    def note(tuner: Tuner, *_: Any) -> None:
        begun.append((tuner, tuner.options.head_start))
        assert not tuner.heads[0].gate_up.equal(torch.zeros_like(tuner.heads[0].gate_up))

    monkeypatch.setattr(Tuner, "train", note)
    start = ["--start", str(first)]
    assert tuned(tiny_dir, answers, tmp_path / "second.safetensors", *start) == 0
    config = config_from_hf(tiny_dir)
    weights = load_weights(tiny_dir, config, dtype=torch.float32)
    file = exits_of(first, fingerprint(weights))
    ((tuner, head_start),) = begun
    assert head_start == 0
    for head, theirs in zip(tuner.heads, file.heads, strict=True):
        assert head.down.equal(theirs.down)
        assert theirs.kv_map is not None
        assert tuner.maps[head.layer][0].equal(theirs.kv_map)
    # A file of a tuned model is one of another model.
    assert tuned(tiny_dir, answers, tmp_path / "third.safetensors", *start) == 0
    capsys.readouterr()
    again = ["--start", str(tmp_path / "third.safetensors")]
    assert tuned(tiny_dir, answers, tmp_path / "fourth.safetensors", *again) == 1
    assert "exits of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--width", "8"], "adapters of width 16; --width is 8"),
        (["--exit-layers", "1,3"], "it has no exit after layer 1"),
        (["--start", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    more: list[str],
    message: str,
    tiny_dir: Path,
    answers: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = tmp_path / "first.safetensors"
    assert train(tiny_dir, answers, first) == 0
    out = tmp_path / "second.safetensors"
    assert train(tiny_dir, answers, out, "--start", str(first), *more) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_training_on_answers_needs_no_server(tiny_dir: Path, answers: Path, tmp_path: Path) -> None:
    """On a machine with torch, transformers and safetensors alone, as rented ones may be."""
    script = tmp_path / "bare.py"
    script.write_text(_BARE)
    out = tmp_path / "exits.safetensors"
    words = ["train", "--model", str(tiny_dir), "--out", str(out), "--exit-layers", "2,3"]
    words += ["--answers", str(answers), "--backbone", "tuned", *SIZES, *TUNING]
    done = subprocess.run(
        [sys.executable, str(script), "exits", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == read_metadata(out)["metrics"]


_BARE = """
import sys
from importlib.abc import MetaPathFinder

ABSENT = {"pydantic", "fastapi", "starlette", "uvicorn", "gguf", "rich", "prometheus_client"}


class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
from offramp.server.cli import main

sys.exit(main())
"""


def test_the_gpu_script_prints_its_figures_last(tiny_dir: Path, tmp_path: Path) -> None:
    command = tmp_path / "offramp"
    command.write_text(
        f"#!{sys.executable}\nimport sys\nfrom offramp.server.cli import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"what is {n} times {n}?" for n in range(50)))
    out = tmp_path / "exits.safetensors"
    extra = [*SIZES, *TUNING[:2], "--tune-epochs", "1", "--max-tokens", "4"]
    done = subprocess.run(
        [str(ROOT / "bench" / "train_gpu.sh"), str(out), str(tmp_path / "w"), "2,3", str(prompts)],
        env=os.environ
        | {"OFFRAMP": str(command), "MODEL": str(tiny_dir), "EXTRA": " ".join(extra)}
        | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == read_metadata(out)["metrics"]
    assert delta_paths(out)
    few = subprocess.run(
        [str(ROOT / "bench" / "train_gpu.sh"), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert few.returncode == 2
    assert "PROMPTS" in few.stderr
