"""The whole HTTP side over a real socket, with the official client and a fake engine."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from offramp.server.api import ops
from tests.server.fakes import (
    CONTEXT,
    END,
    MODEL,
    NUM_LAYERS,
    PATIENCE_S,
    FakeEngine,
    Running,
    byte_backend,
    serving,
)

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
REPLY = "Hello, world!"
ENDLESS = {"ignore_eos": True}


async def chat(server: Running, **options: Any) -> Any:
    return await server.client.chat.completions.create(
        model=MODEL, messages=options.pop("messages", MESSAGES), **options
    )


async def chunks(server: Running, **options: Any) -> list[ChatCompletionChunk]:
    return [chunk async for chunk in await chat(server, stream=True, **options)]


async def send(server: Running, method: str, path: str, **options: Any) -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        return await client.request(method, path, **options)


async def post(server: Running, path: str, body: Any) -> httpx2.Response:
    return await send(server, "POST", path, json=body)


def envelope(response: httpx2.Response) -> dict[str, Any]:
    """The error, checked for its exact form."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert "x-request-id" in response.headers
    error: dict[str, Any] = body["error"]
    return error


async def aborted(server: Running) -> None:
    """Wait until the engine has dropped a request."""
    assert await asyncio.to_thread(server.engine.abort_seen.wait, PATIENCE_S)


class TestAnswers:
    async def test_chat(self) -> None:
        async with serving() as server:
            answer = await chat(server)
        choice = answer.choices[0]
        assert choice.message.content == REPLY
        assert choice.message.role == "assistant"
        assert choice.finish_reason == "stop"
        assert answer.object == "chat.completion"
        assert answer.id.startswith("chatcmpl-")
        assert answer.model == MODEL
        assert answer.usage.completion_tokens == len(REPLY) + 1
        assert answer.usage.prompt_tokens == len("user:hi\n")
        assert answer.usage.prompt_tokens_details.cached_tokens == 0

    async def test_depth_is_reported(self) -> None:
        async with serving() as server:
            answer = await chat(server, max_tokens=4)
        depth = answer.metrics["early_exit"]
        assert depth["mode"] == "adaptive"
        assert depth["layers_total"] == NUM_LAYERS
        assert depth["mean_exit_layer"] == 3
        assert depth["layers_executed"] == 12
        assert depth["layers_skipped_fraction"] == 0.25
        assert depth["exit_histogram"] == {"2": 2, "4": 2}
        assert answer.metrics["time_to_first_token_ms"] >= 0
        assert answer.choices[0].finish_reason == "length"

    async def test_token_ids_exit_layers_and_sources_are_aligned(self) -> None:
        extra = {
            "return_token_ids": True,
            "return_exit_layers": True,
            "return_token_sources": True,
        }
        async with serving(FakeEngine("añb")) as server:
            whole = (await chat(server, extra_body=extra)).choices[0]
            got = await chunks(server, extra_body=extra)
        assert whole.token_ids == [*byte_backend().encode("añb").ids, END]
        assert whole.exit_layers == [2, 4, 2, 4, 2]
        parts: list[Any] = [chunk.choices[0] for chunk in got]
        assert [t for part in parts for t in part.token_ids] == whole.token_ids
        assert [t for part in parts for t in part.exit_layers] == whole.exit_layers
        assert whole.token_sources == ["ngram", "model", "ngram", "model", "ngram"]
        assert [t for part in parts for t in part.token_sources] == whole.token_sources
        assert "".join(part.delta.content or "" for part in parts) == "añb"

    async def test_stream(self) -> None:
        async with serving() as server:
            got = await chunks(server, n=2)
        assert len({chunk.id for chunk in got}) == 1
        for index in (0, 1):
            mine = [c for chunk in got for c in chunk.choices if c.index == index]
            assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
            assert "".join(c.delta.content or "" for c in mine) == REPLY
            assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert all(chunk.choices and chunk.usage is None for chunk in got)
        assert "metrics" in (got[-1].model_extra or {})
        assert sum("metrics" in (chunk.model_extra or {}) for chunk in got) == 1

    @pytest.mark.parametrize("continuous", [False, True])
    async def test_usage_in_streams(self, continuous: bool) -> None:  # noqa: FBT001 (parametrised)
        options = {"include_usage": True, "continuous_usage_stats": continuous}
        async with serving() as server:
            got = await chunks(server, stream_options=options, n=2)
        last = got[-1]
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == 2 * (len(REPLY) + 1)
        assert last.usage.prompt_tokens == len("user:hi\n")
        assert (last.model_extra or {})["metrics"]["early_exit"]["layers_total"] == NUM_LAYERS
        assert all(chunk.choices for chunk in got[:-1])
        assert all((chunk.usage is not None) == continuous for chunk in got[:-1])

    async def test_frames_are_exact(self) -> None:
        body = {"messages": MESSAGES, "stream": True, "max_tokens": 2}
        async with serving() as server:
            response = await post(server, "/v1/chat/completions", body)
        assert response.headers["content-type"].startswith("text/event-stream")
        frames = response.text.split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        assert all(json.loads(frame.removeprefix("data: ")) for frame in frames[:-2])

    async def test_characters_of_several_tokens_stay_whole(self) -> None:
        text = "👨‍👩‍👧 漢字 é"
        async with serving(FakeEngine(text)) as server:
            got = await chunks(server)
        pieces = [choice.delta.content or "" for chunk in got for choice in chunk.choices]
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces)

    @pytest.mark.parametrize("stop", ["wor", ["zzz", "o, w"], "d!"])
    async def test_stop_strings_end_the_text_and_the_work(self, stop: Any) -> None:
        stops = [stop] if isinstance(stop, str) else stop
        wanted = min((REPLY.split(text, maxsplit=1)[0] for text in stops), key=len)
        engine = FakeEngine(permits=0)
        async with serving(engine) as server:
            # No more than the reply: only an abort can end the sequence before its limit.
            engine.release(len(REPLY))
            answer = await chat(server, stop=stop, max_tokens=200, extra_body=ENDLESS)
            await aborted(server)
            engine.release(len(REPLY))
            got = await chunks(server, stop=stop, max_tokens=200, extra_body=ENDLESS)
        assert answer.choices[0].message.content == wanted
        assert answer.choices[0].finish_reason == "stop"
        assert "".join(c.delta.content or "" for k in got for c in k.choices) == wanted
        assert got[-1].choices[0].finish_reason == "stop"

    async def test_stop_string_can_be_included(self) -> None:
        async with serving() as server:
            extra = {"include_stop_str_in_output": True}
            answer = await chat(server, stop="wor", extra_body=extra)
        assert answer.choices[0].message.content == "Hello, wor"

    async def test_completions_of_every_prompt_form(self) -> None:
        async with serving() as server:
            create = server.client.completions.create
            one = await create(model=MODEL, prompt="a")
            many = await create(model=MODEL, prompt=["a", "bc"], n=2, max_tokens=3)
            ids = await create(model=MODEL, prompt=[1, 2, 3])
            lists = await create(model=MODEL, prompt=[[1], [2, 3]])
        assert one.choices[0].text == REPLY
        assert one.id.startswith("cmpl-")
        assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
        assert {choice.text for choice in many.choices} == {REPLY[:3]}
        assert many.usage is not None
        assert many.usage.prompt_tokens == 3
        assert many.usage.completion_tokens == 12
        assert ids.usage is not None
        assert ids.usage.prompt_tokens == 3
        assert len(lists.choices) == 2

    async def test_completion_tokens_default_to_16(self) -> None:
        async with serving(FakeEngine("x" * 100)) as server:
            answer = await server.client.completions.create(model=MODEL, prompt="a")
            stream = await server.client.completions.create(model=MODEL, prompt="a", stream=True)
            text = "".join([chunk.choices[0].text async for chunk in stream])
        assert answer.choices[0].text == "x" * 16 == text

    async def test_chat_answers_may_fill_the_context(self) -> None:
        async with serving() as server:
            answer = await chat(server, extra_body=ENDLESS)
        assert answer.usage.total_tokens == CONTEXT

    async def test_what_the_engine_is_asked_for(self) -> None:
        exits = {"mode": "adaptive", "threshold": 0.5, "min_layer": 1, "kv_fill": "recompute"}
        async with serving() as server:
            await chat(
                server, n=2, seed=7, temperature=0, extra_body={"early_exit": exits, "top_k": 5}
            )
            await chat(server, extra_body={"early_exit": "off"})
        first, second, off = server.engine.added
        assert first.sampling.seed == 7
        assert second.sampling.seed != 7
        assert first.sampling.temperature == 0
        assert first.sampling.top_k == 5
        assert first.sampling.stop_token_ids == {END}
        assert (first.exits.mode, first.exits.thresholds) == ("adaptive", (0.5,))
        assert (first.exits.min_layer, first.exits.kv_fill) == (1, "recompute")
        assert off.exits.mode == "off"

    async def test_parameters_at_their_edges(self) -> None:
        """-1 is no seed, a nucleus of nothing is the likeliest token, 2^32 + 1 are all tokens."""
        async with serving() as server:
            await chat(server, seed=-1)
            await chat(server, seed=-1)
            await chat(server, top_p=0, temperature=1)
            await chat(server, extra_body={"top_k": 2**32 + 1})
        first, second, greedy, whole = server.engine.added
        assert first.sampling.seed != second.sampling.seed
        assert (greedy.sampling.temperature, greedy.sampling.top_p) == (0, 1)
        assert whole.sampling.top_k == server.engine.info.vocab_size

    async def test_a_stop_string_that_is_a_special_token(self) -> None:
        async with serving() as server:
            await chat(server, stop=["<end>", "x"], extra_body={"ignore_eos": True})
        assert server.engine.added[0].sampling.stop_token_ids == {END}

    async def test_the_models_own_sampling_parameters(self) -> None:
        engine = FakeEngine()
        own = {"temperature": 0.25, "top_k": 7.0}
        engine.info = replace(engine.info, sampling_defaults=own)
        async with serving(engine) as server:
            await chat(server)
            await chat(server, temperature=0.5)
        found = [(each.sampling.temperature, each.sampling.top_k) for each in engine.added]
        assert found == [(0.25, 7), (0.5, 7)]

    async def test_more_answers_than_could_ever_wait(self) -> None:
        async with serving(max_num_queued_reqs=2) as server:
            with pytest.raises(openai.BadRequestError) as caught:
                await chat(server, n=7)
        assert caught.value.param == "n"

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("use_beam_search", True),
            ("truncate_prompt_tokens", 5),
        ],
    )
    async def test_what_cannot_be_honoured_is_named(self, name: str, value: object) -> None:
        async with serving() as server:
            with pytest.raises(openai.BadRequestError) as caught:
                await chat(server, extra_body={name: value})
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")

    async def test_web_pages_may_ask_from_allowed_origins(self) -> None:
        ask = {
            "Origin": "https://page.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        path = "/v1/chat/completions"
        async with serving(allowed_origins=("https://page.example",), api_key=("k",)) as server:
            allowed = await send(server, "OPTIONS", path, headers=ask)
            other = {**ask, "Origin": "https://other.example"}
            refused = await send(server, "OPTIONS", path, headers=other)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        assert "access-control-allow-origin" not in refused.headers

    async def test_an_old_client_gets_a_stream_in_one_piece(self) -> None:
        """HTTP/1.0 knows no chunks."""
        body = json.dumps({"messages": MESSAGES, "stream": True}).encode()
        async with serving() as server:
            port = int(server.url.rsplit(":", 1)[1])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = "POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
            writer.close()
        head, _, frames = answer.decode().partition("\r\n\r\n")
        assert "transfer-encoding" not in head.lower()
        assert f"content-length: {len(frames.encode())}" in head.lower()
        assert frames.endswith("data: [DONE]\n\n")
        assert frames.count("data: ") > 3


class TestTokenizer:
    async def test_there_and_back(self) -> None:
        text = "Grüße, <end> 漢字"
        async with serving() as server:
            there = await send(server, "POST", "/tokenize", json={"prompt": text})
            found = there.json()
            back = await send(server, "POST", "/detokenize", json={"tokens": found["tokens"]})
            named = await send(
                server, "POST", "/tokenize", json={"prompt": "ab", "return_token_strs": True}
            )
        assert found["count"] == len(found["tokens"]) == len(text.encode()) - len("<end>") + 1
        assert (found["max_model_len"], found["token_strs"]) == (CONTEXT, None)
        assert back.json() == {"prompt": text}
        assert named.json()["token_strs"] == ["a", "b"]

    async def test_messages_are_counted_as_the_chat_counts_them(self) -> None:
        async with serving() as server:
            found = await send(server, "POST", "/tokenize", json={"messages": MESSAGES})
            answer = await chat(server)
            long = await send(server, "POST", "/tokenize", json={"prompt": "a" * 10 * CONTEXT})
        assert found.json()["count"] == answer.usage.prompt_tokens
        assert long.json()["count"] == 10 * CONTEXT

    @pytest.mark.parametrize(
        ("path", "body", "param"),
        [
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
            ("/tokenize", {"messages": []}, "messages"),
            ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
            (
                "/tokenize",
                {"messages": MESSAGES, "add_generation_prompt": False},
                "add_generation_prompt",
            ),
            ("/detokenize", {}, "tokens"),
            ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
            ("/detokenize", {"tokens": [1, 10**6]}, "tokens[1]"),
        ],
    )
    async def test_what_is_refused(self, path: str, body: Any, param: str) -> None:
        async with serving() as server:
            response = await send(server, "POST", path, json=body)
        assert (response.status_code, envelope(response)["param"]) == (400, param)


class TestOtherRoutes:
    async def test_models(self) -> None:
        async with serving(served_model_name=("a", "org/b")) as server:
            names = [model.id async for model in server.client.models.list()]
            assert (await server.client.models.retrieve("org/b")).id == "org/b"
            answer = await server.client.chat.completions.create(model="org/b", messages=MESSAGES)
            with pytest.raises(openai.NotFoundError) as caught:
                await server.client.models.retrieve("other")
        assert names == ["a", "org/b"]
        assert answer.model == "a"
        assert caught.value.code == "model_not_found"

    async def test_operations(self) -> None:
        async with serving() as server:
            for path in (
                *("/health", "/ready", "/version", "/metrics", "/load"),
                *("/v1/models", f"/v1/models/{MODEL}", "/tokenizer_info"),
            ):
                for method in ("GET", "HEAD"):
                    response = await send(server, method, path)
                    assert response.status_code == 200, (method, path)
                    assert "x-request-id" in response.headers
                    assert (response.text == "") == (method == "HEAD")

    @pytest.mark.parametrize("coarse", [False, True])
    async def test_inputs_of_8_bits_are_named(self, coarse: bool) -> None:  # noqa: FBT001 (parametrised)
        async with serving(FakeEngine(coarse=coarse)) as server:
            found = (await chat(server)).metrics["early_exit"]
        assert found.get("activation_dtype") == ("int8" if coarse else None)

    async def test_metrics_count_tokens_depth_and_ends(self) -> None:
        async with serving() as server:
            await chat(server, max_tokens=4)
            # As Prometheus asks; the names have their colons in either form.
            accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
            text = (await send(server, "GET", "/metrics", headers=accept)).text
        who = 'engine="0",model_name="fake"'
        both = 'engine="0",exit_layer="2",model_name="fake"'
        for line in (
            f"vllm:generation_tokens_total{{{who}}} 4.0",
            f"vllm:prompt_tokens_total{{{who}}} 8.0",
            f"vllm:time_to_first_token_seconds_count{{{who}}} 1.0",
            f"vllm:inter_token_latency_seconds_count{{{who}}} 3.0",
            f"offramp:exit_tokens_total{{{both}}} 2.0",
            f"offramp:layers_executed_total{{{who}}} 12.0",
            f"offramp:layers_possible_total{{{who}}} 16.0",
            f"offramp:exit_threshold{{{both}}} 0.9",
            'vllm:request_success_total{engine="0",finished_reason="length",model_name="fake"} 1.0',
        ):
            assert line in text
        assert text.startswith("# HELP")

    async def test_answers_to_head_end_behind_their_headers(self) -> None:
        """As the connection has it, on which clients drop what should not be there."""
        async with serving() as server:
            port = int(server.url.rsplit(":", 1)[1])
            whole = await send(server, "GET", "/v1/models")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = "HEAD /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
            writer.write(head.encode())
            answer = (await asyncio.wait_for(reader.read(), PATIENCE_S)).decode()
            writer.close()
        assert answer.startswith("HTTP/1.1 200")
        assert f"content-length: {len(whole.content)}" in answer
        assert answer.endswith("\r\n\r\n")
        assert answer.count("\r\n\r\n") == 1

    async def test_load_counts_requests_until_their_answers_end(self) -> None:
        engine = FakeEngine(permits=0)

        async def load() -> Any:
            return (await send(server, "GET", "/load")).json()

        async with serving(engine) as server:
            assert await load() == {"server_load": 0}
            plain = asyncio.create_task(chat(server, n=2))
            await engine.arrivals(2)
            engine.release(1)
            stream = await chat(server, stream=True)
            await engine.arrivals(1)
            assert await load() == {"server_load": 2}
            engine.release(1000)
            await plain
            async for _ in stream:
                pass
            # A client may be done a moment before the server is.
            while (await load())["server_load"]:
                pass
            await send(server, "POST", "/v1/chat/completions", content=b"{")
            assert await load() == {"server_load": 0}

    async def test_request_ids_are_echoed_or_made(self) -> None:
        async with serving() as server:
            mine = await send(server, "GET", "/version", headers={"X-Request-Id": "abc-1"})
            bad = await send(server, "GET", "/version", headers={"X-Request-Id": "a b"})
            error = await send(server, "GET", "/nope", headers={"X-Request-Id": "abc-2"})
        assert mine.headers["x-request-id"] == "abc-1"
        assert bad.headers["x-request-id"] not in {"", "a b"}
        assert error.headers["x-request-id"] == "abc-2"

    async def test_openapi_describes_the_routes(self) -> None:
        async with serving() as server:
            paths = (await send(server, "GET", "/openapi.json")).json()["paths"]
        assert {"/v1/chat/completions", "/v1/completions", "/health"} <= set(paths)


BAD_BODIES: list[tuple[str, Any, int, str | None]] = [
    ("no body", b"", 400, None),
    ("not json", b"{", 400, None),
    ("not an object", b"[]", 400, None),
    ("wrong encoding", b'{"messages": "\xff"}', 400, None),
    ("endless nesting", b'{"a":' + b"[" * 100_000, 400, None),
    ("endless number", b'{"seed":' + b"9" * 10_000 + b"}", 400, None),
    ("no messages", {}, 400, "messages"),
    ("empty messages", {"messages": []}, 400, "messages"),
    ("unknown role", {"messages": [{"role": "x", "content": "a"}]}, 400, "messages[0].role"),
    (
        "image part",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content",
    ),
    ("NUL", {"messages": [{"role": "user", "content": "\0"}]}, 400, "messages[0].content"),
    (
        "surrogate",
        {"messages": [{"role": "user", "content": "\ud800"}]},
        400,
        "messages[0].content",
    ),
    ("surrogate key", {"messages": MESSAGES, "early_exit": {"\ud800": 1}}, 400, "early_exit"),
    ("negative temperature", {"messages": MESSAGES, "temperature": -1}, 400, "temperature"),
    ("NaN", b'{"messages":[{"role":"user","content":"a"}],"top_p":NaN}', 400, "top_p"),
    ("65 bits", {"messages": MESSAGES, "seed": 2**64}, 400, "seed"),
    ("bias outside", {"messages": MESSAGES, "logit_bias": {"9999": 1}}, 400, "logit_bias"),
    ("template", {"messages": [{"role": "user", "content": "refuse me"}]}, 400, "messages"),
    (
        "long prompt",
        {"messages": [{"role": "user", "content": "a" * CONTEXT}]},
        400,
        "messages",
    ),
    ("huge prompt", {"messages": [{"role": "user", "content": "a" * 900_000}]}, 400, "messages"),
    ("10 MB", {"messages": [{"role": "user", "content": "a" * 10_000_000}]}, 413, None),
    ("answer too long", {"messages": MESSAGES, "max_tokens": CONTEXT}, 400, "messages"),
    ("unknown model", {"messages": MESSAGES, "model": "gpt"}, 404, "model"),
    ("quality", {"messages": MESSAGES, "early_exit": {"quality": 0.9}}, 400, "early_exit.quality"),
    (
        "layer outside",
        {"messages": MESSAGES, "early_exit": {"min_layer": 99}},
        400,
        "early_exit.min_layer",
    ),
    ("stream too", {"messages": [], "stream": True}, 400, "messages"),
    (
        "stream too long",
        {"messages": MESSAGES, "max_tokens": CONTEXT, "stream": True},
        400,
        "messages",
    ),
]


class TestRefusals:
    async def test_bad_bodies_get_the_envelope_and_the_server_goes_on(self) -> None:
        async with serving(max_body_size=1.0) as server:
            for name, body, status, param in BAD_BODIES:
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                headers = {"Content-Type": "application/json"}
                path = "/v1/chat/completions"
                response = await send(server, "POST", path, content=raw, headers=headers)
                assert response.status_code == status, (name, response.text[:200])
                assert envelope(response)["param"] == param, name
                assert len(response.content) < 800, name
            assert (await chat(server)).choices[0].message.content == REPLY

    async def test_framework_errors_have_the_envelope(self) -> None:
        async with serving() as server:
            cases = [
                ("GET", "/nope", 404, "not_found"),
                ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
                ("POST", "/health", 405, "method_not_allowed"),
                ("GET", "/v1/models/", 404, "model_not_found"),
            ]
            for method, path, status, code in cases:
                response = await send(server, method, path)
                assert response.status_code == status, path
                assert envelope(response)["code"] == code
            text = {"Content-Type": "text/plain"}
            path = "/v1/completions"
            response = await send(server, "POST", path, content=b"{}", headers=text)
            assert response.status_code == 400
            assert "application/json" in envelope(response)["message"]

    async def test_a_streamed_body_over_the_limit_is_refused(self) -> None:
        async def parts() -> Any:
            for _ in range(20):
                yield b"x" * 100_000

        async with serving(max_body_size=1.0) as server:
            response = await send(server, "POST", "/v1/completions", content=parts())
            assert response.status_code == 413
            assert envelope(response)["code"] == "request_too_large"

    async def test_a_body_of_too_many_values(self) -> None:
        async with serving() as server:
            for values in ("1," * 600_000, '"a":1,' * 200_000):
                content = f'{{"messages": [{values}1]}}'
                response = await send(server, "POST", "/v1/completions", content=content)
                assert response.status_code == 413
                assert envelope(response)["code"] == "request_too_large"

    async def test_a_fault_of_ours_tells_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with serving() as server:
            tokenizer = server.context.tokenizer
            assert tokenizer is not None

            def broken(*_: object) -> None:
                raise RuntimeError("secret")

            monkeypatch.setattr(tokenizer, "encode_rendered", broken)
            response = await post(server, "/v1/chat/completions", {"messages": MESSAGES})
        assert response.status_code == 500
        error = envelope(response)
        assert "secret" not in response.text
        assert response.headers["x-request-id"] in error["message"]

    async def test_a_panic_of_a_library_is_a_fault_of_ours(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class PanicException(BaseException):
            pass

        async with serving() as server:
            tokenizer = server.context.tokenizer
            assert tokenizer is not None

            def broken(*_: object) -> None:
                raise PanicException("secret")

            monkeypatch.setattr(tokenizer, "encode_rendered", broken)
            response = await post(server, "/v1/chat/completions", {"messages": MESSAGES})
        assert response.status_code == 500
        assert envelope(response)["code"] == "internal_error"
        assert "secret" not in response.text

    async def test_a_template_that_writes_too_much_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with serving() as server:
            tokenizer = server.context.tokenizer
            assert tokenizer is not None
            monkeypatch.setattr(tokenizer, "_render", lambda _: "x" * 10_000_000)
            response = await post(server, "/v1/chat/completions", {"messages": MESSAGES})
        assert response.status_code == 400
        assert envelope(response)["code"] == "context_length_exceeded"

    async def test_keys(self) -> None:
        async with serving(api_key=("one", "two")) as server:
            for value in ("one", "Basic one", "Bearer wrong", "Bearer onetwo", "Bearer é"):
                headers = {"Authorization": value.encode()}
                response = await send(server, "GET", "/v1/models", headers=headers)
                assert response.status_code == 401, value
                assert envelope(response)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
            for key in ("one", "two"):
                bearer = {"Authorization": f"Bearer {key}"}
                assert (await send(server, "GET", "/v1/models", headers=bearer)).is_success
            assert (await send(server, "GET", "/docs")).status_code == 401
            for path in ("/health", "/ready", "/version", "/metrics", "/load"):
                assert (await send(server, "GET", path)).status_code == 200

    async def test_a_full_queue_is_429_and_takes_no_part_of_a_request(self) -> None:
        engine = FakeEngine(permits=0)
        async with serving(engine, max_num_queued_reqs=0) as server:
            running = asyncio.create_task(chat(server))
            await engine.arrivals(1)
            with pytest.raises(openai.RateLimitError) as caught:
                await chat(server, n=4)
            assert caught.value.code == "queue_full"
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert server.context.driver.num_requests == 1
            engine.release(1000)
            await running
            assert len((await chat(server, n=4)).choices) == 4

    async def test_many_requests_at_once_are_answered_or_refused(self) -> None:
        async with serving(max_num_queued_reqs=20) as server:
            limits = httpx2.Limits(max_connections=200)
            async with httpx2.AsyncClient(
                base_url=server.url, timeout=PATIENCE_S, limits=limits
            ) as client:
                body = {"messages": MESSAGES}
                answers = await asyncio.gather(
                    *(client.post("/v1/chat/completions", json=body) for _ in range(200))
                )
            assert {answer.status_code for answer in answers} <= {200, 429}
            assert answers[0].status_code == 200
            assert (await chat(server)).choices[0].message.content == REPLY
            assert server.context.driver.num_requests == 0


class TestLeaving:
    async def test_a_stream_whose_client_leaves_is_aborted(self) -> None:
        engine = FakeEngine(permits=0)
        async with serving(engine) as server:
            engine.release(3)
            stream = await chat(server, stream=True, extra_body=ENDLESS)
            await anext(aiter(stream))
            await stream.close()
            await aborted(server)
            assert server.context.driver.num_requests == 0
            text = (await send(server, "GET", "/metrics")).text
        assert (
            'vllm:request_success_total{engine="0",finished_reason="abort",model_name="fake"} 1.0'
            in text
        )

    @pytest.mark.parametrize("n", [1, 3])
    async def test_a_plain_request_whose_client_leaves_is_aborted(self, n: int) -> None:
        engine = FakeEngine(permits=0)
        async with serving(engine) as server:
            request = asyncio.create_task(chat(server, n=n, extra_body=ENDLESS))
            await engine.arrivals(n)
            request.cancel()
            await aborted(server)
            with pytest.raises(asyncio.CancelledError):
                await request
            engine.release(1000)
            assert (await chat(server)).choices[0].message.content == REPLY

    async def test_silence_in_a_stream_is_filled_with_comments(self) -> None:
        engine = FakeEngine(permits=0)
        async with serving(engine, sse_keep_alive_interval=0.01) as server:
            body = {"messages": MESSAGES, "stream": True}
            client = httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S)
            async with client, client.stream("POST", "/v1/chat/completions", json=body) as got:
                lines = got.aiter_lines()
                assert await anext(lines) == ": keep-alive"
                engine.release(1000)
                rest = [line async for line in lines if line.startswith("data")]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) > 1


class TestEndings:
    async def test_an_engine_that_hangs_with_work_is_unhealthy(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = FakeEngine(permits=0)
        async with serving(engine) as server:
            monkeypatch.setattr(ops, "STALLED_AFTER_S", -1.0)
            assert (await send(server, "GET", "/health")).status_code == 200
            request = asyncio.create_task(chat(server))
            await engine.arrivals(1)
            assert (await send(server, "GET", "/health")).status_code == 503
            engine.release(1000)
            await request
            assert (await send(server, "GET", "/health")).status_code == 200

    async def test_an_engine_that_fails_ends_streams_with_an_error_and_is_unhealthy(self) -> None:
        async with serving(FakeEngine(fail_at=3)) as server:
            body = {"messages": MESSAGES, "stream": True}
            response = await post(server, "/v1/chat/completions", body)
            assert response.status_code == 200
            *tokens, error, done, rest = response.text.split("\n\n")
            assert len(tokens) == 3
            assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
            assert (done, rest) == ("data: [DONE]", "")
            assert (await send(server, "GET", "/health")).status_code == 503
            assert (await send(server, "GET", "/ready")).status_code == 503
            response = await post(server, "/v1/chat/completions", {"messages": MESSAGES})
            assert response.status_code == 503
            assert envelope(response)["code"] == "engine_failed"

    async def test_the_client_raises_the_error_of_a_broken_stream(self) -> None:
        async with serving(FakeEngine(fail_at=1)) as server:
            with pytest.raises(openai.APIError):
                await chunks(server)

    async def test_a_plain_request_of_a_failing_engine_is_a_500(self) -> None:
        async with serving(FakeEngine(fail_at=3)) as server:
            response = await post(server, "/v1/chat/completions", {"messages": MESSAGES})
            assert response.status_code == 500
            assert envelope(response)["type"] == "server_error"

    async def test_draining_finishes_streams_and_refuses_new_requests(self) -> None:
        engine = FakeEngine(permits=0)
        async with serving(engine) as server:
            engine.release(1)
            stream = await chat(server, stream=True)
            first = await anext(aiter(stream))
            drain = asyncio.create_task(server.context.driver.drain(PATIENCE_S))
            await asyncio.sleep(0)
            assert (await send(server, "GET", "/ready")).status_code == 503
            assert (await send(server, "GET", "/health")).status_code == 200
            response = await post(server, "/v1/chat/completions", {"messages": MESSAGES})
            assert response.status_code == 503
            assert "retry-after" in response.headers
            assert envelope(response)["code"] == "shutting_down"
            engine.release(1000)
            rest = [chunk async for chunk in stream]
            assert await drain
        text = "".join(c.delta.content or "" for k in (first, *rest) for c in k.choices)
        assert text == REPLY

    async def test_streams_that_outlive_the_drain_end_with_an_error(self) -> None:
        engine = FakeEngine(permits=0)
        async with serving(engine) as server:
            engine.release(1)
            stream = await chat(server, stream=True)
            await anext(aiter(stream))
            assert not await server.context.driver.drain(0.0)
            await server.context.driver.stop()
            with pytest.raises(openai.APIError):
                [chunk async for chunk in stream]
