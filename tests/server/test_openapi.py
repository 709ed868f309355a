"""What /openapi.json promises, and that answers keep it."""

from __future__ import annotations

import re
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel

from offramp.server.api.openapi import AnthropicError, ErrorEnvelope
from offramp.server.app import create_app
from tests.server.fakes import MODEL, PATIENCE_S, FakeEngine, config, make_context, serving

MESSAGES = [{"role": "user", "content": "hi"}]
OPEN = {"/health", "/ready", "/load", "/version", "/metrics"}


def described(**options: object) -> dict[str, Any]:
    return create_app(make_context(FakeEngine(), config(**options))).openapi()


def operations(schema: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method, path, operation)
        for path, own in schema["paths"].items()
        for method, operation in own.items()
    ]


def error_form(path: str) -> type[BaseModel]:
    return AnthropicError if path.startswith("/v1/messages") else ErrorEnvelope


def test_every_route_says_what_it_takes_and_how_it_ends() -> None:
    schema = described()
    found = operations(schema)
    assert len(found) >= 15
    for method, path, operation in found:
        assert operation["summary"], path
        statuses = set(operation["responses"])
        assert "200" in statuses, path
        assert "422" not in statuses, path
        assert ("requestBody" in operation) == (method == "post"), path
        if method == "post":
            body = operation["requestBody"]["content"]["application/json"]["schema"]
            assert body["$ref"].split("/")[-1] in schema["components"]["schemas"], path
            assert {"400", "404", "413", "500", "503"} <= statuses, path
        for status in statuses - {"200"}:
            content = operation["responses"][status]["content"]["application/json"]["schema"]
            name = "Status" if path in OPEN else error_form(path).__name__
            assert content == {"$ref": f"#/components/schemas/{name}"}, (path, status)
    assert "HTTPValidationError" not in schema["components"]["schemas"]


def test_references_lead_somewhere() -> None:
    schema = described()
    names = set(re.findall(r"#/components/schemas/(\w+)", str(schema)))
    assert names == set(schema["components"]["schemas"])


def test_a_missing_key_is_an_answer_where_keys_are_asked_for() -> None:
    for keys in ((), ("one",)):
        for _, path, operation in operations(described(api_key=keys)):
            asks = bool(keys) and path not in OPEN
            assert ("401" in operation["responses"]) == asks, path


def test_full_queues_are_named_where_the_model_runs() -> None:
    full = {path for _, path, each in operations(described()) if "429" in each["responses"]}
    assert full == {path for path in described()["paths"] if path.startswith("/v1/")} - {
        "/v1/models",
        "/v1/models/{model_id}",
    }


@pytest.mark.parametrize("name", ["EmbeddingBody.input", "CompletionBody.prompt"])
def test_all_forms_of_a_prompt_are_described(name: str) -> None:
    kind, field = name.split(".")
    forms = described()["components"]["schemas"][kind]["properties"][field]
    assert not {"minLength", "maxLength"} & forms.keys()
    assert [each.get("items", each)["type"] for each in forms["anyOf"]] == [
        *("string", "string", "integer", "array"),
    ]


@pytest.mark.parametrize(
    "name", ["ResponseBody.input", "_MessageItem.content", "_Message.content", "CountBody.system"]
)
def test_conversations_may_be_texts_alone(name: str) -> None:
    kind, field = name.split(".")
    forms = described()["components"]["schemas"][kind]["properties"][field]["anyOf"]
    assert [each["type"] for each in forms] == ["string", "array"]


CASES: list[tuple[str, str, Any]] = [
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("GET", "/load", None),
    ("GET", "/version", None),
    ("GET", "/metrics", None),
    ("GET", "/tokenizer_info", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/{model_id}", None),
    ("POST", "/tokenize", {"prompt": "a"}),
    ("POST", "/tokenize", {}),
    ("POST", "/detokenize", {"tokens": [1]}),
    ("POST", "/detokenize", {"tokens": [10**6]}),
    ("POST", "/v1/chat/completions", {"messages": MESSAGES}),
    ("POST", "/v1/chat/completions", {"messages": MESSAGES, "stream": True}),
    ("POST", "/v1/chat/completions", {"messages": [], "stream": True}),
    ("POST", "/v1/chat/completions", {"messages": MESSAGES, "model": "other"}),
    ("POST", "/v1/completions", {"prompt": "a", "stream": True}),
    ("POST", "/v1/completions", {"prompt": "a" * 2_000_000}),
    ("POST", "/v1/decisions", {}),
    ("POST", "/v1/systemone", {}),
    ("POST", "/v1/embeddings", {"input": ""}),
    ("POST", "/v1/responses", {"input": "a"}),
    ("POST", "/v1/responses", {"input": "a", "stream": True}),
    ("POST", "/v1/responses", {"input": "a", "model": "other"}),
    ("POST", "/v1/responses/input_tokens", {"input": "a"}),
    ("POST", "/v1/messages", {"messages": MESSAGES, "max_tokens": 1}),
    ("POST", "/v1/messages", {"messages": MESSAGES, "max_tokens": 1, "stream": True}),
    ("POST", "/v1/messages", {"messages": MESSAGES}),
    ("POST", "/v1/messages/count_tokens", {"messages": MESSAGES}),
]


async def test_answers_are_among_those_described() -> None:
    async with (
        serving(max_body_size=1.0) as server,
        httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client,
    ):
        paths = (await client.get("/openapi.json")).json()["paths"]
        seen = set()
        for method, path, body in CASES:
            url = path.replace("{model_id}", MODEL)
            answer = await client.request(method, url, json=body)
            responses = paths[path][method.lower()]["responses"]
            assert str(answer.status_code) in responses, (path, answer.text)
            media_type = answer.headers["content-type"].split(";")[0]
            assert media_type in responses[str(answer.status_code)]["content"], path
            if answer.status_code >= 400:
                error_form(path).model_validate_json(answer.content)
            seen.add(answer.status_code)
    assert seen == {200, 400, 404, 413}
