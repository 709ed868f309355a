"""The engine bench on a CPU: its traces, its simulation, and a whole run on the tiny shape."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.kernels.backend import rehearsal, triton
from offramp.models.costs import CostModel, StepCost
from offramp.models.device_loop import DeviceToken
from offramp.models.sampling_params import NEVER
from offramp.server.bench.command import engine_parser, main
from offramp.server.bench.common import BenchError, Refused
from offramp.server.bench.device import seconds_of
from offramp.server.bench.engine import check, decode
from offramp.server.bench.engine import options as options_of
from offramp.server.bench.engine.decode import Mode
from offramp.server.bench.engine.model import RandomModel
from offramp.server.bench.engine.options import (
    WARM_UP,
    Options,
    default_exits,
    maximum_entropy,
    read_options,
    read_trace,
    thresholds,
)
from offramp.server.engine.batch_delay import BatchDelay, simulate

SIZES = ["--model-shape", "tiny", "--device", "cpu", "--context", "40", "--tokens", "16"]
ARGS = ["engine", *SIZES, "--batch", "1,4", "--rounds", "2", "--exit-trace", "0.6"]


def options(*words: str) -> Options:
    return read_options(engine_parser().parse_args([*SIZES, *words]))


@pytest.mark.parametrize("mean", [8.5, 12.0, 19.2, 20.0, 30.0, 31.9])
def test_maximum_entropy_has_the_mean_and_all_depths(mean: float) -> None:
    depths = (8, 16, 24, 32)
    shares = maximum_entropy(depths, mean)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0
    assert sum(d * s for d, s in zip(depths, shares, strict=True)) == pytest.approx(mean)
    # Of a distribution of this form the shares of evenly spaced depths are a geometric series.
    ratios = [b / a for a, b in pairwise(shares)]
    assert ratios == pytest.approx([ratios[0]] * 3)


def test_no_mean_outside_the_depths() -> None:
    assert maximum_entropy((8, 16, 32), 8) == (1, 0, 0)
    assert maximum_entropy((8, 16, 32), 32) == (0, 0, 1)
    assert maximum_entropy((8, 16, 24), 16) == pytest.approx([1 / 3] * 3)


def test_listed_shares_are_taken_as_they_are() -> None:
    trace = read_trace("8:0.4,16:0.2,32:0.4", (8, 16, 24), 32)
    assert trace.depths == (8, 16, 24, 32)
    assert trace.shares == pytest.approx((0.4, 0.2, 0, 0.4))
    assert trace.mean_depth == pytest.approx(19.2)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0.1", "out of reach"),
        ("1.1", "out of reach"),
        ("deep", "write a mean share"),
        ("nan", "write a mean share"),
        ("8:0.4,32:x", "write a mean share"),
        ("8:0.4,32:0.4", "sum to 0.8"),
        ("9:0.4,32:0.6", "9 is neither an exit layer"),
        ("8:0.5,8:0.5", "a second time"),
        ("8:-0.5,32:1.5", "negative"),
    ],
)
def test_a_trace_that_cannot_be_is_named(text: str, told: str) -> None:
    with pytest.raises(BenchError, match=told):
        read_trace(text, (8, 16, 24), 32)


def test_draws_have_the_shares_in_every_slot() -> None:
    """Within one token of each; another seed shuffles them otherwise."""
    trace = read_trace("8:0.4,16:0.2,32:0.4", (8, 16, 24), 32)
    draws = trace.draw(50, 7, seed=3)
    assert draws.shape == (50, 7)
    for column in draws.T:
        counts = torch.bincount(column, minlength=4).tolist()
        assert counts == pytest.approx([20, 10, 0, 20], abs=1)
    assert not torch.equal(draws, trace.draw(50, 7, seed=4))
    assert not torch.equal(draws[:, 0], draws[:, 1])


def test_thresholds_let_a_token_leave_where_it_was_drawn() -> None:
    asked = thresholds(torch.tensor([[0, 2], [1, 0]]), 2)
    expected = [[[0, NEVER], [NEVER, NEVER]], [[NEVER, 0], [0, NEVER]]]
    assert torch.equal(asked, torch.tensor(expected))


def test_exits_lie_at_the_quarters() -> None:
    assert default_exits(32) == (8, 16, 24)
    assert default_exits(30) == (7, 15, 22)
    assert default_exits(2) == (1,)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--exits", "1,4"], "the model has 4 layers"),
        (["--exit-vocab", "321"], "320 tokens"),
        (["--context", "4000"], "2048 positions"),
        (["--model-shape", "huge"], "llama-3-8b"),
        (["--exit-trace", "0.1"], "out of reach"),
        (["--model-shape", "llama-3-8b", "--batch", "999999"], "GiB of memory"),
    ],
)
def test_bad_input_is_one_line_and_status_1(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGS, *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("offramp bench engine: ")
    assert captured.err.count("\n") == 1
    assert told in captured.err


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match="use --device cpu"):
        options("--device", "cuda")


def test_memory_is_counted_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the 8B shape in bf16, K,V of 128 sequences, fills and heads of three exits."""
    words = ["--model-shape", "llama-3-8b", "--dtype", "bf16", "--context", "512"]
    large = options(*words, "--batch", "128", "--tokens", "64")
    weights, pages = 2 * 8.03e9, 128 * 19 * 32 * 2 * 32 * 1024 * 2
    assert 1.0 < options_of.needed_bytes(large) / (weights + pages) < 1.15


def costs_of(segments: list[float], leaving: list[float]) -> CostModel:
    """Segments, and leaving after each but the last, that take the same for any rows."""
    costs = CostModel.of(len(segments))
    costs.segments = [StepCost.of({1: seconds}) for seconds in segments]
    costs.checks = [StepCost.of({1: seconds}) for seconds in (*leaving, 0.0)]
    return costs


def test_a_curve_is_linear_between_what_was_measured() -> None:
    curve = StepCost.of({1: 1.0, 8: 1.7, 32: 6.5})
    assert [curve.at(rows) for rows in (0, 1, 2, 8, 20, 32, 64)] == pytest.approx(
        [0, 1, 1.1, 1.7, 4.1, 6.5, 12.9]
    )


def test_simulation_without_holds_by_hand() -> None:
    """Both sequences pass at every pass; the upper segment runs where one of them goes up."""
    draws = [[0, 0], [0, 1], [1, 1]]
    costs = costs_of([2.0, 3.0], [0.5])
    tokens, seconds = simulate(draws, costs, [(0, 0), (0, 0)], 0, 3)
    assert tokens == 6
    # First segment and leaving; first, leaving and above; first and above.
    assert seconds == pytest.approx(2.5 + 5.5 + 5.0)
    behind = simulate(draws, costs, [(0, 0), (0, 0)], 2, 1)
    assert behind == pytest.approx((2, 5.0))


def test_simulation_with_holds_by_hand() -> None:
    """Sequence 1 goes up and waits for others while sequence 0 leaves at the first segment."""
    draws = [[0, 1], [0, 1], [1, 1]]
    costs = costs_of([2.0, 3.0], [0.0])
    holds = [(0.0, 0.0), (1.5, 5.0)]
    # Pass 1: sequence 0 leaves, sequence 1 alone is less than 1.5 of one ready. Pass 2 the same.
    # Pass 3: sequence 0 goes up too, none is ready, both reach the top.
    found = simulate(draws, costs, holds, 0, 3)
    assert found == pytest.approx((4, 2 + 2 + 2 + 3))
    # With patience for one pass it goes alone in the second.
    found = simulate(draws, costs, [(0.0, 0.0), (1.5, 1.0)], 0, 2)
    assert found == pytest.approx((3, 2 + 2 + 3))


@pytest.mark.parametrize(
    "holds",
    [
        [(0.0, 0.0)] * 4,
        [(0.0, 0.0), (0.75, 4.0), (0.5, 3.0), (0.25, 2.0)],
        [(0.0, 0.0), (2.0, 2.0), (2.0, 2.0), (2.0, 2.0)],
    ],
)
def test_the_simulated_policy_is_the_loops(holds: list[tuple[float, float]]) -> None:
    """Pass by pass as many tokens."""
    own = options("--batch", "6", "--exit-trace", "1:0.3,2:0.3,3:0.2,4:0.2")
    model = RandomModel(own)
    draws = own.trace.draw(own.tokens, 6, 1)
    found = decode.decode(Mode("exits", model.exits, draws, thresholds(draws, 3), holds), own, 6)
    costs = costs_of([1.0] * 4, [0.0] * 3)
    assert simulate(draws.tolist(), costs, holds, WARM_UP, own.tokens)[0] == found.tokens
    assert found.tokens == 6 * own.tokens or holds[1] != (0.0, 0.0)


def test_a_token_that_leaves_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = options("--batch", "2")
    model = RandomModel(own)
    draws = own.trace.draw(own.tokens, 2, 0)
    wrong = thresholds(torch.full_like(draws, 1), 3)
    with pytest.raises(Refused, match="was to take"):
        decode.decode(Mode("exits", model.exits, draws, wrong, [(0.0, 0.0)] * 4), own, 2)


class FakeEvent:
    """An event of a device that is done at once."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: FakeEvent) -> float:
        assert 0 < self.at <= other.at
        return 1000 * (other.at - self.at)


def test_where_there_are_events_they_tell_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU adds to a run, with a GPU that is none."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    own = options("--batch", "2")
    model = RandomModel(own)
    draws = own.trace.draw(own.tokens, 2, 0)
    gpu = replace(own, device=torch.device("cuda"))
    found = decode.decode(
        Mode("exits", model.exits, draws, thresholds(draws, 3), [(0.0, 0.0)] * 4), gpu, 2
    )
    assert found.idle is not None
    assert 0 < found.idle < 1
    prepared: list[str] = []
    taken = seconds_of(
        gpu.device, lambda: prepared.append("run"), lambda: prepared.append("before")
    )
    assert taken >= 0
    assert prepared == ["before", "run"] * (len(prepared) // 2)


@pytest.mark.skipif(triton is None, reason="no triton")
def test_checked_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short check, on a GPU if there is one, else with every kernel interpreted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(check, "_SEQS", 2)
    monkeypatch.setattr(check, "_TOKENS", 2)
    with rehearsal():
        assert check.check_loop(device, 0)["equal"] is True


def test_a_run_reports_speed_depth_and_bounds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Tables, and one line of JSON last."""
    picture = tmp_path / "tables.md"
    assert main([*ARGS, "--markdown", str(picture)]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    modes = ("full", "exits-closed", "exits", "exits-no-hold")
    rows = {(row["mode"], row["batch"]): row for row in document["rows"]}
    assert set(rows) == {(mode, batch) for mode in modes for batch in (1, 4)}
    for (mode, batch), row in rows.items():
        whole = mode in {"full", "exits-closed"}
        assert row["mean_depth"] == (4 if whole else pytest.approx(2.4, abs=0.2))
        assert row["layers_executed"] <= 4 * 2 * 16 * batch
        assert row["tokens_per_pass"] == batch or mode == "exits"
        assert row["tokens_per_s"] > 0
        assert row["gpu_idle_share"] is None
        assert ("best_speed_up" in row) == (not whole)
        assert (row.get("exit_efficiency") is None) == whole
    check_parts(document)
    assert picture.read_text(encoding="utf-8") in out
    assert "| exits-no-hold |" in out
    assert "maximum entropy" in out


def check_parts(document: dict[str, Any]) -> None:
    """Everything beside the rows."""
    assert document["trace"]["mean_depth"] == pytest.approx(2.4)
    assert document["trace"]["depths"] == [1, 2, 3, 4]
    assert document["check"]["equal"] is True
    assert document["check"]["depths"] == [1, 2, 3, 4]
    parts = [(s["mode"], s["batch"], s["segment"]) for s in document["segments"]]
    closed = [("exits-closed", batch, segment) for batch in (1, 4) for segment in range(4)]
    assert parts == [("full", 1, 0), ("full", 4, 0), *closed]
    assert [row["batch"] for row in document["bounds"]["rows"]] == [1, 4]
    weights = 4 * (4 * (128 * 64 + 64 * 64 + 3 * 128 * 64) + 320 * 64)
    assert document["bounds"]["weight_bytes"] == weights
    # Contexts of 40 tokens, the warm-up and half of the measured passes; K and V of 2 x 16.
    read = weights + 4 * (40 + WARM_UP + 8) * 2 * 4 * 32 * 4
    assert document["bounds"]["rows"][1]["pass_mb"] == pytest.approx(read / 1e6, abs=1e-3)


def test_without_holds_there_is_one_mode_less(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--hold", "off", "--batch", "3", "--rounds", "1", "--exit-vocab", "64"]
    assert main([*ARGS, *words, "--exits", "2", "--exit-trace", "2:0.5,4:0.5"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["mode"] for row in document["rows"]] == ["full", "exits-closed", "exits"]
    assert document["rows"][-1]["mean_depth"] == pytest.approx(3.0, abs=0.2)
    assert document["rows"][-1]["tokens_per_pass"] == 3


def test_for_throughput_rows_are_held_as_the_server_would(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments said to cost the same for all active rows: then a few deep tokens wait."""
    monkeypatch.setattr(BatchDelay, "choose", lambda *_: [(0.0, 0.0), (0.9, 2.0)])
    words = ["--hold", "throughput", "--batch", "4", "--rounds", "1", "--exits", "2"]
    assert main([*ARGS, *words, "--exit-trace", "2:0.7,4:0.3"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["mode"]: row for row in document["rows"]}
    assert rows["exits"]["tokens_per_pass"] < rows["exits-no-hold"]["tokens_per_pass"] == 4


def test_a_loop_that_is_wrong_has_no_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_loop = check._by_loop

    def off_by_one(*args: Any) -> list[list[DeviceToken]]:
        made = by_loop(*args)
        made[2][5] = replace(made[2][5], token=made[2][5].token + 1)
        return made

    monkeypatch.setattr(check, "_by_loop", off_by_one)
    assert main(ARGS) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        "refused: the decode loop differs from single steps in sequence 2, token 5" in captured.err
    )


def test_passes_that_leave_elsewhere_have_no_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise Refused("elsewhere")

    monkeypatch.setattr(decode, "_verify", refuse)
    assert main(ARGS) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "refused: elsewhere" in captured.err


def test_on_paper_one_stream_saves_all_it_skips_and_a_batch_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Layers of 2 bytes a weight and nothing else: the head is small, K,V are one token's."""
    words = ["engine", "--model-shape", "llama-3-8b", "--device", "cpu", "--dtype", "bf16"]
    words += ["--batch", "1,16", "--context", "1", "--exit-trace", "16:0.8,32:0.2", "--exits", "16"]
    assert main([*words, "--on-paper", "4.8e12", "--tokens", "60"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    alone, many = document["rows"]
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14_336)
    weights = 2 * (32 * layer + 128_256 * 4096)
    assert alone["full_tokens_per_s"] == pytest.approx(4.8e12 / weights, rel=1e-3)
    head = 128_256 * 4096 / layer
    spent = 16 + 0.2 * (16 + head)
    assert alone["free_speed_up"] == pytest.approx((32 + head) / spent, rel=0.02)
    assert many["free_speed_up"] < 1.1 < many["limit_speed_up"] < 1.4


def test_a_rate_on_paper_is_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["engine", "--on-paper", "0"])
    assert "must be positive" in capsys.readouterr().err
