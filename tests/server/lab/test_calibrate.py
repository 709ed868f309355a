"""`offramp exits calibrate` on a tiny model, end to end."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offramp.kernels.native import library
from offramp.models.config import Weights
from offramp.models.exits.calibration import Candidate
from offramp.models.exits.file import ExitFile, load_exits, read_metadata
from offramp.models.exits.points import OperatingPoint
from offramp.models.sampling_params import ExitCriterion, KVFill
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.lab import calibrate, candidates, selection

Words = list[str]
SHIPPED = Path(str(resources.files("offramp") / "models" / "exits"))


def call(words: Words) -> int:
    """The command as the command line would run it."""
    parser = argparse.ArgumentParser()
    calibrate.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["calibrate", *words])
    status: int = args.command(args)
    return status


def load(path: Path) -> ExitFile:
    return load_exits(
        path,
        fingerprint=read_metadata(path)["fingerprint"],
        hidden_size=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@pytest.fixture
def words(easy_dir: Path, exits: Path, prompts: Path) -> Words:
    words = ["--model", str(easy_dir), "--exits", str(exits), "--prompts", str(prompts)]
    return [*words, "--max-tokens", "12", "--threads", "1"]


def test_points_are_written_and_keep_what_they_promise(
    words: Words, exits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest of the file stays; the report ends in one JSON line."""
    out = tmp_path / "calibrated.safetensors"
    before = exits.read_bytes()
    assert call([*words, "--quality", "0.8,0.9", "--out", str(out)]) == 0
    assert exits.read_bytes() == before
    file = load(out)
    assert [point.quality for point in file.points] == [0.8, 0.9]
    loose, strict = file.points
    assert all(a <= b for a, b in zip(loose.thresholds, strict.thresholds, strict=True))
    for point in file.points:
        assert point.agreement > point.quality
        assert 0 < point.layers_skipped < 1
        assert point.mean_depth == pytest.approx(4 * (1 - point.layers_skipped), abs=1e-3)
        assert (point.prompts, point.tokens) == (48, 576)
        assert (point.criterion, point.kv_fill) == (ExitCriterion.TWO_KEY, KVFill.PROJECT)
        assert point.confidence == 0.95
    assert file.metrics == {"kept": 1}
    old, new = load_file(exits), load_file(out)
    assert old.keys() == new.keys()
    assert all(old[name].equal(new[name]) for name in old)
    text = capsys.readouterr().out.splitlines()
    assert text[0].startswith("| quality")
    document = json.loads(text[-1])
    assert document["prompts"] == {"candidates": 48, "trials": 48}
    risks = [1 - trial["foreseen_agreement"] for trial in document["trials"]]
    assert risks == sorted(risks)
    for row in document["points"]:
        assert row["p_value"] <= 0.05
        shown = [t for t in document["trials"] if t["thresholds"] == row["thresholds"]]
        assert shown[0]["seconds_per_token"] == row["seconds_per_token"]


def test_what_was_reached_is_kept_beside_what_was_not(
    words: Words, exits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.999 would need far more answers; 0.8 is shown by the same trials."""
    monkeypatch.setattr(selection, "too_few_prompts", lambda *_: {})
    assert call([*words, "--quality", "0.8,0.999"]) == 1
    output = capsys.readouterr()
    assert "quality 0.999 is out of reach" in output.err.splitlines()[-1]
    assert "are written" in output.err.splitlines()[-1]
    written = [row["quality"] for row in read_metadata(exits)["operating_points"]]
    assert written == [0.8]
    assert len(json.loads(output.out.splitlines()[-1])["points"]) == 1


def test_a_quality_out_of_reach_is_an_error_and_the_file_stays(
    words: Words, exits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most careful candidate is made too bold for 0.9 by making it the only one."""

    def bold(*_: Any, **__: Any) -> dict[ExitCriterion, list[Candidate]]:
        return {ExitCriterion.TWO_KEY: [Candidate((0.0, 0.0), 0.2, 0.5)]}

    monkeypatch.setattr(candidates, "candidates_from", bold)
    before = exits.read_bytes()
    assert call([*words, "--quality", "0.9"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "quality 0.9 is out of reach" in error
    assert "p = " in error
    best = float(error.split("confidence 0.95 is ")[1].split(",")[0])
    assert 0.5 < best < 0.9
    assert exits.read_bytes() == before


def test_too_few_prompts_are_refused_before_any_work(
    words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call([*words, "--quality", "0.99"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "needs " in error
    assert "96 can show 0.9" in error


def test_what_the_prompts_can_show_is_calibrated_all_the_same(
    words: Words, exits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The points of earlier calls stay, but for those of the same quality."""
    assert call([*words, "--quality", "0.9"]) == 0
    (first,) = load(exits).points
    assert call([*words, "--quality", "0.8,0.99"]) == 1
    error = capsys.readouterr().err
    assert "quality 0.99" in error.splitlines()[-1]
    assert "are written" in error.splitlines()[-1]
    new, *earlier = load(exits).points
    assert new.quality == 0.8
    # Which trial was the cheapest is a matter of measured time.
    assert earlier == ([] if "quality 0.9 contradicts" in error else [first])


def test_a_budget_states_the_quality_it_keeps(words: Words, exits: Path) -> None:
    """Points of other criteria stay in the file."""
    file = load(exits)
    kept = OperatingPoint(
        quality=0.7,
        confidence=0.9,
        criterion=ExitCriterion.GATE,
        kv_fill=KVFill.COPY,
        thresholds=(0.9, 0.9),
        agreement=0.8,
        layers_skipped=0.1,
        mean_depth=3.6,
        prompts=10,
        tokens=100,
    )
    replace(file, points=(kept,)).save(exits)
    assert call([*words, "--mean-depth", "3.2", "--criterion", "max_prob"]) == 0
    points = {point.criterion: point for point in load(exits).points}
    assert points[ExitCriterion.GATE] == kept
    found = points[ExitCriterion.MAX_PROB]
    assert found.mean_depth <= 3.2
    assert 0.5 < found.quality < found.agreement
    assert call([*words, "--mean-depth", "1.5"]) == 1


def test_what_inputs_of_8_bits_keep_is_noted_beside_the_points(
    smollm2_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing else changes."""
    if library() is None:
        pytest.skip("no C kernels on this machine")
    source, out = SHIPPED / "smollm2-135m.safetensors", tmp_path / "out.safetensors"
    words = ["--model", str(smollm2_dir), "--exits", str(source), "--prompts", str(prompts)]
    words += ["--limit", "24", "--max-tokens", "8", "--activation-dtype", "int8"]
    assert call([*words, "--out", str(out)]) == 0
    noted = json.loads(capsys.readouterr().out)
    assert 0.5 < noted["quality"] < noted["agreement"] <= 1
    assert (noted["prompts"], noted["confidence"]) == (24, 0.95)
    before, after = read_metadata(source), read_metadata(out)
    assert after.pop("coarse_inputs") == noted
    del before["coarse_inputs"]
    assert after == before
    old, new = load_file(source), load_file(out)
    assert old.keys() == new.keys()
    assert all(old[name].equal(new[name]) for name in old)


def test_inputs_of_8_bits_that_cannot_be_calibrated(
    words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quality is not asked for but measured, and weights have to be in integers."""
    words = [*words, "--activation-dtype", "int8"]
    assert call([*words, "--quality", "0.9"]) == 1
    assert call(words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "name none" in lines[0]
    assert "4 or 8 bits" in lines[1]


@pytest.mark.parametrize("criterion", ["patience", "fixed"])
def test_criteria_without_probabilities_are_calibrated_too(
    words: Words, exits: Path, criterion: str
) -> None:
    assert call([*words, "--quality", "0.6", "--criterion", criterion]) == 0
    (point,) = load(exits).points
    assert point.criterion == criterion
    assert point.layers_skipped > 0


@pytest.mark.parametrize(
    "wrong",
    [
        ["--quality", "1.2"],
        ["--quality", "0.5"],
        ["--quality", "x"],
        ["--quality", "0.9", "--criterion", "hope"],
        ["--quality", "0.9", "--confidence", "1"],
        ["--mean-depth", "0"],
        ["--mean-depth", "nan"],
        ["--quality", "0.9", "--limit", "0"],
    ],
)
def test_wrong_words_are_refused(words: Words, wrong: Words) -> None:
    with pytest.raises(SystemExit) as refused:
        call([*words, *wrong])
    assert refused.value.code == 2


def test_what_cannot_be_used_is_one_line(
    words: Words, exits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No goal, exits of another model, prompts that are none."""
    assert call(words) == 1
    file = load(exits)
    replace(file, fingerprint="0" * 32).save(exits)
    assert call([*words, "--quality", "0.9"]) == 1
    file.save(exits)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    changed = [str(empty) if word.endswith("prompts.txt") else word for word in words]
    assert call([*changed, "--quality", "0.9"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["offramp exits calibrate"] * 3
    assert "--quality" in lines[0]
    assert "another model" in lines[1]
    assert "empty" in lines[2]


@pytest.mark.skipif(library() is None, reason="needs the C kernels")
def test_exits_of_a_rounded_model_are_calibrated_on_it(
    words: Words, easy_dir: Path, exits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who serves it rounded so keeps the promise; where it is rounded otherwise the log says so."""
    replace(load(exits), data={"weights": "int8"}).save(exits)
    caplog.set_level("WARNING", "offramp.engine")
    assert call([*words, "--quality", "0.8"]) == 0
    assert "are rounded to at most int8" in caplog.text
    said = "what exits promise was found with --weights int8"
    for weights, warned in ((Weights.INT8, False), (Weights.INT4, True)):
        caplog.clear()
        config = EngineConfig(
            device="cpu", exits=str(exits), weights=weights, max_num_seqs=2, max_model_len=64
        )
        build_engine(config, easy_dir, model_name="easy")
        assert f"are rounded to at most {weights}" in caplog.text
        assert (said in caplog.text) is warned
