"""Thoughts, text and calls found in an answer, however it is cut into pieces."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.server.api.tool_bodies import CalledFunction, ToolCall
from offramp.server.text.answer_parts import AnswerParser, CallPart, Part, ReasoningPart, TextPart
from offramp.server.text.tools import Tool, ToolFormat, tool_format, with_instructions

HERMES, LLAMA, MISTRAL = ToolFormat.HERMES, ToolFormat.LLAMA3_JSON, ToolFormat.MISTRAL


@dataclass
class Answer:
    """An answer put together again."""

    text: str = ""
    thoughts: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)

    def add(self, parts: list[Part]) -> None:
        for part in parts:
            match part:
                case TextPart():
                    assert part.text
                    self.text += part.text
                case ReasoningPart():
                    assert part.text
                    self.thoughts += part.text
                case CallPart(index, call_id, name, arguments):
                    assert (call_id is None) == (name is None)
                    if name is not None:
                        assert index == len(self.calls)
                        self.calls.append((name, ""))
                    known = self.calls[index]
                    self.calls[index] = (known[0], known[1] + arguments)


def read(text: str, cuts: list[int], tools: ToolFormat | None = None, **settings: bool) -> Answer:
    """The answer ``text``, given in pieces that end at ``cuts``."""
    parser, answer = AnswerParser(tools, **settings), Answer()
    bounds = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    for start, end in pairwise(bounds):
        answer.add(parser.push(text[start:end]))
    answer.add(parser.flush())
    assert parser.num_calls == len(answer.calls)
    return answer


CALL = '{"name": "get", "arguments": {"a": "x}\\"", "b": [1, {"c": 2}]}}'
TURNED = '{"arguments": {}, "name": "b"}'
ARGUMENTS = '{"a": "x}\\"", "b": [1, {"c": 2}]}'
ANSWERS: list[tuple[ToolFormat | None, dict[str, bool], str, Answer]] = [
    (None, {}, "a <tool_call> is text", Answer("a <tool_call> is text")),
    (HERMES, {}, "plain <tool text\n", Answer("plain <tool text\n")),
    (HERMES, {}, "", Answer()),
    (
        HERMES,
        {},
        f"Hm.\n<tool_call>\n{CALL}\n</tool_call>",
        Answer("Hm.", "", [("get", ARGUMENTS)]),
    ),
    (
        HERMES,
        {},
        f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{TURNED}</tool_call>",
        Answer("", "", [("get", ARGUMENTS), ("b", "{}")]),
    ),
    (
        HERMES,
        {},
        '<tool_call>{"name": "a", "arguments": {}}</tool_call>\n\nDone.',
        Answer("Done.", "", [("a", "{}")]),
    ),
    # Arguments in a string, as some models write them.
    (
        HERMES,
        {},
        '<tool_call>{"name": "a", "arguments": "{\\"b\\": 1}"}</tool_call>',
        Answer("", "", [("a", '{"b": 1}')]),
    ),
    # An answer that ends in the midst of a call keeps what there is.
    (
        HERMES,
        {},
        '<tool_call>\n{"name": "a", "arguments": {"b": "cu',
        Answer("", "", [("a", '{"b": "cu')]),
    ),
    (HERMES, {}, '<tool_call>\n{"nam', Answer('<tool_call>\n{"nam')),
    (
        HERMES,
        {},
        "<tool_call>\nno call</tool_call> hm",
        Answer("<tool_call>\nno call</tool_call> hm"),
    ),
    (HERMES, {}, '<tool_call>{"a": 1}</tool_call>', Answer('<tool_call>{"a": 1}</tool_call>')),
    (
        HERMES,
        {},
        '<tool_call>{"name": 1}</tool_call>',
        Answer('<tool_call>{"name": 1}</tool_call>'),
    ),
    (
        MISTRAL,
        {},
        'So: [TOOL_CALLS] [{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]',
        Answer("So:", "", [("a", '{"x": 1}'), ("b", "{}")]),
    ),
    (
        MISTRAL,
        {},
        '[TOOL_CALLS]get_it[ARGS]{"city": "Paris"}[TOOL_CALLS]two{"z": 2}',
        Answer("", "", [("get_it", '{"city": "Paris"}'), ("two", '{"z": 2}')]),
    ),
    (MISTRAL, {}, "[TOOL_CALLS] what else?", Answer("[TOOL_CALLS] what else?")),
    (
        LLAMA,
        {},
        '{"name": "a", "parameters": {"x": 1}}; {"name": "b", "parameters": {}}',
        Answer("", "", [("a", '{"x": 1}'), ("b", "{}")]),
    ),
    (
        LLAMA,
        {},
        '<|python_tag|>{"name": "a", "parameters": {}}',
        Answer("", "", [("a", "{}")]),
    ),
    (LLAMA, {}, '{"answer": 42}', Answer('{"answer": 42}')),
    (LLAMA, {}, 'Text {"name": "a"}', Answer('Text {"name": "a"}')),
    (
        None,
        {"reasoning": True},
        "<think>\nlet me\nsee\n</think>\n\nIt is so.\n",
        Answer("It is so.\n", "let me\nsee"),
    ),
    (
        None,
        {"reasoning": True, "thinking": True},
        "see\n</think>\n\nSo </think>",
        Answer("So </think>", "see"),
    ),
    (None, {"reasoning": True}, "no thoughts", Answer("no thoughts")),
    (None, {"reasoning": True}, "<thin", Answer("<thin")),
    (None, {"reasoning": True}, "<think>never ends", Answer("", "never ends")),
    (
        HERMES,
        {"reasoning": True},
        '<think>a <tool_call> b</think>\n<tool_call>{"name": "a", "arguments": {}}</tool_call>',
        Answer("", "a <tool_call> b", [("a", "{}")]),
    ),
]


@pytest.mark.parametrize(("tools", "settings", "text", "expected"), ANSWERS)
@given(data=st.data())
def test_parts_do_not_depend_on_how_the_answer_is_cut(
    tools: ToolFormat | None,
    settings: dict[str, bool],
    text: str,
    expected: Answer,
    data: st.DataObject,
) -> None:
    cuts = data.draw(st.lists(st.integers(0, max(len(text), 1)), max_size=len(text)))
    assert read(text, cuts, tools, **settings) == expected
    assert read(text, list(range(len(text))), tools, **settings) == expected


@given(st.text(alphabet='<>/_[]{}":;, \ntoolcal'), st.lists(st.integers(0, 60)))
def test_nothing_is_lost_of_an_answer_without_calls(text: str, cuts: list[int]) -> None:
    for tools in (HERMES, LLAMA):
        answer = read(text, cuts, tools)
        assert not answer.calls
        # Space around what looked like a call belongs to nobody.
        assert "".join(answer.text.split()) == "".join(text.split())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(0, 400)),
    st.fixed_dictionaries({"ensure_ascii": st.booleans()}),
)
def test_any_arguments_come_through(
    calls: list[dict[str, Any]], cuts: list[int], style: dict[str, Any]
) -> None:
    written = [json.dumps({"name": "f", "arguments": each}, **style) for each in calls]
    text = "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in written)
    answer = read(text, cuts, HERMES)
    assert [json.loads(arguments) for _, arguments in answer.calls] == calls
    assert not answer.text


def test_arguments_come_as_they_are_written() -> None:
    parser = AnswerParser(HERMES)
    assert parser.push('<tool_call>\n{"name": "f", "arg') == []
    (begin,) = parser.push('uments": {"city": "Par')
    assert isinstance(begin, CallPart)
    assert begin.name == "f"
    assert begin.arguments == '{"city": "Par'
    assert parser.push("is") == [CallPart(0, arguments="is")]


def test_ids_are_what_each_family_accepts() -> None:
    for tools, text in (
        (HERMES, '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}}]'),
    ):
        parser = AnswerParser(tools)
        (call,) = [part for part in parser.push(text) if isinstance(part, CallPart)]
        assert call.id is not None
        if tools is MISTRAL:
            assert len(call.id) == 9
            assert call.id.isalnum()
        else:
            assert call.id.startswith("call_")


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ messages }}", HERMES),
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", MISTRAL),
        ("{% if tools %}Environment: ipython{% endif %}", LLAMA),
        ("{% if tools %}{{ tools }}{% endif %}", HERMES),
    ],
)
def test_the_form_goes_by_the_template(template: str, form: ToolFormat) -> None:
    assert tool_format(template) is form


def test_a_template_without_tools_is_told_of_them_in_words() -> None:
    tool = Tool("get", "Gets.", {"type": "object"})
    call = {"id": "1", "type": "function", "function": {"name": "get", "arguments": {"é": 1}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    system, user, assistant, result = with_instructions(messages, [tool])
    assert system["content"].startswith("Be brief.\n\n")
    assert '"name": "get"' in system["content"]
    assert user == messages[1]
    assert assistant == {
        "role": "assistant",
        "content": '<tool_call>\n{"name": "get", "arguments": {"é": 1}}\n</tool_call>',
    }
    assert result == {"role": "user", "content": "<tool_response>\n42\n</tool_response>"}
    assert with_instructions(messages[1:2], [tool])[0]["role"] == "system"
    assert with_instructions(messages[1:2], []) == messages[1:2]


def test_arguments_nested_without_end_are_no_call() -> None:
    """Python's own reader of JSON would end the answer, or the request that repeats it."""
    deep = '{"a":' * 50_000 + "1" + "}" * 50_000
    whole = f'<tool_call>{{"arguments": {deep}, "name": "b"}}</tool_call>'
    assert read(whole, [], HERMES).calls == []
    call = ToolCall(function=CalledFunction(name="b", arguments=deep))
    assert call.for_template()["function"]["arguments"] == deep
