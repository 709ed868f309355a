"""``offramp exits train`` on the tiny model: results, interruptions, refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from offramp.kernels.native import library
from offramp.models.config import Weights
from offramp.models.exits.file import load_exits, read_metadata, save_safetensors
from offramp.models.exits.training import pipeline
from offramp.models.exits.training.data import Answer, AnswerLog
from offramp.models.exits.training.train import train_adapter, train_gate
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.server.commands import exits
from offramp.server.commands.exits import main

SIZES = ["--width", "16", "--router", "8", "--epochs", "2", "--vocab", "100", "--device", "cpu"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(2)
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = torch.randint(3, 320, (60, 14), generator=generator).tolist()
    lines = [json.dumps({"prompt": row[:4], "answer": row[4:]}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def train(tiny_dir: Path, out: Path, *more: str) -> int:
    words = ["train", "--model", str(tiny_dir), "--out", str(out), "--exit-layers", "2,3"]
    return main([*words, *SIZES, *more])


def test_equal_seeds_give_equal_files(
    tiny_dir: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, seed in zip(files, "001", strict=True):
        assert train(tiny_dir, path, "--answers", str(answers), "--seed", seed) == 0
    first, again, other = (path.read_bytes() for path in files)
    assert first == again
    assert first != other
    assert sorted(tmp_path.iterdir()) == files
    printed = json.loads(capsys.readouterr().out.splitlines()[0])
    assert printed == read_metadata(files[0])["metrics"]
    own = fingerprint(load_weights(tiny_dir, config_from_hf(tiny_dir), dtype=torch.float32))
    heads = load_exits(
        files[0],
        fingerprint=own,
        hidden_size=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
    ).heads
    assert [head.layer for head in heads] == [2, 3]
    assert all(head.kv_map is not None for head in heads)


def test_info_shows_the_metrics(
    tiny_dir: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "exits.safetensors"
    two = [str(answers), str(answers)]
    assert train(tiny_dir, path, "--answers", *two, "--objective", "preference") == 0
    capsys.readouterr()
    assert main(["info", str(path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["data"]["answers"] == 120
    assert set(shown["metrics"]["curves"]) == {"2", "3"}


@pytest.mark.skipif(library() is None, reason="needs the C kernels")
@pytest.mark.parametrize(("weights", "moved"), [("int8", (0, 0.02)), ("int4", (0.02, 1))])
def test_exits_for_rounded_weights(
    tiny_dir: Path, answers: Path, tmp_path: Path, weights: str, moved: Any
) -> None:
    """States and keys and values are those of the rounded model; the exits are the model's own."""
    maps, work = {}, tmp_path / "work"
    own = fingerprint(load_weights(tiny_dir, config_from_hf(tiny_dir), dtype=torch.float32))
    for form in ("auto", weights):
        out = tmp_path / f"{form}.safetensors"
        words = ["--answers", str(answers), "--weights", form, "--work", str(work / form)]
        assert train(tiny_dir, out, *words) == 0
        file = load_exits(
            out, fingerprint=own, hidden_size=64, dtype=torch.float32, device=torch.device("cpu")
        )
        maps[form] = file.heads[0].kv_map
        assert file.weights is Weights(form)
    plain, rounded = maps.values()
    assert plain is not None
    assert rounded is not None
    assert moved[0] < float((rounded - plain).norm() / plain.norm()) < moved[1]


def test_a_backbone_that_is_tuned_keeps_its_weights(
    tiny_dir: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--answers", str(answers), "--weights", "int4", "--backbone", "tuned"]
    assert train(tiny_dir, tmp_path / "a.safetensors", *words) == 1
    assert "--weights int4 is for a frozen backbone on a CPU" in capsys.readouterr().err


@pytest.mark.parametrize("last", ["adapter-2", "adapter-3", "gate-2"])
def test_an_interrupted_run_continues_and_gives_the_same_file(
    last: str,
    tiny_dir: Path,
    answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    assert train(tiny_dir, whole, "--answers", str(answers)) == 0
    work = ["--answers", str(answers), "--work", str(tmp_path / "work")]
    done = tmp_path / "work" / f"{last}.safetensors"

    def until_done(stage: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if done.exists():
                raise KeyboardInterrupt
            return stage(*args)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_adapter", until_done(train_adapter))
        patch.setattr(pipeline, "train_gate", until_done(train_gate))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_dir, resumed, *work)
    assert done.exists()
    kept = done.stat().st_mtime_ns
    assert train(tiny_dir, resumed, *work) == 0
    assert resumed.read_bytes() == whole.read_bytes()
    assert done.stat().st_mtime_ns == kept


def test_answers_are_generated_once(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"question number {n} about {7 * n}" for n in range(60)]
    (tmp_path / "a.txt").write_text("\n".join(texts[:30]))
    (tmp_path / "b.txt").write_text("\n".join(texts[30:]))
    prompts = ["--prompts", *(str(tmp_path / f"{n}.txt") for n in "ab"), "--max-tokens", "6"]
    saved = tmp_path / "saved.jsonl"
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    assert train(tiny_dir, whole, *prompts, "--save-answers", str(saved)) == 0
    assert len(saved.read_text().splitlines()) == 60
    added: list[int] = []
    add = AnswerLog.add

    def fail_at_20(log: AnswerLog, number: int, answer: Answer) -> None:
        if len(added) == 20:
            raise KeyboardInterrupt
        added.append(number)
        add(log, number, answer)

    work = ["--work", str(tmp_path / "work")]
    with monkeypatch.context() as patch:
        patch.setattr(AnswerLog, "add", fail_at_20)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_dir, resumed, *prompts, *work)
    log = tmp_path / "work" / "answers.jsonl"
    with log.open("a") as file:
        file.write('{"index": 3, "promp')
    assert train(tiny_dir, resumed, *prompts, *work) == 0
    numbers = [json.loads(line)["index"] for line in log.read_text().splitlines()]
    assert numbers[:20] == added
    assert sorted(numbers) == list(range(60))
    assert resumed.read_bytes() == whole.read_bytes()


def test_work_of_other_options_is_refused(
    tiny_dir: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exits.safetensors"
    work = ["--answers", str(answers), "--work", str(tmp_path / "work")]
    assert train(tiny_dir, out, *work) == 0
    capsys.readouterr()
    assert train(tiny_dir, out, *work, "--seed", "3", "--objective", "preference") == 1
    error = capsys.readouterr().err
    assert "other options (objective, seed)" in error
    (tmp_path / "work" / "adapter-2.safetensors").write_bytes(b"torn")
    assert train(tiny_dir, out, *work) == 1
    assert "adapter-2.safetensors is damaged; delete it" in capsys.readouterr().err


GOOD = '{"prompt": [5], "answer": [6]}\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "a.jsonl is empty"),
        ("\n \n", "a.jsonl is empty"),
        (GOOD + '{"prompt": [5], "ans', "a.jsonl, line 2: not valid JSON"),
        (GOOD + "\n[1]", "a.jsonl, line 3: must be an object"),
        ('{"answer": [6]}', "line 1: prompt must be a list of token ids"),
        ('{"prompt": [5]}', "line 1: answer must be a list of token ids"),
        ('{"prompt": [5], "answer": "six"}', "line 1: answer must be a list"),
        ('{"prompt": [5], "answer": [6.5]}', "line 1: answer must be a list"),
        ('{"prompt": [], "answer": [6]}', "line 1: prompt is empty"),
        ('{"prompt": [5], "answer": []}', "line 1: answer is empty"),
        (GOOD + '{"prompt": [5], "answer": [6, 320]}', "line 2: token id 320 in answer is outside"),
        ('{"prompt": [-1], "answer": [6]}', "line 1: token id -1 in prompt is outside"),
        (json.dumps({"prompt": [5] * 2000, "answer": [6] * 50}), "line 1: 2050 tokens"),
        (GOOD * 49, "49 answers; at least 50"),
    ],
)
def test_bad_answers_are_told_in_one_line(
    text: str, told: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    assert train(tiny_dir, tmp_path / "out", "--answers", str(path)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("offramp exits: ")
    assert told in error


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.jsonl", '"fine"\n{"prompt": \n', "p.jsonl, line 2: not valid JSON"),
        ("p.jsonl", '{"answer": "x"}\n', "p.jsonl, line 1: a row has none of"),
        ("p.json", '{"prompt": "x"}', "p.json must hold a JSON list"),
        ("p.txt", "", "p.txt is empty"),
        ("missing.txt", None, "missing.txt: No such file"),
    ],
)
def test_bad_prompts_are_told_in_one_line(
    name: str,
    text: str | None,
    told: str,
    tiny_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert train(tiny_dir, tmp_path / "out", "--prompts", str(tmp_path / name)) == 1
    assert told in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_result_that_cannot_be_written_is_told_before_training(
    tiny_dir: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_dir, tmp_path, "--answers", str(answers)) == 1
    assert "is a folder; name a file in it" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert train(tiny_dir, tmp_path / "file" / "out", "--answers", str(answers)) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    good = tmp_path / "out"
    assert train(tiny_dir, good, "--answers", str(answers), "--work", str(tmp_path / "file")) == 1
    assert capsys.readouterr().err.startswith("offramp exits: ")


def test_exit_layers_must_lie_inside_the_model(
    tiny_dir: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model", str(tiny_dir), "--out", str(tmp_path / "o"), "--answers"]
    assert main([*words, str(answers), "--exit-layers", "2,4"]) == 1
    assert capsys.readouterr().err.strip().endswith("exit layer is 4; supported: 1 to 3")
    for wrong in ("3,2", "0,2", "a", "2,,3", ""):
        with pytest.raises(SystemExit):
            main([*words, str(answers), "--exit-layers", wrong])
        assert "ascending positive numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--epochs", "0"], ["--vocab", "-1"], ["--precision", "1.5"], ["--threshold", "nan"]]
)
def test_impossible_numbers_are_refused(words: list[str], tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        exits.main(["train", "--out", "o", "--exit-layers", "2", "--answers", "a", *words])


def test_the_curves_are_drawn(tiny_dir: Path, answers: Path, tmp_path: Path) -> None:
    picture = tmp_path / "figures" / "curves.png"
    out = tmp_path / "exits.safetensors"
    assert train(tiny_dir, out, "--answers", str(answers), "--plot", str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_plot_without_matplotlib_is_refused_before_training(
    tiny_dir: Path,
    answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "exits.safetensors"
    assert train(tiny_dir, out, "--answers", str(answers), "--plot", str(tmp_path / "c.png")) == 1
    error = capsys.readouterr().err
    assert "offramp[train]" in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_a_sorted_header_keeps_tensors_and_metadata(
    tiny_dir: Path, answers: Path, tmp_path: Path
) -> None:
    path = tmp_path / "exits.safetensors"
    assert train(tiny_dir, path, "--answers", str(answers)) == 0
    with safe_open(path, "pt") as file:
        before = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    content = path.read_bytes()
    save_safetensors(path, before[1], dict(reversed(before[0].items())))
    assert path.read_bytes() == content
    with safe_open(path, "pt") as file:
        assert file.metadata() == before[0]
        assert all(file.get_tensor(name).equal(tensor) for name, tensor in before[1].items())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(before[0])
