"""The process: port, loading, signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from offramp.server import serve
from offramp.server.config import EngineConfig, ServerConfig
from offramp.server.engine import build
from offramp.server.serve import Service, bind
from offramp.server.text.tokenizer import Tokenizer
from tests.server.fakes import PATIENCE_S, FakeEngine, byte_backend, render
from tests.server.process import running

BODY = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "ignore_eos": True}


def test_a_taken_port_is_named_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert serve.run(ServerConfig(port=port)) == 1
    assert f"port {port} on 127.0.0.1 is in use" in capsys.readouterr().err


def test_an_unknown_host_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.run(ServerConfig(host="256.256.256.256")) == 1
    assert "256.256.256.256" in capsys.readouterr().err


def test_sigterm_lets_streams_end_and_exits_with_0() -> None:
    with running() as process:
        path = f"{process.address()}/v1/chat/completions"
        body = {**BODY, "max_tokens": 100}
        with httpx2.stream("POST", path, json=body, timeout=PATIENCE_S) as response:
            lines = (line for line in response.iter_lines() if line)
            first = next(lines)
            process.signal(signal.SIGTERM)
            rest = list(lines)
        assert process.status() == 0
    assert rest[-1] == "data: [DONE]"
    tokens = [json.loads(line.removeprefix("data: ")) for line in (first, *rest[:-1])]
    assert tokens[-1]["choices"][0]["finish_reason"] == "length"


def test_a_signal_while_the_model_loads_ends_the_process() -> None:
    with running() as process:
        url = process.expect(r"listening on (\S+)")[1]
        assert httpx2.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
        process.signal(signal.SIGTERM)
        assert process.status() == 0
    assert "ready on" not in process.log


def test_a_second_signal_ends_at_once() -> None:
    with running() as process:
        path = f"{process.address()}/v1/chat/completions"
        body = {**BODY, "max_tokens": 1900}
        with httpx2.stream("POST", path, json=body, timeout=PATIENCE_S) as response:
            next(response.iter_lines())
            process.signal(signal.SIGTERM)
            process.expect("stopping")
            process.signal(signal.SIGTERM)
            assert process.status() == 128 + signal.SIGTERM


def test_a_model_that_cannot_be_loaded_is_one_line_and_status_1() -> None:
    with running("tiny", "--max-model-len", "1000000") as process:
        assert process.status() == 1
    (line,) = [line for line in process.log.splitlines() if "cannot load tiny" in line]
    assert "1000000" in line


def test_exits_that_cannot_be_used_are_told_without_a_traceback() -> None:
    with running("tiny", "--exits", "/nowhere/exits.safetensors") as process:
        assert process.status() == 1
    assert "Traceback" not in process.log
    assert "cannot load tiny: --exits /nowhere/exits.safetensors: no such file" in process.log


def test_a_criterion_without_calibration_is_refused_at_start() -> None:
    options = ("--exits", "shared:2", "--exit-criterion", "entropy")
    with running("tiny", *options) as process:
        assert process.status() == 1
    assert "--exit-criterion entropy has no calibrated thresholds" in process.log
    assert "Traceback" not in process.log


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Service, str, threading.Event]]:
    """A service whose model loads when the event is set."""
    may_load = threading.Event()

    def build(*_: object) -> FakeEngine:
        assert may_load.wait(PATIENCE_S)
        return FakeEngine()

    monkeypatch.setattr(serve, "load_engine", build)
    monkeypatch.setattr(Service, "_resolve", lambda _: Path())

    def load(_: Path, **options: Any) -> Tokenizer:
        return Tokenizer(byte_backend(), render, **options)

    monkeypatch.setattr(Tokenizer, "load", load)
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = ServerConfig(port=0, engine=EngineConfig(model="fake"), engine_worker="thread")
    yield Service(config, listener), url, may_load
    may_load.set()
    listener.close()


async def test_the_port_answers_while_the_model_loads(
    service: tuple[Service, str, threading.Event],
) -> None:
    starting, url, may_load = service
    task = asyncio.create_task(starting.run())
    async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/metrics")).status_code == 200
        response = await client.post("/v1/completions", json={"prompt": "a"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "loading"
        assert "retry-after" in response.headers
        assert (await client.get("/v1/models")).status_code == 503
        may_load.set()
        await starting._driver.ready()
        assert (await client.get("/ready")).status_code == 200
        response = await client.post("/v1/completions", json={"prompt": "a"})
        assert response.status_code == 200
    starting._on_signal(signal.SIGTERM)
    assert await asyncio.wait_for(task, PATIENCE_S) == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no memory\nfor 10 bytes")])
def test_whatever_fails_while_loading_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(build, "build_engine", fail)
    monkeypatch.setattr(Service, "_resolve", lambda _: Path())
    monkeypatch.setattr(Tokenizer, "load", lambda *_, **__: Tokenizer(byte_backend(), render))
    with bind("127.0.0.1", 0) as listener:
        config = ServerConfig(port=0, engine=EngineConfig(model="fake"), engine_worker="thread")
        service = Service(config, listener)
        assert asyncio.run(service.run()) == 1
    (record,) = [each for each in caplog.records if each.levelname == "ERROR"]
    assert "cannot load fake: " in record.getMessage()
    assert type(error).__name__ in record.getMessage()
    assert "\n" not in record.getMessage()
    assert record.exc_info is None


@pytest.mark.parametrize("hangs", [False, True])
def test_a_server_whose_engine_is_gone_ends(*, hangs: bool) -> None:
    """So that whoever supervises it starts another; open requests are told first."""
    code = f"""
import sys, time
from offramp.server import serve
from offramp.server.config import EngineConfig, ServerConfig
from offramp.server.serve import Service
from offramp.server.text.tokenizer import Tokenizer
from tests.server.fakes import FakeEngine, byte_backend, render

class Engine(FakeEngine):
    def step(self):
        if self.has_work and {hangs}:
            time.sleep(1e6)
        return super().step()

serve.load_engine = lambda *_: Engine(fail_at=0)
Service._resolve = lambda self: None
Tokenizer.load = lambda folder, **options: Tokenizer(byte_backend(), render, **options)
engine = EngineConfig(model="fake", step_timeout=0.5, engine_restarts=0)
sys.exit(serve.run(ServerConfig(port=0, engine=engine, engine_worker="thread")))
"""
    with running(code=code) as process:
        url = process.address()
        body = {"prompt": "a", "max_tokens": 5}
        response = httpx2.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert process.status() == 1
    assert "the engine is gone" in process.log


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_is_killed_or_stopped_is_replaced(number: signal.Signals) -> None:
    """Its streams end with an error frame, and the next request is answered."""
    with running("tiny", "--step-timeout", "1") as process:
        engine = int(process.expect(r"engine runs in process (\d+)")[1])
        url = process.address()
        path, body = f"{url}/v1/completions", {"prompt": "a", "max_tokens": 1900, **ENDLESS}
        with httpx2.stream("POST", path, json=body, timeout=PATIENCE_S) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            os.kill(engine, number)
            *_, last, done = lines
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
        process.expect("the engine is built anew")
        assert int(process.expect(r"engine runs in process (\d+)")[1]) != engine
        with httpx2.Client(base_url=url, timeout=PATIENCE_S) as client:
            while client.get("/ready").status_code != 200:
                assert client.get("/health").status_code == 200
            answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert answer.json()["usage"]["completion_tokens"] == 2
        process.signal(signal.SIGTERM)
        assert process.status() == 0


ENDLESS = {"stream": True, "ignore_eos": True}

CERTIFICATE = Path(__file__).parents[1] / "data" / "localhost.pem"


def test_https() -> None:
    with running("tiny", "--ssl-certfile", str(CERTIFICATE)) as process:
        url = process.expect(r"ready on (https://\S+)")[1]
        trusted = ssl.create_default_context(cafile=CERTIFICATE)
        with httpx2.Client(verify=trusted, timeout=PATIENCE_S) as client:
            answer = client.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert answer.json()["usage"]["completion_tokens"] == 2
            with client.stream("POST", f"{url}/v1/completions", json=BODY | PROMPT) as response:
                assert "data: [DONE]" in list(response.iter_lines())


PROMPT = {"prompt": "a", "max_tokens": 3}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--ssl-keyfile", "key.pem"), "--ssl-keyfile needs --ssl-certfile"),
        (("--ssl-certfile", "/nowhere/cert.pem"), "No such file"),
        (("--ssl-certfile", __file__), "cannot use --ssl-certfile"),
    ],
)
def test_https_that_cannot_be_is_one_line(options: tuple[str, ...], says: str) -> None:
    with running("tiny", *options) as process:
        assert process.status() == 1
    (line,) = process.log.splitlines()
    assert line.startswith("offramp serve: error: ")
    assert says in line
