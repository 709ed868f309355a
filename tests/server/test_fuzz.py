"""Bodies that nobody should send: whatever comes, no fault of the server and the right envelope.

FUZZ_BODIES is how many are sent to each route; `make fuzz` sends more than ten thousand in all.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.models.shapes import write_tiny
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from tests.server.bodies import GOOD, bodies, check
from tests.server.deciding import Recorder, serve
from tests.server.fakes import MODEL, PATIENCE_S, Running

BODIES = int(os.environ.get("FUZZ_BODIES", "60"))


class Attacked:
    """A server on a loop of its own, which runs while something is asked."""

    def __init__(self, runner: asyncio.Runner, server: Running) -> None:
        self._runner = runner
        self._client = httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S)
        app = runner.run(self._client.get("/openapi.json")).json()
        schemas = app["components"]["schemas"].values()
        self.properties = sorted({name for each in schemas for name in each.get("properties", ())})
        self.routes = {path for path, own in app["paths"].items() if "post" in own}

    def post(self, path: str, body: bytes, kind: str) -> httpx2.Response:
        headers = {"Content-Type": kind}
        return self._runner.run(self._client.post(path, content=body, headers=headers))

    def close(self) -> None:
        self._runner.run(self._client.aclose())


class Everything(Recorder):
    """Takes every kind of request."""

    def add(self, request: Any, submitted_at: float) -> None:
        self.engine.add(request, submitted_at)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    config = EngineConfig(device="cpu", exits="shared:2", max_num_seqs=8, kv_cache_memory=0.05)
    folder = write_tiny(tmp_path_factory.mktemp("tiny"))
    engine = build_engine(config, folder, model_name=MODEL)
    running = serve(Everything(engine))
    with asyncio.Runner() as runner:
        made = Attacked(runner, runner.run(running.__aenter__()))
        try:
            yield made
        finally:
            made.close()
            runner.run(running.__aexit__(None, None, None))
    assert engine.memory.blocks.num_used == 0


@pytest.mark.parametrize("path", GOOD)
def test_no_body_is_a_fault_of_the_server(
    path: str, attacked: Attacked, caplog: pytest.LogCaptureFixture
) -> None:
    taken = attacked.post(path, json.dumps(GOOD[path]).encode(), "application/json")
    assert taken.status_code == 200, taken.text

    @settings(
        max_examples=BODIES,
        deadline=None,
        derandomize="FUZZ_BODIES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        body=bodies(path, attacked.properties),
        kind=st.sampled_from(("application/json",) * 8 + ("text/plain", "", "multipart/form-data")),
    )
    def attack(body: bytes, kind: str) -> None:
        check(path, attacked.post(path, body, kind))

    attack()
    loud = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert not loud, [each.getMessage() for each in loud]


def test_every_route_that_takes_a_body_is_attacked(attacked: Attacked) -> None:
    assert attacked.routes == set(GOOD)
