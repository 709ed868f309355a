"""Requests as /metrics counts them: routes, refusals, and nothing of what clients send."""

from __future__ import annotations

import asyncio

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from tests.server.fakes import PATIENCE_S, FakeEngine, Running, serving

WHO = {"model_name": "fake", "engine": "0"}


async def scrape(server: Running) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        text = (await client.get("/metrics")).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_requests_are_counted_by_route() -> None:
    async with serving() as server:
        async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
            body = {"prompt": "a", "max_tokens": 3, "stream": True}
            answer = await client.post("/v1/completions", json=body)
            await client.head("/v1/models/fake")
            await client.get("/v1/models/another")
            await client.get("/a/path/of/mine")
            await client.request("PROPFIND", "/v1/models")
            await client.get("/health")
        found = await scrape(server)
    requests = {
        tuple(dict(labels)[name] for name in ("method", "handler", "status")): count
        for (name, labels), count in found.items()
        if name == "http_requests_total"
    }
    assert requests == {
        ("POST", "/v1/completions", "2xx"): 1,
        ("GET", "/v1/models/{model_id:path}", "2xx"): 1,
        ("GET", "/v1/models/{model_id:path}", "4xx"): 1,
        ("GET", "none", "4xx"): 1,
        ("other", "/v1/models", "4xx"): 1,
    }
    route = frozenset({("handler", "/v1/completions")})
    assert found["http_response_size_bytes_sum", route] == len(answer.content)
    assert found["http_request_size_bytes_sum", route] == len(answer.request.content)
    assert found["http_request_duration_highr_seconds_count", frozenset()] == 5


async def refusals(server: Running) -> dict[str, float]:
    return {
        dict(labels)["code"]: count
        for (name, labels), count in (await scrape(server)).items()
        if name == "offramp:requests_refused_total" and count
    }


async def test_refusals_are_counted_by_code() -> None:
    async with serving(api_key=("secret",)) as server:
        async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
            await client.post("/v1/completions", json={"prompt": "a"})
            client.headers["authorization"] = "Bearer secret"
            await client.post("/v1/completions", json={"prompt": "a", "temperature": "hot"})
            await client.post("/v1/completions", json={"prompt": "a", "model": "another"})
            await client.post("/v1/completions", json={"prompt": "a" * 5000})
            await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        reader, writer = await asyncio.open_connection(
            *server.url.removeprefix("http://").split(":")
        )
        writer.write(b"no http at all\r\n\r\n")
        await reader.read()
        writer.close()
        assert await refusals(server) == {
            "invalid_api_key": 1,
            "invalid_type": 1,
            "model_not_found": 1,
            "context_length_exceeded": 1,
            "invalid_http": 1,
        }


async def test_a_full_queue_is_counted_as_vllm_does() -> None:
    body = {"prompt": "a", "n": 4}
    async with (
        serving(FakeEngine(permits=0), max_num_queued_reqs=0) as server,
        httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client,
    ):
        waiting = asyncio.create_task(client.post("/v1/completions", json=body))
        await server.engine.arrivals(4)
        assert (await client.post("/v1/completions", json=body)).status_code == 429
        found = await scrape(server)
        waiting.cancel()
    name, labels = "vllm:admission_rejections_total", {"model_name": "fake"}
    by_reason = {
        reason: found[name, frozenset({**labels, "reason": reason}.items())]
        for reason in ("max_num_queued_reqs", "max_num_queued_tokens")
    }
    assert by_reason == {"max_num_queued_reqs": 1, "max_num_queued_tokens": 0}
    assert found["offramp:requests_in_flight", frozenset(WHO.items())] == 1
    states = {
        dict(own)["state"]
        for (name, own), is_now in found.items()
        if name == "offramp:engine_state" and is_now
    }
    assert states == {"ready"}


async def test_a_fault_is_no_refusal() -> None:
    async with serving(FakeEngine(fail_at=0)) as server:
        async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
            answer = await client.post("/v1/completions", json={"prompt": "a"})
            assert answer.status_code == 500
        found = await scrape(server)
        assert await refusals(server) == {}
    ended = frozenset({**WHO, "finished_reason": "error"}.items())
    assert found["vllm:request_success_total", ended] == 1
