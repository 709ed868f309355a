"""Spans of requests at a collector, and that nothing waits for one."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.server.fakes import PATIENCE_S, FakeEngine, serving
from tests.server.process import running

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes spans over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.service = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest()
                request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
                for resource in request.resource_spans:
                    outer.service = _attributes(resource.resource)["service.name"]
                    for scope in resource.scope_spans:
                        outer.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1/traces"


def _attributes(holder: Any) -> dict[str, Any]:
    found = {}
    for pair in holder.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        if kind == "array_value":
            value = [each.string_value for each in value.values]
        found[pair.key] = value
    return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    thread = threading.Thread(target=found.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.http.shutdown()
    thread.join()
    found.http.server_close()


QUESTION = {"type": "predicate", "instructions": "It is so."}


def test_each_request_has_a_span(collector: Collector) -> None:
    with running("tiny", "--otlp-traces-endpoint", collector.url, "--exits", "shared:2") as process:
        parent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        with httpx2.Client(base_url=process.address(), timeout=PATIENCE_S) as client:
            chat = {
                "messages": [{"role": "user", "content": "x"}],
                "max_tokens": 5,
                "ignore_eos": True,
                "temperature": 0.5,
                "stream": True,
                "early_exit": {"criterion": "max_prob", "threshold": 0, "when": "always"},
            }
            client.post("/v1/chat/completions", json=chat, headers=parent)
            plain = {"prompt": "a", "n": 2, "max_tokens": 3}
            client.post("/v1/completions", json=plain, headers={"traceparent": "no such thing"})
            client.post("/v1/embeddings", json={"input": "a"})
            client.post("/v1/decisions", json={"input": "a", "questions": [QUESTION]})
            client.post("/v1/completions", json={"prompt": "a", "model": "another"})
            client.post("/v1/completions", json=plain, headers={"traceparent": _unsampled()})
            client.post("/v1/anything", json={})
            client.get("/v1/models")
        process.signal(signal.SIGTERM)
        assert process.status() == 0
    assert collector.service == "offramp"
    assert [span.name for span in collector.spans] == [
        "chat tiny",
        "text_completion tiny",
        "embeddings tiny",
        "decisions tiny",
        "text_completion",
    ]
    first, second, embedded, decided, refused = collector.spans
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert first.kind == Span.SPAN_KIND_SERVER
    assert second.parent_span_id == b""
    found = _attributes(first)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.id": "mine",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.completion_tokens": 5,
        "http.response.status_code": 200,
        "offramp.early_exit.mode": "adaptive",
        "offramp.early_exit.layers_total": 4,
    }
    assert {name: found[name] for name in expected} == expected
    assert 2 <= found["offramp.early_exit.mean_exit_layer"] < 4
    assert found["gen_ai.usage.input_tokens"] == found["gen_ai.usage.prompt_tokens"] > 0
    parts = [f"gen_ai.latency.{name}" for name in ("time_in_queue", "time_in_model_prefill")]
    assert min(found[part] for part in parts) >= 0
    assert sum(found[part] for part in parts) == pytest.approx(
        found["gen_ai.latency.time_to_first_token"]
    )
    assert found["gen_ai.latency.e2e"] >= found["gen_ai.latency.time_to_first_token"]
    assert _attributes(second)["gen_ai.usage.num_sequences"] == 2
    assert _attributes(embedded)["gen_ai.usage.input_tokens"] == 1
    assert _attributes(decided)["offramp.early_exit.mean_exit_layer"] == 4
    assert _attributes(refused)["error.type"] == "model_not_found"
    assert refused.status.code == Status.STATUS_CODE_UNSET


def _unsampled() -> str:
    """The client's trace is not kept, so neither are its spans here."""
    return f"00-{TRACE}-{PARENT}-00"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_is_told(collector: Collector, *, stream: bool) -> None:
    body = {"prompt": "a", "stream": stream}
    async with serving(FakeEngine(fail_at=2), otlp_traces_endpoint=collector.url) as server:
        async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
            answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == (200 if stream else 500)
        assert server.context.tracing is not None
        await server.context.tracing.flush()
    (span,) = collector.spans
    assert _attributes(span)["error.type"] == "ServerError"
    assert _attributes(span)["gen_ai.usage.output_tokens"] == 2
    assert span.status.code == Status.STATUS_CODE_ERROR


async def test_a_client_that_leaves_ends_its_span(collector: Collector) -> None:
    body = {"prompt": "a", "stream": True}
    async with serving(FakeEngine(permits=1), otlp_traces_endpoint=collector.url) as server:
        async with (
            httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            await anext(answer.aiter_lines())
        async with asyncio.timeout(PATIENCE_S):
            while server.context.in_flight:  # noqa: ASYNC110 (a number, that nothing announces)
                await asyncio.sleep(0.01)
        assert server.context.tracing is not None
        await server.context.tracing.flush()
    (span,) = collector.spans
    assert _attributes(span)["gen_ai.response.finish_reasons"] == ["abort"]


def test_a_dead_collector_costs_no_request() -> None:
    collector = Collector()
    collector.http.server_close()
    with running("tiny", "--otlp-traces-endpoint", collector.url) as process:
        with httpx2.Client(base_url=process.address(), timeout=PATIENCE_S) as client:
            for _ in range(20):
                answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
                assert answer.status_code == 200
        process.signal(signal.SIGTERM)
        assert process.status() == 0
    assert "opentelemetry" in process.log


def test_without_the_extra_the_start_is_refused_in_one_line() -> None:
    code = """
import sys
sys.modules["opentelemetry.sdk"] = None
from offramp.server.cli import main
sys.exit(main(sys.argv[1:]))
"""
    with running("tiny", "--otlp-traces-endpoint", "http://127.0.0.1:1/", code=code) as process:
        assert process.status() == 1
    (line,) = process.log.splitlines()
    assert "pip install 'offramp[otel]'" in line


def test_an_address_of_another_kind_is_refused() -> None:
    with running("tiny", "--otlp-traces-endpoint", "localhost:4317") as process:
        assert process.status() == 1
    (line,) = process.log.splitlines()
    assert "--otlp-traces-endpoint localhost:4317" in line


def test_without_an_address_nothing_of_it_is_imported() -> None:
    code = """
import sys
sys.modules["opentelemetry.sdk"] = sys.modules["opentelemetry.exporter"] = None
from offramp.server.cli import main
sys.exit(main(sys.argv[1:]))
"""
    with running("tiny", code=code) as process:
        answer = httpx2.post(f"{process.address()}/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 200
