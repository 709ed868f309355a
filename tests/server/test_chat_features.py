"""Log-probabilities, forms of answers, tools and thoughts over HTTP, with a fake engine."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.lib.streaming.chat import AsyncChatCompletionStreamManager
from pydantic import BaseModel

from tests.server.fakes import MODEL, FakeEngine, Running, byte_backend, serving
from tests.server.test_app import MESSAGES, chat, chunks, envelope, post, send

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
# Enough for tools in words.
ROOM = 2048
NOW: Any = {"type": "function", "function": {"name": "now"}}


def prompt_of(server: Running) -> str:
    return byte_backend().decode(list(server.engine.added[-1].prompt), skip_special_tokens=False)


class TestLogprobs:
    async def test_of_a_chat(self) -> None:
        async with serving(FakeEngine("añb")) as server:
            choice = (await chat(server, logprobs=True, top_logprobs=2)).choices[0]
        entries = choice.logprobs.content
        # The end token is no part of the text, and so is not listed.
        assert b"".join(bytes(entry.bytes) for entry in entries).decode() == "añb"
        assert [entry.token for entry in entries] == ["a", "\ufffd", "\ufffd", "b"]
        assert [entry.logprob for entry in entries] == [-0.25] * 4
        assert [[top.logprob for top in entry.top_logprobs] for entry in entries] == [
            [-0.25, -1.25]
        ] * 4
        assert choice.logprobs.refusal is None

    async def test_without_any_best_tokens(self) -> None:
        async with serving() as server:
            choice = (await chat(server, logprobs=True)).choices[0]
            plain = (await chat(server)).choices[0]
        assert [entry.top_logprobs for entry in choice.logprobs.content] == [[]] * 13
        assert plain.logprobs is None

    async def test_streamed_ones_are_those_of_the_plain_answer(self) -> None:
        async with serving(FakeEngine("añb")) as server:
            whole = (await chat(server, logprobs=True, top_logprobs=1)).choices[0]
            got = await chunks(server, logprobs=True, top_logprobs=1)
        streamed = [
            entry
            for chunk in got
            for c in chunk.choices
            if c.logprobs
            for entry in c.logprobs.content or ()
        ]
        assert streamed == whole.logprobs.content

    async def test_what_a_stop_string_cuts_away_is_not_listed(self) -> None:
        async with serving(FakeEngine("Hello END of it")) as server:
            whole = (await chat(server, logprobs=True, stop="END")).choices[0]
            got = await chunks(server, logprobs=True, stop="END")
        assert whole.message.content == "Hello "
        assert "".join(entry.token for entry in whole.logprobs.content) == "Hello "
        streamed = "".join(
            entry.token
            for chunk in got
            for c in chunk.choices
            if c.logprobs
            for entry in c.logprobs.content or ()
        )
        assert streamed == "Hello "

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"logprobs": 1}, "logprobs"),
            ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ],
    )
    async def test_bad_wishes_in_a_chat(self, fields: dict[str, Any], param: str) -> None:
        async with serving() as server:
            body = {"messages": MESSAGES, **fields}
            response = await post(server, "/v1/chat/completions", body)
        assert response.status_code == 400
        assert envelope(response)["param"] == param

    async def test_of_a_completion(self) -> None:
        async with serving(FakeEngine("añb")) as server:
            answer = await server.client.completions.create(model=MODEL, prompt="hi", logprobs=2)
        found = answer.choices[0].logprobs
        assert found is not None
        assert found.tokens == ["a", "bytes:\\xc3", "bytes:\\xb1", "b"]
        assert found.text_offset == [0, 1, 1, 2]
        assert found.token_logprobs == [-0.25] * 4
        assert found.top_logprobs is not None
        assert found.top_logprobs[3] == {"b": -0.25, "c": -1.25}

    async def test_an_echo_has_those_of_the_prompt(self) -> None:
        """What evaluations read: the prompt's tokens, the first without a log-probability."""
        async with serving(FakeEngine("yz")) as server:
            answer = await server.client.completions.create(
                model=MODEL, prompt="hé", logprobs=1, echo=True, max_tokens=1
            )
        choice = answer.choices[0]
        assert choice.text == "héy"
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == ["h", "bytes:\\xc3", "bytes:\\xa9", "y"]
        assert choice.logprobs.text_offset == [0, 1, 1, 2]
        assert choice.logprobs.token_logprobs == [None, -0.25, -0.25, -0.25]
        assert choice.logprobs.top_logprobs is not None
        assert choice.logprobs.top_logprobs[0] is None

    async def test_nothing_but_the_prompt(self) -> None:
        body = {"prompt": ["hé", "b"], "logprobs": 0, "echo": True, "max_tokens": 0}
        async with serving() as server:
            answer = (await post(server, "/v1/completions", body)).json()
            streamed = await server.client.completions.create(
                model=MODEL, prompt="hé", echo=True, max_tokens=0, stream=True
            )
            text = "".join([c.text async for chunk in streamed for c in chunk.choices])
        assert [choice["text"] for choice in answer["choices"]] == ["hé", "b"]
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.25, -0.25]
        assert answer["choices"][0]["logprobs"]["top_logprobs"] is None
        assert answer["usage"]["completion_tokens"] == 0
        assert text == "hé"

    async def test_no_tokens_without_an_echo(self) -> None:
        async with serving() as server:
            response = await post(server, "/v1/completions", {"prompt": "a", "max_tokens": 0})
        assert envelope(response)["param"] == "max_tokens"

    async def test_an_echo_of_token_ids(self) -> None:
        ids = byte_backend().encode("hé").ids
        async with serving(FakeEngine("yz")) as server:
            answer = await server.client.completions.create(model=MODEL, prompt=ids, echo=True, n=2)
        assert [choice.text for choice in answer.choices] == ["héyz", "héyz"]

    async def test_of_the_prompt_in_vllms_form(self) -> None:
        async with serving() as server:
            body = {"prompt": "hey", "prompt_logprobs": 1, "max_tokens": 1}
            answer = (await post(server, "/v1/completions", body)).json()
        first, second, third = answer["choices"][0]["prompt_logprobs"]
        assert first is None
        (entry,) = second.values()
        assert entry == {"logprob": -0.25, "rank": 1, "decoded_token": "e"}
        assert len(third) == 1


class TestForms:
    @pytest.mark.parametrize(
        "fields",
        [
            {"response_format": {"type": "json_object"}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "object"}, "strict": True},
                }
            },
            {"structured_outputs": {"json": {"type": "object"}}},
            {"structured_outputs": {"json": '{"type": "object"}'}},
            {"structured_outputs": {"regex": "a+"}},
            {"structured_outputs": {"choice": ["a", "b"]}},
            {"structured_outputs": {"grammar": 'root ::= "a"'}},
            {"structured_outputs": {"json_object": True}},
            {"guided_json": {"type": "object"}},
            {"guided_regex": "a+"},
            {"guided_choice": ["a", "b"]},
            {"guided_grammar": 'root ::= "a"'},
            {"json_schema": {"type": "object"}},
            {"grammar": 'root ::= "a"'},
        ],
    )
    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    async def test_the_engine_gets_a_grammar(self, path: str, fields: dict[str, Any]) -> None:
        prompt = {"messages": MESSAGES} if "chat" in path else {"prompt": "a"}
        async with serving() as server:
            response = await post(server, path, {**prompt, **fields, "n": 2})
            assert response.status_code == 200, response.text
            first, second = server.engine.added
        assert first.grammar is not None
        assert first.grammar is second.grammar
        assert first.grammar.start() is not second.grammar.start()

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"response_format": {"type": "text"}},
            {"structured_outputs": None},
            {"grammar": None},
        ],
    )
    async def test_free_answers_have_none(self, fields: dict[str, Any]) -> None:
        async with serving() as server:
            await post(server, "/v1/chat/completions", {"messages": MESSAGES, **fields})
            assert server.engine.added[0].grammar is None

    @pytest.mark.parametrize(
        ("fields", "param", "says"),
        [
            ({"response_format": {"type": "xml"}}, "response_format.type", ""),
            ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs"),
            (
                {
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {"name": "a", "schema": {"not": {}}},
                    }
                },
                "response_format",
                "not",
            ),
            ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look"),
            ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ""),
            (
                {"structured_outputs": {"structural_tag": "{}"}},
                "structured_outputs.structural_tag",
                "",
            ),
            ({"guided_grammar": "start: nowhere"}, "guided_grammar", "nowhere"),
            ({"grammar": "root ::= a", "guided_regex": "a"}, "grammar", "exclude"),
            (
                {"response_format": {"type": "json_object"}, "guided_choice": ["a"]},
                "guided_choice",
                "exclude",
            ),
            (
                {
                    "response_format": {"type": "json_object"},
                    "tools": [NOW],
                    "tool_choice": "required",
                },
                "response_format",
                "tools",
            ),
        ],
    )
    async def test_what_cannot_be_kept_is_refused(
        self, fields: dict[str, Any], param: str, says: str
    ) -> None:
        async with serving() as server:
            body = {"messages": MESSAGES, **fields}
            response = await post(server, "/v1/chat/completions", body)
            assert not server.engine.added
        assert response.status_code == 400
        error = envelope(response)
        assert error["param"] == param
        assert says in error["message"]

    async def test_a_schema_nested_too_deeply_is_refused(self) -> None:
        schema: dict[str, Any] = {"type": "string"}
        for _ in range(400):
            schema = {"type": "array", "items": schema}
        async with serving() as server:
            body = {"messages": MESSAGES, "guided_json": schema}
            response = await post(server, "/v1/chat/completions", body)
        assert response.status_code == 400, response.text
        assert envelope(response)["param"] == "guided_json"

    async def test_the_sdk_parses_into_a_model(self) -> None:
        class Place(BaseModel):
            city: str

        async with serving(FakeEngine('{"city": "Rome"}')) as server:
            answer = await server.client.chat.completions.parse(
                model=MODEL, messages=MESSAGES, response_format=Place
            )
        assert answer.choices[0].message.parsed == Place(city="Rome")


class TestTools:
    async def test_a_call(self) -> None:
        async with serving(FakeEngine(f"Let me see.\n{CALL}", context=ROOM)) as server:
            choice = (await chat(server, tools=[WEATHER])).choices[0]
            assert server.engine.added[0].grammar is not None
            assert "get_weather" in prompt_of(server)
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me see."
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Rome"}

    async def test_an_answer_of_calls_alone_has_no_content(self) -> None:
        async with serving(FakeEngine(f"{CALL}\n{CALL}", context=ROOM)) as server:
            choice = (await chat(server, tools=[WEATHER], tool_choice="required")).choices[0]
        assert choice.message.content is None
        first, second = choice.message.tool_calls
        assert first.id != second.id

    @pytest.mark.parametrize("reply", [CALL, f"Well.\n{CALL}\n{CALL}", "No call."])
    async def test_a_stream_adds_up_to_the_plain_answer(self, reply: str) -> None:
        async with serving(FakeEngine(reply, context=ROOM)) as server:
            whole = (await chat(server, tools=[WEATHER])).choices[0]
            manager: AsyncChatCompletionStreamManager[Any] = server.client.chat.completions.stream(
                model=MODEL, messages=MESSAGES, tools=[WEATHER]
            )
            async with manager as stream:
                streamed = (await stream.get_final_completion()).choices[0]
        assert streamed.finish_reason == whole.finish_reason
        assert (streamed.message.content or None) == (whole.message.content or None)
        calls = [call.function for call in streamed.message.tool_calls or ()]
        expected = [call.function for call in whole.message.tool_calls or ()]
        assert [(call.name, call.arguments) for call in calls] == [
            (call.name, call.arguments) for call in expected
        ]

    async def test_the_name_comes_first_and_arguments_bit_by_bit(self) -> None:
        async with serving(FakeEngine(CALL, context=ROOM)) as server:
            got = await chunks(server, tools=[WEATHER])
        deltas = [call for chunk in got for c in chunk.choices for call in c.delta.tool_calls or ()]
        assert deltas[0].function is not None
        assert deltas[0].function.name == "get_weather"
        assert deltas[0].id is not None
        assert all(
            call.id is None and call.function and not call.function.name for call in deltas[1:]
        )
        assert len(deltas) > 5
        assert not any(c.delta.content for chunk in got for c in chunk.choices)

    async def test_a_call_that_is_cut_off_ends_by_length(self) -> None:
        async with serving(FakeEngine(CALL, context=ROOM)) as server:
            choice = (await chat(server, tools=[WEATHER], max_tokens=60)).choices[0]
        assert choice.finish_reason == "length"
        assert choice.message.tool_calls[0].function.arguments.startswith('{"city"')

    async def test_none_means_that_no_tool_is_known(self) -> None:
        async with serving(FakeEngine(CALL, context=ROOM)) as server:
            choice = (await chat(server, tools=[WEATHER], tool_choice="none")).choices[0]
            assert "get_weather" not in prompt_of(server)
            assert server.engine.added[0].grammar is None
        assert choice.message.content == CALL
        assert choice.message.tool_calls is None

    async def test_one_tool_by_its_name(self) -> None:
        named = {"type": "function", "function": {"name": "now"}}
        async with serving(FakeEngine("x", context=ROOM)) as server:
            await chat(server, tools=[WEATHER, NOW], tool_choice=named)
            grammar = server.engine.added[0].grammar
            assert grammar is not None
            forced = byte_backend().decode(grammar.start().forced())
        assert '"name": "now"' in forced

    async def test_a_whole_round(self) -> None:
        async with serving(FakeEngine(CALL, context=ROOM)) as server:
            message = (await chat(server, tools=[WEATHER])).choices[0].message
            result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21°"}
            await chat(server, messages=[*MESSAGES, message, result], tools=[WEATHER])
            prompt = prompt_of(server)
        assert f"assistant:{CALL}" in prompt
        assert "user:<tool_response>\n21°\n</tool_response>" in prompt

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"tools": []}, "tools"),
            ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]"),
            ({"tools": [{"type": "function"}]}, "tools[0].function"),
            (
                {"tools": [{"type": "function", "function": {"name": "a b"}}]},
                "tools[0].function.name",
            ),
            ({"tools": [NOW, NOW]}, "tools"),
            ({"tools": [NOW], "tool_choice": "sometimes"}, "tool_choice"),
            (
                {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}},
                "tool_choice",
            ),
            ({"tool_choice": "auto"}, "tool_choice"),
            (
                {
                    "tools": [
                        {"type": "function", "function": {"name": "a", "parameters": {"not": {}}}}
                    ]
                },
                "tools",
            ),
            ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0]"),
            (
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": "a",
                            "tool_calls": [{"function": {"name": "a"}}],
                        }
                    ]
                },
                "messages[0]",
            ),
        ],
    )
    async def test_what_makes_no_sense_is_refused(self, fields: dict[str, Any], param: str) -> None:
        async with serving() as server:
            body = {"messages": MESSAGES, **fields}
            response = await post(server, "/v1/chat/completions", body)
        assert response.status_code == 400, response.text
        assert envelope(response)["param"] == param

    async def test_completions_know_no_tools(self) -> None:
        async with serving() as server:
            response = await post(server, "/v1/completions", {"prompt": "a", "tools": [NOW]})
        assert envelope(response)["code"] == "unsupported_parameter"

    async def test_calls_are_counted_as_an_end_of_their_own(self) -> None:
        async with serving(FakeEngine(CALL, context=ROOM)) as server:
            await chat(server, tools=[WEATHER])
            text = (await send(server, "GET", "/metrics")).text
        begin, label = "vllm:request_success_total{", 'finished_reason="tool_calls"'
        (line,) = [each for each in text.splitlines() if each.startswith(begin) and label in each]
        assert line.endswith(" 1.0")


class TestThoughts:
    REPLY = "<think>\nIt is so.\n</think>\n\nYes."

    async def test_they_are_apart_under_both_names(self) -> None:
        async with serving(FakeEngine(self.REPLY), reasoning_parser="think") as server:
            answer = await chat(server)
        message = answer.choices[0].message
        assert message.content == "Yes."
        assert message.reasoning == message.reasoning_content == "It is so."
        assert answer.usage.completion_tokens_details.reasoning_tokens > 8

    async def test_streamed(self) -> None:
        async with serving(FakeEngine(self.REPLY), reasoning_parser="think") as server:
            got: list[Any] = await chunks(server)
        deltas = [c.delta for chunk in got for c in chunk.choices]
        thoughts = "".join((d.model_extra or {}).get("reasoning", "") for d in deltas)
        assert thoughts == "It is so."
        assert "".join(d.content or "" for d in deltas) == "Yes."

    async def test_they_are_text_where_the_model_has_none(self) -> None:
        async with serving(FakeEngine(self.REPLY)) as server:
            message = (await chat(server)).choices[0].message
        assert message.content == self.REPLY
        assert not hasattr(message, "reasoning")

    async def test_earlier_ones_reach_the_template(self) -> None:
        said = {"role": "assistant", "content": "a", "reasoning_content": "because"}
        async with serving() as server:
            body = {"messages": [*MESSAGES, said, *MESSAGES]}
            assert (await post(server, "/v1/chat/completions", body)).status_code == 200

    async def test_effort_is_an_option_of_the_template(self) -> None:
        async with serving() as server:
            await chat(server, reasoning_effort="none")
            assert prompt_of(server).startswith("[enable_thinking=False][reasoning_effort=none]")


class TestTemplates:
    async def test_options(self) -> None:
        async with serving() as server:
            await chat(server, extra_body={"chat_template_kwargs": {"style": "short"}})
            assert prompt_of(server).startswith("[style=short]")

    async def test_an_answer_goes_on(self) -> None:
        said = [*MESSAGES, {"role": "assistant", "content": "I am"}]
        async with serving() as server:
            await chat(server, messages=said, extra_body={"continue_final_message": True})
            options = prompt_of(server).partition("user:")[0]
        assert options == "[add_generation_prompt=False][continue_final_message=True]"

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
            ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
            ({"continue_final_message": True}, "continue_final_message"),
            (
                {
                    "messages": [{"role": "assistant", "content": "a"}],
                    "continue_final_message": True,
                    "add_generation_prompt": True,
                },
                "continue_final_message",
            ),
            ({"chat_template": "{{ x }}"}, "chat_template"),
        ],
    )
    async def test_what_is_refused(self, fields: dict[str, Any], param: str) -> None:
        async with serving() as server:
            body = {"messages": MESSAGES, **fields}
            response = await post(server, "/v1/chat/completions", body)
        assert response.status_code == 400
        assert envelope(response)["param"] == param


class TestLimits:
    async def test_they_reach_the_engine(self) -> None:
        async with serving() as server:
            extra = {
                "priority": -2,
                "cache_salt": "mine",
                "allowed_token_ids": [7, 5, 7],
                "bad_words": ["ab"],
            }
            await chat(server, extra_body=extra)
            request = server.engine.added[0]
        assert (request.priority, request.cache_salt) == (-2, "mine")
        assert request.sampling.allowed_token_ids == (5, 7)
        a, b, space = byte_backend().encode("ab ").ids
        assert request.sampling.bad_words == ((a, b), (space, a, b))

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"priority": "high"}, "priority"),
            ({"priority": 2**40}, "priority"),
            ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
            ({"bad_words": [""]}, "bad_words[0]"),
            ({"cache_salt": 1}, "cache_salt"),
        ],
    )
    async def test_out_of_range(self, fields: dict[str, Any], param: str) -> None:
        async with serving() as server:
            body = {"messages": MESSAGES, **fields}
            response = await post(server, "/v1/chat/completions", body)
        assert response.status_code == 400
        assert envelope(response)["param"] == param


class TestEnds:
    async def test_the_finish_reason_has_a_chunk_of_its_own(self) -> None:
        async with serving() as server:
            got = await chunks(server, max_tokens=3)
            texts = await server.client.completions.create(
                model=MODEL, prompt="a", max_tokens=3, stream=True
            )
            last_text = [chunk async for chunk in texts][-1].choices[0]
        last = got[-1].choices[0]
        assert last.finish_reason == "length"
        assert last.delta.model_dump(exclude_none=True) == {}
        assert (last_text.text, last_text.finish_reason) == ("", "length")

    async def test_an_empty_answer_is_one_chunk_and_its_end(self) -> None:
        async with serving(FakeEngine("")) as server:
            got = await chunks(server)
        assert [c.finish_reason for chunk in got for c in chunk.choices][-1] == "stop"
        assert got[0].choices[0].delta.role == "assistant"

    async def test_a_model_may_be_required(self) -> None:
        async with serving(require_model=True) as server:
            response = await post(server, "/v1/chat/completions", {"messages": MESSAGES})
            assert (await chat(server)).choices
            tokens = await post(server, "/tokenize", {"prompt": "a"})
            assert tokens.status_code == 200
        error = envelope(response)
        assert (error["param"], error["code"]) == ("model", "missing_required_parameter")
        with pytest.raises(openai.NotFoundError):
            async with serving() as server:
                await server.client.chat.completions.create(model="other", messages=MESSAGES)
