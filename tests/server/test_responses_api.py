"""POST /v1/responses and the routes beside it, with a scripted engine and the official client."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.server.adapters import (
    CALL,
    EVERYTHING,
    OTHER,
    THOUGHTFUL,
    Scoring,
    events,
    get,
    post,
    prompts,
    roomy,
    speak,
)
from tests.server.fakes import CONTEXT, MODEL, NUM_LAYERS, PATIENCE_S, FakeEngine, Running, serving

PATH = "/v1/responses"
ADD: dict[str, Any] = {
    "type": "function",
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "strict": True,
}
NOW: dict[str, Any] = {"type": "function", "name": "now"}
TOOLS = [ADD, NOW]
NO_STRICT = {"strict": None}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


class Sum(BaseModel):
    """A form that an answer is parsed into."""

    a: int


def uniform(value: Any) -> Any:
    """``value`` without what differs from answer to answer: ids are their prefixes, times are 0."""
    if isinstance(value, list):
        return [uniform(each) for each in value]
    if not isinstance(value, dict):
        return value
    found = {name: uniform(each) for name, each in value.items() if name != "metrics"}
    for name in ("id", "item_id", "call_id"):
        if found.get(name) is not None:
            found[name] = found[name].split("_")[0]
    for name in ("created_at", "completed_at"):
        if found.get(name) is not None:
            found[name] = 0
    return found


async def ask(server: Running, given: Any = "hi", **options: Any) -> dict[str, Any]:
    response = await post(server, PATH, {"input": given, **options})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    Response.model_validate(found)
    return found


async def stream(server: Running, given: Any = "hi", **options: Any) -> list[dict[str, Any]]:
    found = await events(server, PATH, {"input": given, **options})
    for event in found:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def refusal(response: httpx2.Response, status: int = 400) -> tuple[str | None, str | None]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["param"], error["code"]


def resource(**own: Any) -> dict[str, Any]:
    """A response object of a plain request, as `uniform` leaves it."""
    return {
        "id": "resp",
        "object": "response",
        "created_at": 0,
        "completed_at": None,
        "status": "in_progress",
        "model": MODEL,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "background": False,
        "temperature": 1.0,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_logprobs": 0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "truncation": "disabled",
        "usage": None,
        **own,
    }


def used(prompt: str, answer: int, reasoning: int = 0) -> dict[str, Any]:
    return {
        "input_tokens": len(prompt),
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": len(prompt) + answer,
    }


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def message(text: str, status: str = "completed") -> dict[str, Any]:
    content = [text_part(text)]
    own = {"role": "assistant", "content": content}
    return {"id": "msg", "type": "message", "status": status, **own}


def call(name: str, arguments: str, status: str = "completed") -> dict[str, Any]:
    own = {"call_id": "call", "name": name, "arguments": arguments}
    return {"id": "fc", "type": "function_call", "status": status, **own}


def thought(text: str, status: str = "completed") -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    own: dict[str, Any] = {"summary": [], "content": content}
    return {"id": "rs", "type": "reasoning", "status": status, **own}


def told(index: int, item: dict[str, Any], pieces: list[str]) -> list[dict[str, Any]]:
    """The events of one item that grows by ``pieces``."""
    place: dict[str, Any] = {"output_index": index, "item_id": item["id"]}
    bare = {**item, "status": "in_progress"}
    if item["type"] == "function_call":
        kind = "response.function_call_arguments"
        inner = [
            *({"type": f"{kind}.delta", **place, "delta": piece} for piece in pieces),
            {"type": f"{kind}.done", **place} | {k: item[k] for k in ("name", "arguments")},
        ]
        bare["arguments"] = ""
    else:
        place["content_index"] = 0
        (part,) = item["content"]
        logprobs: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
        kind = f"response.{part['type']}"
        inner = [
            {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
            *({"type": f"{kind}.delta", **place, "delta": piece, **logprobs} for piece in pieces),
            {"type": f"{kind}.done", **place, "text": part["text"], **logprobs},
            {"type": "response.content_part.done", **place, "part": part},
        ]
        bare["content"] = []
    return [
        {"type": "response.output_item.added", "output_index": index, "item": bare},
        *inner,
        {"type": "response.output_item.done", "output_index": index, "item": item},
    ]


def transcript(last: str, whole: dict[str, Any], *inner: list[dict[str, Any]]) -> list[Any]:
    """A whole stream: its opening, ``inner`` events, and the end that holds the response."""
    begun = resource(**{name: whole[name] for name in ("tools", "max_output_tokens")})
    found = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        *itertools.chain(*inner),
        {"type": f"response.{last}", "response": whole},
    ]
    return [{**event, "sequence_number": number} for number, event in enumerate(found)]


class TestAnswers:
    async def test_a_text_is_exact(self) -> None:
        before = int(time.time())
        async with serving(FakeEngine("Hi")) as server:
            found = await ask(server)
        assert before <= found["created_at"] <= found["completed_at"] <= time.time()
        assert found["metrics"]["early_exit"]["layers_total"] == NUM_LAYERS
        assert found["metrics"]["early_exit"]["exit_histogram"] == {"2": 2, "4": 1}
        usage = used("user:hi\n", 3)
        assert uniform(found) == resource(
            status="completed", completed_at=0, output=[message("Hi")], usage=usage
        )

    async def test_thoughts_text_and_calls_are_items(self) -> None:
        async with serving(roomy(FakeEngine(EVERYTHING))) as server:
            speak(server, THOUGHTFUL)
            found = await ask(server, tools=TOOLS)
        assert uniform(found["output"]) == [
            thought("Hm."),
            message("I add."),
            call("add", '{"a": 1}'),
            call("now", "{}"),
        ]
        ids = [item["id"] for item in found["output"]]
        ids += [item["call_id"] for item in found["output"] if "call_id" in item]
        assert len(set(ids)) == 6
        assert found["status"] == "completed"
        details = found["usage"]["output_tokens_details"]
        # The tokens of the thoughts and of what ends them.
        assert len("Hm.") <= details["reasoning_tokens"] <= len("<think>Hm.</think>")

    async def test_what_is_cut_is_incomplete(self) -> None:
        async with serving(roomy(FakeEngine(f"Well.{CALL}"))) as server:
            text = await ask(server, max_output_tokens=2)
            cut = await ask(server, tools=TOOLS, max_output_tokens=len(f"Well.{CALL}") - 20)
            one = await ask(server, max_output_tokens=1)
        for found in (text, cut, one):
            assert found["status"] == "incomplete"
            assert found["incomplete_details"] == {"reason": "max_output_tokens"}
            assert found["completed_at"] is None
        assert uniform(text["output"]) == [message("We", "incomplete")]
        assert uniform(cut["output"])[0] == message("Well.")
        assert uniform(cut["output"])[1]["status"] == "incomplete"
        assert '{"a": 1}'.startswith(cut["output"][1]["arguments"])
        assert (text["max_output_tokens"], one["usage"]["output_tokens"]) == (2, 1)

    async def test_an_answer_that_says_nothing_has_an_empty_message(self) -> None:
        async with serving(FakeEngine("")) as server:
            found = await ask(server)
            got = await stream(server)
        assert uniform(found["output"]) == [message("")]
        assert uniform(got[2:-1]) == uniform(
            [
                {**event, "sequence_number": number}
                for number, event in enumerate(told(0, message(""), []), start=2)
            ]
        )

    async def test_the_request_is_repeated(self) -> None:
        given: dict[str, Any] = {
            "instructions": "Be good",
            "max_output_tokens": 5,
            "max_tool_calls": 2,
            "metadata": {"a": "b"},
            "parallel_tool_calls": False,
            "prompt_cache_key": "key",
            "safety_identifier": "me",
            "user": "you",
            "temperature": 0.5,
            "top_p": 0.25,
            "presence_penalty": 1.0,
            "frequency_penalty": -1.0,
            "tool_choice": {"type": "function", "name": "now"},
        }
        others: dict[str, Any] = {
            "store": True,
            "truncation": "auto",
            "service_tier": "flex",
            "background": False,
            "reasoning": {"effort": "low", "summary": "auto"},
            "text": {"verbosity": "low"},
            "include": ["reasoning.encrypted_content"],
            "tools": [*TOOLS, {"type": "web_search"}],
            "stream_options": {"include_obfuscation": False},
            "client_metadata": {"x": 1},
            "previous_response_id": None,
        }
        async with serving(roomy(FakeEngine())) as server:
            speak(server)
            found = await ask(server, **given, **others)
            choice = {"type": "allowed_tools", "mode": "auto", "tools": [NOW]}
            allowed = await ask(server, tools=TOOLS, tool_choice=choice)
        assert {name: found[name] for name in given} == given
        assert found["tools"] == [ADD, {**NOW, "description": None, "parameters": None} | NO_STRICT]
        assert found["text"] == {"format": {"type": "text"}, "verbosity": "low"}
        assert found["reasoning"] == {"effort": "low", "summary": None}
        # What is accepted without effect is reported as it is.
        assert (found["store"], found["truncation"]) == (False, "disabled")
        assert (found["service_tier"], found["background"]) == ("default", False)
        assert allowed["tool_choice"] == choice

    async def test_the_models_own_sampling_parameters_are_reported(self) -> None:
        engine = FakeEngine()
        engine.info = replace(engine.info, sampling_defaults={"temperature": 0.25, "top_p": 0.5})
        async with serving(engine) as server:
            found = await ask(server, top_p=0.75)
        assert (found["temperature"], found["top_p"]) == (0.25, 0.75)
        sampling = engine.added[0].sampling
        assert (sampling.temperature, sampling.top_p) == (0.25, 0.75)

    async def test_what_the_engine_is_asked_for(self) -> None:
        own = {"seed": 7, "top_k": 5, "min_p": 0.1, "temperature": 0, "min_tokens": 2}
        biases = {"logit_bias": {"3": 1}, "stop_token_ids": [9], "repetition_penalty": 1.5}
        async with serving() as server:
            await ask(server, early_exit="off", max_output_tokens=3, **own, **biases)
            await ask(server, early_exit={"mode": "adaptive", "threshold": 0.5})
        first, second = server.engine.added
        sampling = first.sampling
        assert (sampling.seed, sampling.top_k, sampling.min_p) == (7, 5, 0.1)
        assert (sampling.temperature, sampling.min_tokens, sampling.max_tokens) == (0, 2, 3)
        assert (sampling.logit_bias, sampling.repetition_penalty) == (((3, 1.0),), 1.5)
        assert 9 in sampling.stop_token_ids
        assert first.exits.mode == "off"
        assert (second.exits.mode, second.exits.thresholds) == ("adaptive", (0.5,))

    async def test_stop_strings(self) -> None:
        async with serving(FakeEngine("Hello, world!")) as server:
            found = await ask(server, stop="wor")
        assert uniform(found["output"]) == [message("Hello, ")]

    async def test_the_forms_of_texts_are_grammars(self) -> None:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        form = {"type": "json_schema", "name": "it", "schema": schema, "strict": True}
        async with serving(FakeEngine('{"a": 1}')) as server:
            plain = await ask(server, text={"format": {"type": "text"}})
            some = await ask(server, text={"format": {"type": "json_object"}})
            kept = await ask(server, text={"format": form})
            parsed = await server.client.responses.parse(model=MODEL, input="hi", text_format=Sum)
        assert [each.grammar is not None for each in server.engine.added] == [False, *[True] * 3]
        assert plain["text"]["format"] == {"type": "text"}
        assert some["text"]["format"] == {"type": "json_object"}
        assert kept["text"]["format"] == {**form, "description": None}
        assert parsed.output_parsed == Sum(a=1)


# What a template that knows no tools is given of two calls and their outputs.
CALLED = """user:A
assistant:<tool_call>
{"name": "f", "arguments": {}}
</tool_call>
<tool_call>
{"name": "g", "arguments": "x y"}
</tool_call>
user:<tool_response>
B
</tool_response>
user:<tool_response>
C
D
</tool_response>
"""


class TestConversations:
    @pytest.mark.parametrize(
        ("given", "options", "prompt"),
        [
            ("hi", {}, "user:hi\n"),
            ("hi", {"instructions": "Be good"}, "system:Be good\nuser:hi\n"),
            (
                [
                    {"role": "developer", "content": "A"},
                    {"type": "message", "role": "system", "content": "B", "id": "msg_1"},
                    {"role": "user", "content": [{"type": "input_text", "text": "C"}]},
                    {
                        "type": "message",
                        "role": "assistant",
                        "phase": "commentary",
                        "status": "completed",
                        "content": [
                            {"type": "output_text", "text": "D", "annotations": []},
                            {"type": "refusal", "refusal": "E"},
                        ],
                    },
                    {"role": "assistant", "phase": "final_answer", "content": "F"},
                    {"role": "user", "content": "G"},
                ],
                {"instructions": "Z"},
                "system:Z\n\nA\n\nB\nuser:C\nassistant:D\nE\n\nF\nuser:G\n",
            ),
            (
                [
                    {"role": "user", "content": "A"},
                    {
                        "type": "reasoning",
                        "id": "rs_1",
                        "summary": [{"type": "summary_text", "text": "not this"}],
                        "content": [{"type": "reasoning_text", "text": "Hm."}],
                    },
                    {"role": "assistant", "content": "B"},
                    {"role": "user", "content": "C"},
                    {
                        "type": "reasoning",
                        "summary": [{"type": "summary_text", "text": "Well."}],
                        "content": None,
                        "encrypted_content": "xyz",
                    },
                    {"role": "assistant", "content": "D"},
                    {"type": "reasoning", "summary": [], "encrypted_content": "xyz"},
                    {"role": "user", "content": "E"},
                ],
                {},
                "user:A\nassistant:(Hm.)B\nuser:C\nassistant:(Well.)D\nuser:E\n",
            ),
            (
                [
                    {"role": "user", "content": "A"},
                    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                    {"type": "custom_tool_call", "call_id": "2", "name": "g", "input": "x y"},
                    {"type": "function_call_output", "call_id": "1", "output": "B"},
                    {
                        "type": "custom_tool_call_output",
                        "call_id": "2",
                        "output": [
                            {"type": "input_text", "text": "C"},
                            {"type": "input_text", "text": "D"},
                        ],
                    },
                ],
                {},
                CALLED,
            ),
            (
                "hi",
                {"reasoning": {"effort": "none"}, "chat_template_kwargs": {"x": 1}},
                "user:hi\n[enable_thinking=False][reasoning_effort=none][x=1]",
            ),
        ],
    )
    async def test_prompts(self, given: Any, options: Mapping[str, Any], prompt: str) -> None:
        engine = roomy(FakeEngine())
        async with serving(engine) as server:
            speak(server)
            await ask(server, given, **options)
            response = await post(server, f"{PATH}/input_tokens", {"input": given, **options})
        assert prompts(server) == [prompt]
        assert response.json() == {"object": "response.input_tokens", "input_tokens": len(prompt)}

    async def test_an_answer_can_be_sent_back(self) -> None:
        """As agents do: the items of the last answer, and the outputs of its calls."""
        engine = roomy(FakeEngine(EVERYTHING))
        async with serving(engine) as server:
            speak(server, THOUGHTFUL)
            found = await ask(server, tools=TOOLS)
            calls = [item for item in found["output"] if item["type"] == "function_call"]
            outputs = [
                {"type": "function_call_output", "call_id": item["call_id"], "output": "1"}
                for item in calls
            ]
            await ask(server, [{"role": "user", "content": "hi"}, *found["output"], *outputs])
        assert prompts(server)[1] == (
            'user:hi\nassistant:(Hm.)I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n'
            '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
            "user:<tool_response>\n1\n</tool_response>\nuser:<tool_response>\n1\n</tool_response>\n"
        )

    @pytest.mark.parametrize(
        ("choice", "offered", "held"),
        [
            (None, ["add", "now"], True),
            ("auto", ["add", "now"], True),
            ("none", [], False),
            ("required", ["add", "now"], True),
            ({"type": "function", "name": "now"}, ["now"], True),
            ({"type": "allowed_tools", "mode": "auto", "tools": [NOW]}, ["now"], True),
            ({"type": "allowed_tools", "mode": "required", "tools": [ADD]}, ["add"], True),
            ({"type": "allowed_tools", "mode": "auto", "tools": []}, [], False),
        ],
    )
    async def test_tools_that_are_offered(
        self,
        choice: Any,
        offered: list[str],
        held: bool,  # noqa: FBT001 (parametrised)
    ) -> None:
        engine = roomy(FakeEngine())
        tools = [{"type": "web_search"}, ADD, {"type": "namespace", "name": "x", "tools": []}, NOW]
        tools += [{"type": kind} for kind in ("custom", "local_shell", "image_generation", "mcp")]
        async with serving(engine) as server:
            found = await ask(server, tools=tools, tool_choice=choice)
        assert [tool["name"] for tool in found["tools"]] == ["add", "now"]
        (prompt,) = prompts(server)
        assert [name for name in ("add", "now") if f'"name": "{name}"' in prompt] == offered
        assert "web_search" not in prompt
        assert (engine.added[0].grammar is not None) == held

    async def test_a_choice_among_skipped_tools_is_none(self) -> None:
        async with serving() as server:
            await ask(server, tools=[{"type": "web_search"}], tool_choice="auto")
            response = await post(
                server,
                PATH,
                {"input": "hi", "tools": [{"type": "web_search"}], "tool_choice": "required"},
            )
        assert prompts(server) == ["user:hi\n"]
        assert refusal(response) == ("tool_choice", "invalid_value")


class TestStreams:
    async def test_a_text_is_exact(self) -> None:
        async with serving(FakeEngine("Hi")) as server:
            found = await stream(server)
        item = message("Hi")
        whole = resource(
            status="completed", completed_at=0, output=[item], usage=used("user:hi\n", 3)
        )
        assert uniform(found) == transcript("completed", whole, told(0, item, ["H", "i"]))

    async def test_thoughts_text_and_calls_are_exact(self) -> None:
        engine = roomy(FakeEngine(EVERYTHING))
        async with serving(engine) as server:
            speak(server, THOUGHTFUL)
            found = uniform(await stream(server, tools=TOOLS))
        items = [
            thought("Hm."),
            message("I add."),
            call("add", '{"a": 1}'),
            call("now", "{}"),
        ]
        tools = [ADD, {**NOW, "description": None, "parameters": None, **NO_STRICT}]
        last = found[-1]["response"]
        reasoning = last["usage"]["output_tokens_details"]["reasoning_tokens"]
        usage = used(prompts(server)[0], len(EVERYTHING) + 1, reasoning)
        whole = resource(status="completed", completed_at=0, output=items, usage=usage, tools=tools)
        # Space is held back until what follows it is known.
        said = ["I", " a", "d", "d", "."]
        arguments = ["{", '"', "a", '"', ":", " ", "1", "}"]
        assert found == transcript(
            "completed",
            whole,
            told(0, items[0], ["H", "m", "."]),
            told(1, items[1], said),
            told(2, items[2], arguments),
            told(3, items[3], ["{", "}"]),
        )

    async def test_text_behind_calls_is_another_message(self) -> None:
        async with serving(roomy(FakeEngine(f"{OTHER}\nDone"))) as server:
            found = await stream(server, tools=[NOW])
        whole = uniform(found[-1]["response"]["output"])
        assert whole == [call("now", "{}"), message("Done")]

    async def test_what_is_cut_is_incomplete(self) -> None:
        async with serving(FakeEngine("Hi there")) as server:
            found = await stream(server, max_output_tokens=2)
        item = message("Hi", "incomplete")
        whole = resource(
            status="incomplete",
            incomplete_details={"reason": "max_output_tokens"},
            max_output_tokens=2,
            output=[item],
            usage=used("user:hi\n", 2),
        )
        assert uniform(found) == transcript("incomplete", whole, told(0, item, ["H", "i"]))

    @pytest.mark.parametrize("reply", ["Hello!", EVERYTHING, CALL, "<think>Hm.</think>", ""])
    async def test_the_client_puts_together_the_plain_answer(self, reply: str) -> None:
        engine = roomy(FakeEngine(reply))
        tools: Any = TOOLS
        async with serving(engine) as server:
            speak(server, THOUGHTFUL)
            plain = await ask(server, tools=tools)
            manager = server.client.responses.stream(model=MODEL, input="hi", tools=tools)
            async with manager as running:
                seen = [event async for event in running]
                final = await running.get_final_response()
        snapshots = [e.snapshot for e in seen if e.type == "response.output_text.delta"]
        assert snapshots == sorted(snapshots, key=len)
        got = json.loads(final.model_dump_json(exclude_unset=True))
        for item in got["output"]:
            # The client's own: arguments and texts that it parsed.
            item.pop("parsed_arguments", None)
            for part in item.get("content") or ():
                part.pop("parsed", None)
        assert uniform(got) == uniform(plain)

    async def test_an_error_after_the_start_is_the_last_event(self) -> None:
        async with serving(FakeEngine(fail_at=2)) as server:
            found = await stream(server)
            again = await post(server, PATH, {"input": "hi", "stream": True})
        last = found[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["error"]["code"] == "server_error"
        assert "fake engine" not in json.dumps(last)
        assert uniform(last["response"]["output"]) == [message("He", "incomplete")]
        kinds = [event["type"] for event in found[:-1]]
        assert kinds[-2:] == ["response.output_text.delta"] * 2
        assert refusal(again, 503) == (None, "engine_failed")

    async def test_a_plain_request_of_a_failing_engine_is_a_500(self) -> None:
        async with serving(FakeEngine(fail_at=2)) as server:
            response = await post(server, PATH, {"input": "hi"})
        assert refusal(response, 500) == (None, "internal_error")

    async def test_silence_is_filled_with_comments(self) -> None:
        engine = FakeEngine("Hi", permits=0)
        async with serving(engine, sse_keep_alive_interval=0.01) as server:
            body = {"input": "hi", "stream": True}
            client = httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S)
            async with client, client.stream("POST", PATH, json=body) as got:
                lines = got.aiter_lines()
                # The response begins before there is a token.
                begun = [await anext(lines) for _ in range(6)]
                assert begun[0] == "event: response.created"
                assert begun[3] == "event: response.in_progress"
                assert await anext(lines) == ": keep-alive"
                engine.release(1000)
                rest = [line async for line in lines if line.startswith("event")]
        assert rest[-1] == "event: response.completed"


class TestLogprobs:
    async def test_of_a_text(self) -> None:
        include = ["message.output_text.logprobs"]
        async with serving(Scoring("Hé")) as server:
            whole = await ask(server, include=include, top_logprobs=1)
            got = await stream(server, include=include, top_logprobs=1)
            bare = await ask(server, include=include)
            without = await ask(server, top_logprobs=1)
        best = {"token": "!", "logprob": -0.5, "bytes": [33]}
        expected = [
            {"token": token, "logprob": -1.0, "bytes": [byte], "top_logprobs": [best]}
            for token, byte in (("H", 72), ("�", 195), ("�", 169))
        ]
        (part,) = whole["output"][0]["content"]
        assert part["logprobs"] == expected
        deltas = [each for each in got if each["type"] == "response.output_text.delta"]
        assert [each["logprobs"] for each in deltas] == [expected[:1], expected[1:]]
        (done,) = [each for each in got if each["type"] == "response.output_text.done"]
        assert done["logprobs"] == expected
        assert whole["top_logprobs"] == 1
        assert [each["top_logprobs"] for each in bare["output"][0]["content"][0]["logprobs"]] == (
            [[]] * 3
        )
        assert without["output"][0]["content"][0]["logprobs"] == []

    async def test_thoughts_and_calls_have_none(self) -> None:
        engine = roomy(Scoring(EVERYTHING))
        async with serving(engine) as server:
            speak(server, THOUGHTFUL)
            found = await ask(server, tools=TOOLS, include=["message.output_text.logprobs"])
        (part,) = found["output"][1]["content"]
        assert "".join(each["token"] for each in part["logprobs"]) == part["text"] == "I add."


REFUSALS: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "input", "missing_required_parameter"),
    ({"input": []}, "input", "invalid_value"),
    ({"input": 1}, "input", "invalid_type"),
    ({"input": [{"role": "x", "content": "a"}]}, "input[0].role", "invalid_value"),
    ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
    (
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        "input[0]",
        "unsupported_parameter",
    ),
    ({"input": [{"type": "web_search_call"}]}, "input[0]", "unsupported_parameter"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
        "input[0].content[0]",
        "unsupported_parameter",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "1"}]}]},
        "input[0].content[0]",
        "unsupported_parameter",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "input[0].content[0]",
        "missing_required_parameter",
    ),
    ({"input": "\0"}, "input[0].content[0].text", "invalid_value"),
    (
        {"input": [{"type": "function_call", "call_id": "1", "name": "f"}]},
        "input[0]",
        "missing_required_parameter",
    ),
    (
        {"input": [{"type": "function_call_output", "call_id": "1", "output": "a"}]},
        "input[0].call_id",
        "invalid_value",
    ),
    (
        {"input": "a", "previous_response_id": "resp_1"},
        "previous_response_id",
        "unsupported_parameter",
    ),
    ({"input": "a", "conversation": "conv_1"}, "conversation", "unsupported_parameter"),
    ({"input": "a", "background": True}, "background", "unsupported_parameter"),
    ({"input": "a", "prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter"),
    ({"input": "a", "max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ({"input": "a", "temperature": 3}, "temperature", "invalid_value"),
    ({"input": "a", "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"input": "a", "truncation": "x"}, "truncation", "invalid_value"),
    ({"input": "a", "metadata": {"a": 1}}, "metadata.a", "invalid_type"),
    (
        {"input": "a", "tools": [{"type": "function"}]},
        "tools[0].name",
        "missing_required_parameter",
    ),
    ({"input": "a", "tools": [NOW, NOW]}, "tools", "invalid_value"),
    ({"input": "a", "tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"input": "a", "tool_choice": {"type": "mcp"}}, "tool_choice.type", "invalid_value"),
    (
        {"input": "a", "tools": [NOW], "tool_choice": {"type": "function"}},
        "tool_choice",
        "missing_required_parameter",
    ),
    (
        {"input": "a", "tools": [NOW], "tool_choice": {"type": "function", "name": "x"}},
        "tool_choice",
        "invalid_value",
    ),
    (
        {"input": "a", "tools": [NOW], "tool_choice": {"type": "allowed_tools", "tools": [ADD]}},
        "tool_choice",
        "invalid_value",
    ),
    ({"input": "a", "text": {"format": {"type": "x"}}}, "text.format.type", "invalid_value"),
    (
        {"input": "a", "text": {"format": {"type": "json_schema", "name": "a"}}},
        "text.format",
        "missing_required_parameter",
    ),
    (
        {
            "input": "a",
            "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "x"}}},
        },
        "text.format",
        "unsupported_grammar",
    ),
    (
        {
            "input": "a",
            "text": {"format": {"type": "json_object"}},
            "tools": [NOW],
            "tool_choice": "required",
        },
        "text.format",
        "invalid_value",
    ),
    ({"input": "a", "early_exit": {"quality": 0.9}}, "early_exit.quality", "invalid_value"),
    ({"input": "refuse me"}, "input", "invalid_value"),
    ({"input": "a" * CONTEXT}, "input", "context_length_exceeded"),
    ({"input": "a", "max_output_tokens": CONTEXT}, "input", "context_length_exceeded"),
    (
        {"input": "a", "chat_template_kwargs": {"tools": 1}},
        "chat_template_kwargs.tools",
        "invalid_value",
    ),
    ({"input": "a", "stop_token_ids": [9999]}, "stop_token_ids", "invalid_value"),
]


class TestRefusals:
    async def test_each_names_its_field(self) -> None:
        async with serving() as server:
            for body, param, code in REFUSALS:
                for extra in ({}, {"stream": True}):
                    response = await post(server, PATH, {**body, **extra})
                    assert refusal(response) == (param, code), body
            assert server.engine.added == []
            assert uniform((await ask(server))["output"]) == [message("Hello, world!")]

    async def test_of_counting(self) -> None:
        path = f"{PATH}/input_tokens"
        async with serving() as server:
            none = await post(server, path, {})
            other = await post(server, path, {"input": "a", "model": "x"})
            refused = await post(server, path, {"input": "refuse me"})
        assert refusal(none) == ("input", "missing_required_parameter")
        assert refusal(other, 404) == ("model", "model_not_found")
        assert refusal(refused) == ("input", "invalid_value")

    async def test_of_models(self) -> None:
        async with serving(require_model=True) as server:
            other = await post(server, PATH, {"input": "a", "model": "x"})
            none = await post(server, PATH, {"input": "a"})
        assert refusal(other, 404) == ("model", "model_not_found")
        assert refusal(none) == ("model", "missing_required_parameter")

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/resp_1"),
            ("DELETE", "/resp_1"),
            ("POST", "/resp_1/cancel"),
            ("GET", "/resp_1/input_items"),
            ("POST", "/compact"),
        ],
    )
    async def test_nothing_is_stored(self, method: str, path: str) -> None:
        async with serving() as server:
            response = await get(server, method, f"{PATH}{path}")
        assert refusal(response, 404) == (None, "not_found")
        assert "not stored" in response.json()["error"]["message"]

    async def test_counting_is_posted(self) -> None:
        async with serving() as server:
            response = await get(server, "GET", f"{PATH}/input_tokens")
        assert refusal(response, 405) == (None, "method_not_allowed")
        assert response.headers["allow"] == "POST"


class TestLeaving:
    async def test_a_stream_whose_client_leaves_is_aborted(self) -> None:
        engine = FakeEngine(permits=0)
        async with serving(engine) as server:
            engine.release(3)
            running = await server.client.responses.create(
                model=MODEL, input="hi", stream=True, extra_body={"ignore_eos": True}
            )
            await anext(aiter(running))
            await engine.arrivals(1)
            await running.close()
            assert await asyncio.to_thread(engine.abort_seen.wait, PATIENCE_S)
            assert server.context.driver.num_requests == 0

    async def test_a_plain_request_whose_client_leaves_is_aborted(self) -> None:
        engine = FakeEngine(permits=0)
        async with serving(engine) as server:
            request = asyncio.create_task(ask(server, ignore_eos=True))
            await engine.arrivals(1)
            request.cancel()
            assert await asyncio.to_thread(engine.abort_seen.wait, PATIENCE_S)
            with pytest.raises(asyncio.CancelledError):
                await request
            assert server.context.driver.num_requests == 0


async def test_codex_is_told_of_the_models() -> None:
    """All fields without which Codex 0.171 reads no model of the list, and their kinds."""
    needed: dict[str, type] = {
        "slug": str,
        "display_name": str,
        "supported_reasoning_levels": list,
        "shell_type": str,
        "visibility": str,
        "supported_in_api": bool,
        "priority": int,
        "base_instructions": str,
        "support_verbosity": bool,
        "truncation_policy": dict,
        "experimental_supported_tools": list,
    }
    async with serving(served_model_name=("a", "org/b")) as server:
        found = (await get(server, "GET", "/v1/models")).json()
        names = [model.id async for model in server.client.models.list()]
    assert [model["slug"] for model in found["models"]] == names == ["a", "org/b"]
    for model in found["models"]:
        assert {name: type(model[name]) for name in needed} == needed
        assert model["context_window"] == CONTEXT
        assert model["truncation_policy"] == {"mode": "tokens", "limit": CONTEXT // 4}
