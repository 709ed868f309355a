"""POST /v1/messages and count_tokens, with a scripted engine; Anthropic's client where it is."""

from __future__ import annotations

import asyncio
import importlib
import json
from typing import Any

import httpx2
import pytest

from tests.server.adapters import (
    CALL,
    EVERYTHING,
    THOUGHTFUL,
    events,
    get,
    post,
    prompts,
    roomy,
    speak,
)
from tests.server.fakes import CONTEXT, MODEL, NUM_LAYERS, PATIENCE_S, FakeEngine, Running, serving

PATH = "/v1/messages"
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
ADD: dict[str, Any] = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
NOW: dict[str, Any] = {"type": "custom", "name": "now", "input_schema": {"type": "object"}}
TOOLS = [ADD, NOW]
DIRECT = {"type": "direct"}


def body(**options: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 200, "messages": MESSAGES, **options}


async def ask(server: Running, **options: Any) -> dict[str, Any]:
    response = await post(server, PATH, body(**options))
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def stream(server: Running, **options: Any) -> list[dict[str, Any]]:
    return await events(server, PATH, body(**options))


def refusal(response: httpx2.Response, status: int = 400) -> tuple[str, str]:
    """Type and message of an error, checked for its exact form."""
    assert response.status_code == status, response.text
    found = response.json()
    assert set(found) == {"type", "error", "request_id"}
    assert found["type"] == "error"
    assert set(found["error"]) == {"type", "message"}
    assert found["request_id"] == response.headers["x-request-id"] != ""
    return found["error"]["type"], found["error"]["message"]


def uniform(value: Any) -> Any:
    """``value`` without what differs from answer to answer: ids are their prefixes."""
    if isinstance(value, list):
        return [uniform(each) for each in value]
    if not isinstance(value, dict):
        return value
    found = {name: uniform(each) for name, each in value.items() if name != "metrics"}
    if "id" in found:
        found["id"] = found["id"].split("_")[0]
    return found


def used(prompt: int, answer: int, thoughts: int = 0) -> dict[str, Any]:
    return {
        "cache_creation": None,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "inference_geo": None,
        "input_tokens": prompt,
        "output_tokens": answer,
        "output_tokens_details": {"thinking_tokens": thoughts} if thoughts else None,
        "server_tool_use": None,
        "service_tier": "standard",
    }


def ending(reason: str | None, sequence: str | None = None) -> dict[str, Any]:
    return {
        "stop_reason": reason,
        "stop_sequence": sequence,
        "stop_details": None,
        "container": None,
    }


def message(content: list[Any], usage: dict[str, Any], reason: str | None) -> dict[str, Any]:
    head = {"id": "msg", "type": "message", "role": "assistant", "model": MODEL}
    return {**head, "content": content, **ending(reason), "usage": usage}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said, "citations": None}


def thought(said: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": said, "signature": ""}


def call(name: str, given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": "call", "name": name, "input": given, "caller": DIRECT}


def told(index: int, block: dict[str, Any], pieces: list[str]) -> list[dict[str, Any]]:
    """The events of one block that grows by ``pieces``."""
    kinds: dict[str, tuple[str, str, dict[str, Any]]] = {
        "text": ("text_delta", "text", {"text": ""}),
        "thinking": ("thinking_delta", "thinking", {"thinking": ""}),
        "tool_use": ("input_json_delta", "partial_json", {"input": {}}),
    }
    kind, name, blank = kinds[block["type"]]
    return [
        {"type": "content_block_start", "index": index, "content_block": {**block, **blank}},
        *(
            {"type": "content_block_delta", "index": index, "delta": {"type": kind, name: piece}}
            for piece in pieces
        ),
        {"type": "content_block_stop", "index": index},
    ]


def replayed(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream tells of, put together as a client does."""
    whole: dict[str, Any] = {}
    written: dict[int, str] = {}
    for event in found:
        match event["type"]:
            case "message_start":
                whole = dict(event["message"])
            case "content_block_start":
                assert event["index"] == len(whole["content"])
                whole["content"].append(dict(event["content_block"]))
            case "content_block_delta":
                block, delta = whole["content"][event["index"]], event["delta"]
                if delta["type"] == "input_json_delta":
                    written[event["index"]] = (
                        written.get(event["index"], "") + delta["partial_json"]
                    )
                else:
                    name = delta["type"].removesuffix("_delta")
                    block[name] += delta[name]
            case "message_delta":
                whole |= event["delta"]
                whole["usage"] = event["usage"]
                whole["metrics"] = event["metrics"]
    for index, arguments in written.items():
        whole["content"][index]["input"] = json.loads(arguments)
    return whole


class TestAnswers:
    async def test_a_text_is_exact(self) -> None:
        async with serving(FakeEngine("Hi")) as server:
            found = await ask(server)
        assert found["metrics"]["early_exit"]["layers_total"] == NUM_LAYERS
        assert uniform(found) == message([text("Hi")], used(len("user:hi\n"), 3), "end_turn")

    async def test_thoughts_text_and_calls_are_blocks(self) -> None:
        async with serving(roomy(FakeEngine(EVERYTHING))) as server:
            speak(server, THOUGHTFUL)
            found = await ask(server, tools=TOOLS)
        content = [thought("Hm."), text("I add."), call("add", {"a": 1}), call("now", {})]
        assert uniform(found["content"]) == content
        assert found["content"][2]["id"] != found["content"][3]["id"]
        assert found["stop_reason"] == "tool_use"
        usage = found["usage"]
        assert usage["output_tokens_details"]["thinking_tokens"] >= len("Hm.")
        assert usage["output_tokens"] == len(EVERYTHING) + 1

    @pytest.mark.parametrize(
        ("stops", "said", "matched"),
        [
            (["wor"], "Hello, ", "wor"),
            (["zzz", "o, w", "d!"], "Hell", "o, w"),
            (["lo", "Hello"], "", "Hello"),
            (["zzz"], "Hello, world!", None),
            ([f"<{index}>" for index in range(30)], "Hello, world!", None),
        ],
    )
    async def test_the_stop_sequence_that_matched(
        self, stops: list[str], said: str, matched: str | None
    ) -> None:
        async with serving(FakeEngine("Hello, world!")) as server:
            plain = await ask(server, stop_sequences=stops)
            streamed = replayed(await stream(server, stop_sequences=stops))
        for found in (plain, streamed):
            assert [block["text"] for block in found["content"]] == ([said] if said else [])
            assert found["stop_sequence"] == matched
            assert found["stop_reason"] == ("stop_sequence" if matched else "end_turn")

    async def test_limits(self) -> None:
        """An answer ends where the client wished, or where the context does."""
        async with serving(FakeEngine("Hello, world!")) as server:
            cut = await ask(server, max_tokens=2)
            one = await ask(server, max_tokens=1)
            much = await ask(server, max_tokens=100_000)
            filled = await ask(server, max_tokens=100_000, ignore_eos=True)
        assert uniform(cut) == message([text("He")], used(8, 2), "max_tokens")
        assert (one["usage"]["output_tokens"], one["stop_reason"]) == (1, "max_tokens")
        assert much["stop_reason"] == "end_turn"
        assert filled["stop_reason"] == "model_context_window_exceeded"
        assert filled["usage"]["output_tokens"] == CONTEXT - len("user:hi\n")

    async def test_a_call_that_is_cut_has_the_input_that_was_written(self) -> None:
        said = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [1, 2'
        async with serving(roomy(FakeEngine(f"{said}, 3]}}}}\n</tool_call>"))) as server:
            found = await ask(server, tools=TOOLS, max_tokens=len(said))
        assert uniform(found["content"]) == [call("add", {"a": 1, "b": [1, 2]})]
        assert found["stop_reason"] == "max_tokens"

    async def test_an_answer_that_says_nothing_has_no_blocks(self) -> None:
        async with serving(FakeEngine("")) as server:
            found = await ask(server)
            got = await stream(server)
        assert uniform(found) == message([], used(8, 1), "end_turn")
        assert [event["type"] for event in got] == [
            "message_start",
            "ping",
            "message_delta",
            "message_stop",
        ]

    async def test_what_the_engine_is_asked_for(self) -> None:
        own = {"seed": 7, "top_k": 5, "top_p": 0.5, "temperature": 0.25}
        async with serving() as server:
            await ask(server, early_exit="off", max_tokens=3, metadata={"user_id": "me"}, **own)
            await ask(server, early_exit={"mode": "adaptive", "threshold": 0.5})
        first, second = server.engine.added
        sampling = first.sampling
        assert (sampling.seed, sampling.top_k, sampling.top_p) == (7, 5, 0.5)
        assert (sampling.temperature, sampling.max_tokens) == (0.25, 3)
        assert first.exits.mode == "off"
        assert (second.exits.mode, second.exits.thresholds) == ("adaptive", (0.5,))

    async def test_a_form_is_a_grammar(self) -> None:
        form = {"type": "json_schema", "schema": {"type": "object"}}
        async with serving(FakeEngine("{}")) as server:
            found = await ask(server, output_config={"format": form})
        assert found["content"][0]["text"] == "{}"
        assert server.engine.added[0].grammar is not None


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "x"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "C"},
            {"type": "tool_use", "id": "1", "name": "f", "input": {"ü": 1}},
            {"type": "tool_use", "id": "2", "name": "g", "input": {}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": "D"},
            {
                "type": "tool_result",
                "tool_use_id": "2",
                "content": [{"type": "text", "text": "E"}, {"type": "text", "text": "F"}],
                "is_error": True,
            },
            {"type": "text", "text": "G", "cache_control": {"type": "ephemeral"}},
        ],
    },
]
CONVERSED = """user:A
B
assistant:(Hm.)C
<tool_call>
{"name": "f", "arguments": {"ü": 1}}
</tool_call>
<tool_call>
{"name": "g", "arguments": {}}
</tool_call>
user:<tool_response>
D
</tool_response>
user:<tool_response>
Error: E
F
</tool_response>
user:G
"""


class TestConversations:
    @pytest.mark.parametrize(
        ("messages", "options", "prompt"),
        [
            (MESSAGES, {}, "user:hi\n"),
            (MESSAGES, {"system": "Be good"}, "system:Be good\nuser:hi\n"),
            (
                MESSAGES,
                {"system": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
                "system:A\nB\nuser:hi\n",
            ),
            ([*MESSAGES, *MESSAGES], {}, "user:hi\n\nhi\n"),
            (CONVERSATION, {}, CONVERSED),
            # The beginning of the answer.
            ([*MESSAGES, {"role": "assistant", "content": "So"}], {}, "user:hi\nassistant:So"),
            (MESSAGES, {"thinking": {"type": "disabled"}}, "user:hi\n[enable_thinking=False]"),
            (
                MESSAGES,
                {"thinking": {"type": "enabled", "budget_tokens": 2048}},
                "user:hi\n[enable_thinking=True]",
            ),
            (
                MESSAGES,
                {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
                "user:hi\n[enable_thinking=True][reasoning_effort=low]",
            ),
        ],
    )
    async def test_prompts(self, messages: Any, options: dict[str, Any], prompt: str) -> None:
        async with serving(roomy(FakeEngine())) as server:
            speak(server)
            answer = await ask(server, messages=messages, **options)
            given = {"messages": messages, **options}
            response = await post(server, f"{PATH}/count_tokens", given)
        assert prompts(server) == [prompt]
        assert response.json() == {"input_tokens": len(prompt.encode())}
        assert answer["usage"]["input_tokens"] == len(prompt.encode())

    async def test_an_answer_can_be_sent_back(self) -> None:
        async with serving(roomy(FakeEngine(EVERYTHING))) as server:
            speak(server, THOUGHTFUL)
            found = await ask(server, tools=TOOLS)
            results = [
                {"type": "tool_result", "tool_use_id": block["id"], "content": "1"}
                for block in found["content"]
                if block["type"] == "tool_use"
            ]
            turns = [
                *MESSAGES,
                {"role": "assistant", "content": found["content"]},
                {"role": "user", "content": results},
            ]
            await ask(server, messages=turns)
        assert prompts(server)[1] == (
            'user:hi\nassistant:(Hm.)I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n'
            '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
            "user:<tool_response>\n1\n</tool_response>\nuser:<tool_response>\n1\n</tool_response>\n"
        )

    @pytest.mark.parametrize(
        ("choice", "offered", "required"),
        [
            (None, ["add", "now"], False),
            ({"type": "auto"}, ["add", "now"], False),
            ({"type": "auto", "disable_parallel_tool_use": True}, ["add", "now"], False),
            ({"type": "any"}, ["add", "now"], True),
            ({"type": "tool", "name": "now"}, ["now"], True),
            ({"type": "none"}, [], False),
        ],
    )
    async def test_tools_that_are_offered(
        self,
        monkeypatch: pytest.MonkeyPatch,
        choice: Any,
        offered: list[str],
        required: bool,  # noqa: FBT001 (parametrised)
    ) -> None:
        uses: list[Any] = []
        prepared = importlib.import_module("offramp.server.api.prepared")
        original = prepared.source_of_calls

        def seen(use: Any, *others: Any, **options: Any) -> Any:
            uses.append(use)
            return original(use, *others, **options)

        monkeypatch.setattr(prepared, "source_of_calls", seen)
        web = {"type": "web_search_20250305", "name": "web_search"}
        async with serving(roomy(FakeEngine())) as server:
            await ask(server, tools=[web, *TOOLS], tool_choice=choice)
        (prompt,) = prompts(server)
        assert [name for name in ("add", "now") if f'"name": "{name}"' in prompt] == offered
        assert "web_search" not in prompt
        assert [[tool.name for tool in use.tools] for use in uses] == ([offered] if offered else [])
        single = bool(choice) and (
            choice.get("disable_parallel_tool_use", False) or choice["type"] == "tool"
        )
        assert all((use.required, use.parallel) == (required, not single) for use in uses)

    async def test_a_choice_among_skipped_tools_is_none(self) -> None:
        web = [{"type": "web_search_20250305", "name": "web_search"}]
        async with serving() as server:
            await ask(server, tools=web, tool_choice={"type": "auto"})
            response = await post(server, PATH, body(tools=web, tool_choice={"type": "any"}))
        assert prompts(server) == ["user:hi\n"]
        assert refusal(response)[0] == "invalid_request_error"


class TestStreams:
    async def test_a_text_is_exact(self) -> None:
        async with serving(FakeEngine("Hi")) as server:
            found = await stream(server)
        assert uniform(found) == [
            {"type": "message_start", "message": message([], used(8, 1), None)},
            {"type": "ping"},
            *told(0, text("Hi"), ["H", "i"]),
            {"type": "message_delta", "delta": ending("end_turn"), "usage": used(8, 3)},
            {"type": "message_stop"},
        ]

    async def test_thoughts_text_and_calls_are_exact(self) -> None:
        async with serving(roomy(FakeEngine(EVERYTHING))) as server:
            speak(server, THOUGHTFUL)
            found = uniform(await stream(server, tools=TOOLS))
        prompt = len(prompts(server)[0])
        usage = found[-2]["usage"]
        assert usage == used(
            prompt, len(EVERYTHING) + 1, usage["output_tokens_details"]["thinking_tokens"]
        )
        assert found[2:] == [
            *told(0, thought("Hm."), ["H", "m", "."]),
            # Space is held back until what follows it is known.
            *told(1, text("I add."), ["I", " a", "d", "d", "."]),
            *told(2, call("add", {}), ["{", '"', "a", '"', ":", " ", "1", "}"]),
            *told(3, call("now", {}), ["{", "}"]),
            {"type": "message_delta", "delta": ending("tool_use"), "usage": usage},
            {"type": "message_stop"},
        ]
        # The first words come with all tokens before them.
        assert found[0]["message"] == message([], used(prompt, len("<think>H")), None)

    @pytest.mark.parametrize("reply", ["Hello!", EVERYTHING, CALL, "<think>Hm.</think>", ""])
    async def test_the_parts_are_the_plain_answer(self, reply: str) -> None:
        async with serving(roomy(FakeEngine(reply))) as server:
            speak(server, THOUGHTFUL)
            plain = await ask(server, tools=TOOLS)
            found = await stream(server, tools=TOOLS)
        assert uniform(replayed(found)) == uniform(plain)
        depths = [each["metrics"]["early_exit"] for each in (plain, found[-2])]
        assert depths[0] == depths[1]

    async def test_an_error_after_the_start_is_an_event(self) -> None:
        async with serving(FakeEngine(fail_at=2)) as server:
            found = await stream(server)
            again = await post(server, PATH, body(stream=True))
        assert [event["type"] for event in found[:3]] == [
            "message_start",
            "ping",
            "content_block_start",
        ]
        last = found[-1]
        assert set(last) == {"type", "error", "request_id"}
        assert (last["type"], last["error"]["type"]) == ("error", "api_error")
        assert "fake engine" not in json.dumps(last)
        assert refusal(again, 503)[0] == "overloaded_error"

    async def test_silence_is_filled(self) -> None:
        """With comments before the message begins, then with pings."""
        engine = FakeEngine("Hi", permits=0)
        async with serving(engine, sse_keep_alive_interval=0.01) as server:
            client = httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S)
            async with client, client.stream("POST", PATH, json=body(stream=True)) as got:
                lines = got.aiter_lines()
                assert await anext(lines) == ": keep-alive"
                engine.release(1)
                names = [line async for line in _named(lines, pings=2, engine=engine)]
        assert names[0] == "event: message_start"
        assert names.count("event: ping") >= 3
        assert names[-1] == "event: message_stop"


async def _named(lines: Any, pings: int, engine: FakeEngine) -> Any:
    """Names of events; the engine goes on once there were ``pings`` beside the first one."""
    seen = 0
    async for line in lines:
        if not line.startswith("event: "):
            continue
        yield line
        seen += line == "event: ping"
        if seen == pings + 1:
            engine.release(1000)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"messages": MESSAGES}, "max_tokens"),
    ({"max_tokens": 1}, "messages"),
    (body(messages=[]), "messages"),
    (body(max_tokens=0), "max_tokens"),
    (body(temperature=1.5), "temperature"),
    (body(top_p=2), "top_p"),
    (body(stop_sequences=[""]), "stop_sequences[0]"),
    (body(stop_sequences=["a"] * 65), "stop_sequences"),
    (body(system=[IMAGE]), "system[0]"),
    (body(messages=[{"role": "tool", "content": "a"}]), "messages[0].role"),
    (body(messages=[{"role": "user", "content": [IMAGE]}]), "messages[0].content[0]"),
    (
        body(messages=[{"role": "user", "content": [{"type": "document", "source": {}}]}]),
        "messages[0].content[0]",
    ),
    (
        body(messages=[{"role": "user", "content": [{"type": "text"}]}]),
        "messages[0].content[0]",
    ),
    (
        body(messages=[{"role": "user", "content": [{"type": "tool_use", "id": "1"}]}]),
        "messages[0].content[0]",
    ),
    (
        body(messages=[{"role": "user", "content": CONVERSATION[1]["content"]}]),
        "messages[0]: thinking blocks cannot be in messages of the user",
    ),
    (
        body(messages=[CONVERSATION[2]]),
        "messages[0].content[0].tool_use_id",
    ),
    (
        body(
            messages=[
                CONVERSATION[1],
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "1", "content": [IMAGE]}],
                },
            ]
        ),
        "messages[1].content[0].content[0]",
    ),
    (body(messages=[{"role": "user", "content": "\0"}]), "messages[0].content[0].text"),
    (body(tools=[{"name": "f"}]), "tools[0].input_schema"),
    (body(tools=[{**NOW, "name": "a b"}]), "tools[0].name"),
    (body(tools=[NOW, NOW]), "tools"),
    (body(tool_choice={"type": "x"}), "tool_choice.type"),
    (body(tools=TOOLS, tool_choice={"type": "tool"}), "tool_choice"),
    (body(tools=TOOLS, tool_choice={"type": "tool", "name": "x"}), "tool_choice"),
    (body(tool_choice={"type": "any"}), "tool_choice"),
    (body(thinking={"type": "x"}), "thinking.type"),
    (
        body(output_config={"format": {"type": "json_schema", "schema": {"type": "x"}}}),
        "output_config.format",
    ),
    (
        body(
            output_config={"format": {"type": "json_schema", "schema": {}}},
            tools=TOOLS,
            tool_choice={"type": "any"},
        ),
        "output_config.format",
    ),
    (body(early_exit={"quality": 0.9}), "early_exit.quality"),
    (body(messages=[{"role": "user", "content": "refuse me"}]), "messages"),
    (body(messages=[{"role": "user", "content": "a" * CONTEXT}]), "prompt is too long: "),
]


class TestErrors:
    async def test_each_refusal_names_its_field(self) -> None:
        async with serving() as server:
            for given, named in REFUSALS:
                for extra in ({}, {"stream": True}):
                    kind, said = refusal(await post(server, PATH, {**given, **extra}))
                    assert (kind, said.startswith(named) or f"'{named}'" in said) == (
                        "invalid_request_error",
                        True,
                    ), (given, said)
            assert server.engine.added == []
            assert (await ask(server))["content"] == [text("Hello, world!")]

    async def test_all_kinds_have_anthropics_form(self) -> None:
        async with serving(max_body_size=1.0, require_model=True) as server:
            other = await post(server, PATH, body(model="x"))
            none = await post(server, PATH, {**body(), "model": None})
            large = await post(server, PATH, body(system="a" * 2**20))
            counted = await post(server, f"{PATH}/count_tokens", {})
            method = await get(server, "GET", PATH)
            route = await get(server, "GET", f"{PATH}/batches")
            elsewhere = await get(server, "GET", "/v1/messagesque")
        assert refusal(other, 404)[0] == "not_found_error"
        assert refusal(none) == ("invalid_request_error", "'model' is required.")
        assert refusal(large, 413)[0] == "invalid_request_error"
        assert refusal(counted)[0] == "invalid_request_error"
        assert refusal(method, 405)[0] == "invalid_request_error"
        assert refusal(route, 404)[0] == "not_found_error"
        assert set(elsewhere.json()) == {"error"}

    async def test_a_fault_of_ours_tells_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with serving() as server:
            tokenizer = server.context.tokenizer

            def broken(*_: object) -> None:
                raise RuntimeError("secret")

            monkeypatch.setattr(tokenizer, "encode_rendered", broken)
            response = await post(server, PATH, body())
        assert refusal(response, 500)[0] == "api_error"
        assert "secret" not in response.text

    async def test_a_plain_request_of_a_failing_engine(self) -> None:
        async with serving(FakeEngine(fail_at=2)) as server:
            assert refusal(await post(server, PATH, body()), 500)[0] == "api_error"

    async def test_a_full_queue(self) -> None:
        engine = FakeEngine(permits=0)
        async with serving(engine, max_num_queued_reqs=0) as server:
            running = [asyncio.create_task(ask(server)) for _ in range(4)]
            await engine.arrivals(4)
            response = await post(server, PATH, body())
            engine.release(1000)
            await asyncio.gather(*running)
        assert refusal(response, 429)[0] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1

    async def test_keys(self) -> None:
        """Both headers hold a key, on all routes."""
        async with serving(api_key=("one", "two")) as server:
            for headers in ({}, {"x-api-key": "three"}, {"Authorization": "one"}):
                response = await post(server, PATH, body(), **headers)
                assert refusal(response, 401)[0] == "authentication_error"
            for headers in (
                {"x-api-key": "two"},
                {"Authorization": "Bearer one"},
                {"x-api-key": "none", "Authorization": "Bearer one"},
                {"x-api-key": "one", "Authorization": "Bearer none"},
            ):
                assert (await post(server, PATH, body(), **headers)).status_code == 200
            chat = {"messages": MESSAGES}
            found = await post(server, "/v1/chat/completions", chat, **{"x-api-key": "one"})
            lacking = await post(server, "/v1/chat/completions", chat, **{"x-api-key": "on"})
        assert found.status_code == 200
        assert lacking.json()["error"]["code"] == "invalid_api_key"


class TestLeaving:
    async def test_a_stream_whose_client_leaves_is_aborted(self) -> None:
        engine = FakeEngine(permits=0)
        async with serving(engine) as server:
            engine.release(3)
            given = body(stream=True, ignore_eos=True)
            client = httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S)
            async with client, client.stream("POST", PATH, json=given) as got:
                assert await anext(got.aiter_lines()) == "event: message_start"
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


class TestClient:
    """Anthropic's own client, which these tests need and the others do without."""

    @pytest.fixture
    def anthropic(self) -> Any:
        return pytest.importorskip("anthropic")

    @pytest.mark.parametrize("reply", ["Hello!", EVERYTHING, CALL, "<think>Hm.</think>", ""])
    async def test_it_puts_together_the_plain_answer(self, anthropic: Any, reply: str) -> None:
        adapter = importlib.import_module("pydantic").TypeAdapter
        kinds = adapter(anthropic.types.RawMessageStreamEvent)
        options = {"model": MODEL, "max_tokens": 200, "messages": MESSAGES, "tools": TOOLS}
        async with serving(roomy(FakeEngine(reply))) as server:
            speak(server, THOUGHTFUL)
            async with anthropic.AsyncAnthropic(base_url=server.url, api_key="k") as client:
                plain = await client.messages.create(**options)
                async with client.messages.stream(**options) as running:
                    final = await running.get_final_message()
                count = await client.messages.count_tokens(**_without_limit(options))
            for event in await stream(server, tools=TOOLS):
                if event["type"] != "ping":
                    kinds.validate_python(event)
        anthropic.types.Message.model_validate(plain.to_dict())
        names = ("role", "content", "stop_reason", "stop_sequence", "usage")
        whole, put = plain.to_dict(), final.to_dict()
        for block in put["content"]:
            # The client's own.
            block.pop("parsed_output", None)
        assert uniform({name: put[name] for name in names}) == uniform(
            {name: whole[name] for name in names}
        )
        assert count.input_tokens == plain.usage.input_tokens

    async def test_it_raises_the_errors(self, anthropic: Any) -> None:
        options: dict[str, Any] = {"max_tokens": 5, "messages": MESSAGES}
        async with serving(FakeEngine(fail_at=1), api_key=("k",)) as server:
            settings = {"base_url": server.url, "max_retries": 0}
            async with anthropic.AsyncAnthropic(api_key="wrong", **settings) as stranger:
                with pytest.raises(anthropic.AuthenticationError):
                    await stranger.messages.create(model=MODEL, **options)
            async with anthropic.AsyncAnthropic(api_key="k", **settings) as client:
                with pytest.raises(anthropic.NotFoundError) as caught:
                    await client.messages.create(model="x", **options)
                assert caught.value.body["error"]["type"] == "not_found_error"
                with pytest.raises(anthropic.BadRequestError):
                    await client.messages.create(model=MODEL, **{**options, "max_tokens": 0})
                with pytest.raises(anthropic.APIError):
                    async with client.messages.stream(model=MODEL, **options) as running:
                        await running.get_final_message()


def _without_limit(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "max_tokens"}
