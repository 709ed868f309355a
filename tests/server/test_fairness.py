"""What keeps one client from taking all: bounds by key, deadlines, storms of clients that leave."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest

from offramp.models.shapes import write_tiny
from offramp.server.keys import ApiKeyError
from tests.server.deciding import PREDICATE, Recorder, post, serve, tiny_engine
from tests.server.fakes import PATIENCE_S, FakeEngine, Running, config, make_context, serving

MESSAGES = [{"role": "user", "content": "hi"}]
ENDLESS = {"messages": MESSAGES, "ignore_eos": True, "max_tokens": 200}


async def with_key(server: Running, key: str, **body: Any) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        return await client.post("/v1/chat/completions", json=body, headers=headers)


async def test_a_key_has_so_many_requests_at_once() -> None:
    engine = FakeEngine(permits=0)
    options = {"api_key": ("one", "other"), "max_requests_per_key": 2}
    async with serving(engine, **options) as server:
        first = [asyncio.create_task(with_key(server, "one", messages=MESSAGES)) for _ in range(2)]
        await engine.arrivals(2)
        refused = await with_key(server, "one", messages=MESSAGES)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "1"
        # Others have their own share, and what asks nothing of the model has none.
        other = asyncio.create_task(with_key(server, "other", messages=MESSAGES))
        await engine.arrivals(1)
        async with httpx2.AsyncClient(base_url=server.url) as client:
            models = await client.get("/v1/models", headers={"X-Api-Key": "one"})
        assert models.status_code == 200
        engine.release(1000)
        assert [(await each).status_code for each in (*first, other)] == [200] * 3
        assert (await with_key(server, "one", messages=MESSAGES)).status_code == 200


async def test_clients_that_leave_give_their_share_back() -> None:
    engine = FakeEngine(permits=0)
    async with serving(engine, api_key=("one",), max_requests_per_key=1) as server:
        gone = asyncio.create_task(with_key(server, "one", messages=MESSAGES))
        await engine.arrivals(1)
        gone.cancel()
        assert await asyncio.to_thread(engine.abort_seen.wait, PATIENCE_S)
        engine.release(1000)
        await idle(server)
        assert (await with_key(server, "one", messages=MESSAGES)).status_code == 200


def test_a_share_by_key_needs_keys() -> None:
    with pytest.raises(ApiKeyError, match="--max-requests-per-key needs"):
        make_context(FakeEngine(), config(max_requests_per_key=3))
    make_context(FakeEngine(), config(max_requests_per_key=3, api_key=("one",)))


LATE = {"type": "timeout_error", "code": "deadline_exceeded", "param": None}


@pytest.mark.parametrize(
    ("options", "own"),
    [({"request_timeout": 0.05}, {}), ({"request_timeout": 9}, {"timeout": 0.05})],
)
async def test_an_answer_that_takes_too_long_ends(
    options: dict[str, Any], own: dict[str, Any]
) -> None:
    engine = FakeEngine(permits=1)
    async with serving(engine, **options) as server:
        late = await post(server, "/v1/chat/completions", messages=MESSAGES, **own)
        assert late.status_code == 504
        assert late.headers["x-should-retry"] == "false"
        error = late.json()["error"]
        assert {name: error[name] for name in LATE} == LATE
        assert "0.05 s" in error["message"]
        stream = await post(server, "/v1/chat/completions", messages=MESSAGES, stream=True, **own)
        assert stream.status_code == 200
        assert '"deadline_exceeded"' in stream.text
        assert stream.text.endswith("data: [DONE]\n\n")
        anthropic = await post(
            server, "/v1/messages", model="fake", max_tokens=9, messages=MESSAGES, **own
        )
        assert anthropic.status_code == 504
        assert anthropic.json()["error"]["type"] == "timeout_error"
        responses = await post(server, "/v1/responses", input="hi", **own)
        assert responses.status_code == 504
        # All of them left the engine.
        assert server.context.driver.num_requests == 0
        engine.release(1000)
        if own:
            answer = await post(server, "/v1/chat/completions", messages=MESSAGES, timeout=8)
            assert answer.status_code == 200


@pytest.mark.parametrize("wrong", [0, -1, "soon", 1e9])
async def test_a_timeout_that_is_none(wrong: Any) -> None:
    async with serving() as server:
        refused = await post(server, "/v1/chat/completions", messages=MESSAGES, timeout=wrong)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "timeout"


@pytest.fixture
def tiny(tmp_path: Path) -> Recorder:
    return tiny_engine(write_tiny(tmp_path))


class Plain(Recorder):
    """Takes every kind of request."""

    def add(self, request: Any, submitted_at: float) -> None:
        self.engine.add(request, submitted_at)


async def idle(server: Running) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while server.context.in_flight or server.engine.has_work:  # noqa: ASYNC110 (no event)
            await asyncio.sleep(0.01)


async def test_decisions_have_a_deadline(tiny: Recorder) -> None:
    async with serve(Plain(tiny.engine), request_timeout=1e-6) as server:
        late = await post(server, "/v1/decisions", input="A cat.", questions=[PREDICATE])
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "deadline_exceeded"
        await idle(server)
    assert tiny.engine.memory.blocks.num_used == 0


async def test_a_storm_of_clients_that_leave(tiny: Recorder) -> None:
    """As clients with a short time-out do: two hundred at once, then one that waits."""
    async with serve(Plain(tiny.engine)) as server:
        limits = httpx2.Limits(max_connections=200)
        async with httpx2.AsyncClient(
            base_url=server.url, timeout=httpx2.Timeout(PATIENCE_S, read=0.5), limits=limits
        ) as client:

            async def ask(number: int) -> int | None:
                body = {**ENDLESS, "stream": number % 2 == 1}
                try:
                    return (await client.post("/v1/chat/completions", json=body)).status_code
                except httpx2.TimeoutException:
                    return None

            seen = set(await asyncio.gather(*map(ask, range(200))))
        assert None in seen
        assert seen <= {None, 200, 429}
        answer = await post(server, "/v1/chat/completions", messages=MESSAGES, max_tokens=4)
        assert answer.status_code == 200
        await idle(server)
        assert server.context.in_flight == 0
    # Blocks of the prompt that others may find again are not in use.
    assert tiny.engine.memory.blocks.num_used == 0
    assert tiny.engine.memory.rows.num_free == tiny.engine.memory.rows.num_rows
