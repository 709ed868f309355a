"""`offramp exits eval` on a tiny model, end to end."""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.models.exits.file import load_exits, read_metadata
from offramp.models.exits.points import OperatingPoint
from offramp.models.sampling_params import ExitCriterion, KVFill
from offramp.server.lab import evaluate

Words = list[str]


def call(words: Words) -> int:
    """The command as the command line would run it."""
    parser = argparse.ArgumentParser()
    evaluate.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["eval", *words])
    status: int = args.command(args)
    return status


def add_point(path: Path) -> None:
    """An operating point of quality 0.9."""
    file = load_exits(
        path,
        fingerprint=read_metadata(path)["fingerprint"],
        hidden_size=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    point = OperatingPoint(
        quality=0.9,
        confidence=0.95,
        criterion=ExitCriterion.TWO_KEY,
        kv_fill=KVFill.PROJECT,
        thresholds=(0.1, 0.3),
        agreement=0.97,
        layers_skipped=0.2,
        mean_depth=3.2,
        prompts=48,
        tokens=576,
    )
    replace(file, points=(point,)).save(path)


@pytest.fixture
def words(easy_dir: Path, exits: Path, prompts: Path, tmp_path: Path) -> Words:
    add_point(exits)
    words = ["--model", str(easy_dir), "--exits", str(exits), "--prompts", str(prompts)]
    words += ["--limit", "24", "--max-tokens", "10", "--threads", "1"]
    return [*words, "--out", str(tmp_path / "out"), "--every-exit"]


def test_every_setting_has_quality_beside_speed(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"{i} and 1?", "answer": f"So.\n#### {i + 1}"} for i in range(5)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call([*words, "--steps", "2", "--tasks", f"gsm8k={task}"]) == 0
    text = capsys.readouterr().out
    document: dict[str, Any] = json.loads(text.splitlines()[-1])
    found = {row["name"]: row for row in document["rows"]}
    kinds = [row["kind"] for row in document["rows"]]
    assert kinds[:2] == ["off", "point"]
    assert kinds.count("sweep") == 4
    assert kinds[-4:] == ["fill", "fill", "fill", "lossless"]
    for row in document["rows"]:
        assert 0 < row["agreement"] <= 1
        assert row["speed_up"] > 0
        assert row["length"] > 0
        assert 0 <= row["repetition"] <= 1
        assert row["perplexity"] > 1
    assert found["off"]["agreement"] == found["lossless"]["agreement"] == 1.0
    assert found["off"]["layers_skipped"] == 0
    assert found["quality 0.9"]["layers_skipped"] > 0
    assert found["quality 0.9"]["thresholds"] == [0.1, 0.3]
    for name in ("off", "quality 0.9", "lossless"):
        assert found[name]["task_gsm8k"] in {share / 5 for share in range(6)}
    out = tmp_path / "out"
    assert json.loads((out / "eval.json").read_text()) == document
    assert (out / "eval.md").read_text().strip() in text
    for picture in ("quality-layers.png", "quality-speed.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_fills_answer_for_the_same_thresholds(words: Words, tmp_path: Path) -> None:
    """Without fitted maps in the file there is no row for them."""
    assert call([*words, "--fill-table"]) == 0
    document = json.loads((tmp_path / "out" / "fills.json").read_text())
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["off", "absent", "copy", "project, identity", "recompute"]
    for name, row in rows.items():
        if name != "off":
            assert row["thresholds"] == [0.1, 0.3]
            assert row["exit_histogram"].keys() > {"4"}
    assert rows["absent"]["agreement"] < rows["recompute"]["agreement"]


def test_without_matplotlib_the_extra_is_named(
    words: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def missing(name: str, package: str | None = None) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert call(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "offramp[train]" in error


def test_unknown_points_and_tasks_are_named(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call([*words, "--points", "0.99"]) == 1
    assert "it has 0.9" in capsys.readouterr().err
    assert call([*words, "--tasks", f"chess={tmp_path}"]) == 1
    assert "known are gsm8k, arc, ag_news" in capsys.readouterr().err
    for wrong in (["--criteria", "hope"], ["--fills", "magic"], ["--tasks", "gsm8k"]):
        with pytest.raises(SystemExit) as refused:
            call([*words, *wrong])
        assert refused.value.code == 2
