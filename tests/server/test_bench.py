"""The bench command on the tiny model: what it prints, and when it refuses to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offramp.kernels.native import library
from offramp.server.bench import quiet, reference
from offramp.server.bench.command import main
from offramp.server.bench.common import exit_efficiency
from offramp.server.bench.rounds import mean_depth, measure
from offramp.server.bench.targets import InProcess, Trace
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.text.prompts import PromptFileError, read_prompts

ARGS = ["--concurrency", "1,3", "--max-tokens", "8", "--rounds", "1", "--threads", "1"]


def wrong(*_: object) -> reference.Reference:
    """Answers that no model gave."""
    return reference.Reference([[0] * 8] * 4, 1.0)


@pytest.fixture(autouse=True)
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is not quiet, which matters to comparisons with a peer only."""
    monkeypatch.setattr(quiet, "judge", lambda when: quiet.Judgement(when, 0.5, 0.01))


def test_last_line_is_json_with_speed_depth_and_agreement(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each mode and concurrency is a row; quality and layers stand beside speed."""
    assert main(["--model", str(tiny_dir), *ARGS]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    rows = {(row["mode"], row["concurrency"]): row for row in document["rows"]}
    assert set(rows) == {(mode, n) for mode in ("off", "adaptive") for n in (1, 3)}
    for (mode, _), row in rows.items():
        assert row["tokens_per_s"] > 0
        # Guesses that were wrong ran layers too.
        assert row["mean_depth"] == 4 if mode == "off" else row["mean_depth"] >= 4
        assert row["agreement"] == 1.0
    assert rows["adaptive", 3]["same_answers_as_off"] == 1.0
    assert document["ratios"].keys() == {"off_1_to_transformers", "off_3_to_off_1"}
    assert "| adaptive |" in out
    assert document["quiet"] is False
    assert document["peer"] is None
    assert document["peer_ratios"] == []


def test_drawn_answers_are_those_of_mode_off(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same seeds; the likeliest tokens are no measure of them."""
    words = ["--model", str(tiny_dir), *ARGS, "--modes", "off,lossless", "--temperature", "0.8"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["temperature"] == 0.8
    assert {row["agreement"] for row in document["rows"]} == {None}
    same = [row["same_answers_as_off"] for row in document["rows"] if row["mode"] == "lossless"]
    assert same == [1.0, 1.0]


def test_answers_are_drawn_with_their_own_seeds(tiny_dir: Path) -> None:
    engine = build_engine(EngineConfig(exits="none", device="cpu"), tiny_dir, model_name="tiny")
    target, prompts = InProcess(engine), [(1, 40, 41)] * 3
    given: dict[str, Any] = {"mode": "off", "max_tokens": 12, "ignore_eos": True}
    given["temperature"] = 0.9
    first, second, third = target.run(prompts, concurrency=3, seed=5, **given)
    again = target.run(prompts[:2], concurrency=1, seed=6, **given)
    assert [trace.token_ids for trace in again] == [second.token_ids, third.token_ids]
    assert first.token_ids != second.token_ids


def test_a_temperature_out_of_range_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--temperature", "2.5"])
    assert "must be 0 to 2" in capsys.readouterr().err


def test_a_profile_tells_where_a_step_goes(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts add up to the step, the layers' own among them where the C kernels run."""
    picture = tmp_path / "profile.png"
    assert main(["--model", str(tiny_dir), *ARGS, "--profile", str(picture)]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])["profile"]
    assert [row["streams"] for row in found["rows"]] == [1, 3]
    # Weights in fp32: four layers and the tied head.
    assert found["weight_bytes"] == 4 * (4 * (128 * 64 + 64 * 64 + 3 * 128 * 64) + 320 * 64)
    for row in found["rows"]:
        parts = row["parts_ms"]
        assert sum(parts.values()) == pytest.approx(row["step_ms"], abs=0.01)
        assert min(parts.values()) > 0
        if (kernels := library()) is not None:
            assert set(kernels.timers) < set(parts)
    assert "| attention |" in out or library() is None
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("found", "status"), [(0.99, 0), (0.97, 1)])
def test_other_weights_have_to_agree_with_fp32(
    found: float,
    status: int,
    tiny_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equality cannot be asked of them; how far they agree is reported."""
    monkeypatch.setattr(reference, "agreement", lambda *_: found)
    monkeypatch.setattr(reference, "transformers_answers", wrong)
    assert main(["--model", str(tiny_dir), *ARGS, "--weights", "auto"]) == status
    captured = capsys.readouterr()
    if status:
        assert "0.9700" in captured.err
        assert captured.out == ""
    else:
        assert json.loads(captured.out.splitlines()[-1])["check"]["agreement"] == found


def test_refuses_to_report_when_off_differs_from_the_reference(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fast wrong answer has no speed."""
    monkeypatch.setattr(reference, "transformers_answers", wrong)
    assert main(["--model", str(tiny_dir), *ARGS]) == 1
    captured = capsys.readouterr()
    assert "refused" in captured.err
    assert captured.out == ""


def test_prompts_are_as_long_as_wished(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--model", str(tiny_dir), *ARGS, "--modes", "off", "--prompt-tokens"]
    assert main([*args, "90"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["prompt_tokens"] == {"min": 90, "max": 90}
    assert main([*args, "2041"]) == 1
    assert "at most 2040 leave room to answer" in capsys.readouterr().err


def test_unknown_prompt_rows_are_named(tmp_path: Path) -> None:
    """A file the command cannot read is an error that says why."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"question": "b"}\n{"turns": ["c", "d"]}\n')
    assert read_prompts(path) == ["a", "b", "c"]
    path.write_text('{"nothing": 1}\n')
    with pytest.raises(PromptFileError, match="turns, prompt"):
        read_prompts(path)
    with pytest.raises(PromptFileError):
        read_prompts(tmp_path / "missing.txt")


def test_figures_of_a_known_trace() -> None:
    """Throughput over the wall time, gaps between tokens, depth over all tokens."""
    traces = [
        Trace((1,), 10.0, [1, 2, 3], [10.5, 10.6, 10.8], 60),
        Trace((1,), 10.0, [1, 2, 3], [10.7, 10.9, 11.0], 90),
    ]
    figures = measure(traces)
    assert figures.tokens_per_s == pytest.approx(6.0)
    assert figures.ttft_ms == pytest.approx(600)
    assert figures.itl_p50_ms == pytest.approx(150)
    assert mean_depth(traces) == 25
    traces[0].layers_executed = None
    assert mean_depth(traces) is None


def test_exit_efficiency_compares_time_with_skipped_layers() -> None:
    """Half the layers for twice the speed is 1; next to nothing skipped has none."""
    assert exit_efficiency(2.0, 30, 15.0) == pytest.approx(1.0)
    assert exit_efficiency(1.1, 30, 30.0) is None
    assert exit_efficiency(1.1, 30, 29.9) is None
