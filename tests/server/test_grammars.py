"""Grammars: what they allow, force and refuse, token by token."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.server.text.answer_parts import AnswerParser, CallPart, TextPart
from offramp.server.text.grammars import (
    Form,
    Grammar,
    GrammarCompiler,
    GrammarError,
    GrammarState,
    source_of,
    source_of_calls,
)
from offramp.server.text.tokenizer import Tokenizer
from offramp.server.text.tools import Tool, ToolFormat, ToolUse
from tests.server.fakes import END, byte_backend

BACKEND = byte_backend()
VOCAB = BACKEND.get_vocab_size()
COMPILER = GrammarCompiler(Tokenizer(BACKEND, None), VOCAB, (END,))
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def grammar(form: Form, *, thinking: bool | None = None) -> Grammar:
    return COMPILER.compile(source_of(form, thinking=thinking))


def ids(text: str) -> list[int]:
    return list(BACKEND.encode(text, add_special_tokens=False).ids)


def allowed(state: GrammarState, drafts: list[int] | None = None) -> set[int]:
    bits = np.unpackbits(state.mask(drafts or []).view(np.uint8), bitorder="little", count=VOCAB)
    return set(bits.nonzero()[0].tolist())


def follows(made: Grammar, text: str) -> bool:
    """Whether ``text`` is an answer that keeps to the grammar from its beginning to its end."""
    state = made.start()
    for token in ids(text):
        if token not in allowed(state):
            return False
        state.accept(token)
    return state.finished or END in allowed(state)


@pytest.mark.parametrize(
    ("form", "text", "right"),
    [
        (Form("json_schema", SCHEMA), '{"city": "Paris", "days": 3}', True),
        (Form("json_schema", SCHEMA), '{"city": "Paris"}', False),
        (Form("json_schema", SCHEMA), '{"city": "Paris", "days": "3"}', False),
        (Form("json_schema", SCHEMA), '{"city": "Paris", "days": 3, "x": 1}', False),
        (Form("json_schema", json.dumps(SCHEMA)), '{"city": "Paris", "days": 3}', True),
        (Form("json_schema", {"type": "object"}), '{"a": [1, {"b": null}]}', True),
        (Form("json_schema", {"type": "object"}), "[1]", False),
        (
            Form("json_schema", {"oneOf": [{"const": 1}, {"type": "string", "format": "odd"}]}),
            '"free"',
            True,
        ),
        (Form("json_schema", {"type": "string", "format": "date"}), '"2026-11-26"', True),
        (Form("json_schema", {"type": "string", "format": "date"}), '"2026"', False),
        (Form("json_schema", {"const": {"format": "odd"}}), '{"format": "odd"}', True),
        (Form("regex", r"[A-Z][a-z]+/\d{2}"), "Paris/42", True),
        (Form("regex", r"[A-Z][a-z]+/\d{2}"), "Paris/4", False),
        (Form("choice", ('ye"s', "no", "nobody")), 'ye"s', True),
        (Form("choice", ("yes", "no", "nobody")), "nobody", True),
        (Form("choice", ("yes", "no", "nobody")), "nob", False),
        (Form("grammar", 'root ::= "a" b*\nb ::= [0-9]'), "a42", True),
        (Form("grammar", 'start: "a" B*\nB: /[0-9]/'), "a42", True),
        (Form("grammar", 'root ::= "a" b*\nb ::= [0-9]'), "b", False),
    ],
)
def test_what_keeps_to_a_form(form: Form, text: str, *, right: bool) -> None:
    assert follows(grammar(form), text) is right


@pytest.mark.parametrize(
    ("thinking", "text", "right"),
    [
        (None, "<think>hm</think>\nno", False),
        (False, "<think>\nhm < 3\n</think>\n\nno", True),
        (False, "no", True),
        (False, "hm</think>no", False),
        (True, "hm</think>\n\nno", True),
        (True, "no", False),
    ],
)
def test_thoughts_come_before_the_form(*, thinking: bool | None, text: str, right: bool) -> None:
    assert follows(grammar(Form("choice", ("yes", "no")), thinking=thinking), text) is right


def test_an_answer_ends_where_nothing_can_follow() -> None:
    state = grammar(Form("choice", ("yes", "no"))).start()
    for token in ids("no"):
        assert not state.finished
        state.accept(token)
    assert state.finished
    assert state.error is None
    assert state.forced() == []


def test_where_an_answer_may_end_or_go_on_the_end_is_allowed() -> None:
    state = grammar(Form("regex", "a+")).start()
    assert allowed(state) == set(ids("a"))
    state.accept(ids("a")[0])
    assert not state.finished
    assert allowed(state) == {ids("a")[0], END}


def test_forced_text_is_known_at_once() -> None:
    state = grammar(Form("json_schema", SCHEMA)).start()
    assert state.forced() == ids('{"city": "')
    for token in state.forced():
        state.accept(token)
    assert state.forced() == []


def test_drafts_are_looked_at_without_being_taken() -> None:
    state = grammar(Form("regex", "[ab]c")).start()
    a, b, c = ids("abc")
    assert state.allowed([a, c]) == 2
    assert state.allowed([a, a]) == 1
    assert state.allowed([c]) == 0
    assert allowed(state, [a]) == {c}
    assert allowed(state) == {a, b}
    state.accept(b)
    assert allowed(state) == {c}


def test_a_draft_that_would_end_the_answer_is_none() -> None:
    state = grammar(Form("regex", "a*")).start()
    (a,) = ids("a")
    assert state.allowed([a, END, a]) == 1


def test_states_are_apart() -> None:
    made = grammar(Form("regex", "[ab]c"))
    one, other = made.start(), made.start()
    one.accept(ids("a")[0])
    assert allowed(other) == set(ids("ab"))


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (Form("json_schema", {"not": {"type": "string"}}), "not"),
        (Form("json_schema", {"type": "nothing"}), "type"),
        (Form("json_schema", "{"), ""),
        (Form("regex", "(?=a)b"), "regex"),
        (Form("regex", "("), "regex"),
        (Form("grammar", "start: nowhere"), "nowhere"),
        (Form("grammar", "root ::= ("), ""),
    ],
)
def test_what_cannot_be_compiled_says_why(form: Form, says: str) -> None:
    with pytest.raises(GrammarError) as caught:
        grammar(form)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_grammar_is_compiled_once() -> None:
    source = source_of(Form("choice", ("once",)))
    assert COMPILER.compile(source) is COMPILER.compile(source)


TOOLS = (
    Tool("get_weather", "Weather.", {"type": "object", "properties": {"city": {"type": "string"}}}),
    Tool("now", "The time.", {"type": "object", "properties": {}}),
)
CALL = '{"name": "get_weather", "arguments": {"city": "Rome"}}'


@pytest.mark.parametrize(
    ("form", "required", "parallel", "text", "right"),
    [
        ("hermes", True, False, f"<tool_call>\n{CALL}\n</tool_call>", True),
        ("hermes", True, False, f"Hm. <tool_call>\n{CALL}\n</tool_call>", False),
        ("hermes", True, False, "The weather is fine.", False),
        ("hermes", True, True, "\n".join([f"<tool_call>\n{CALL}\n</tool_call>"] * 2), True),
        ("hermes", True, False, "\n".join([f"<tool_call>\n{CALL}\n</tool_call>"] * 2), False),
        ("hermes", False, True, "The weather is fine.", True),
        ("hermes", False, True, f"Hm. <tool_call>\n{CALL}\n</tool_call>\nSo.", True),
        ("hermes", False, False, f"Hm. <tool_call>\n{CALL}\n</tool_call>", True),
        ("hermes", False, True, '<tool_call>\n{"name": "other", "arguments": {}}', False),
        ("hermes", False, True, '<tool_call>\n{"name": "now", "arguments": {"a": 1}}', False),
        ("mistral", True, True, f"[TOOL_CALLS][{CALL}, {CALL}]", True),
        ("mistral", True, False, f"[TOOL_CALLS][{CALL}, {CALL}]", False),
        ("mistral", False, True, "Fine.", True),
        ("llama3_json", True, True, CALL.replace("arguments", "parameters"), True),
        ("llama3_json", True, True, "Fine.", False),
    ],
)
def test_answers_that_call(
    form: str, *, required: bool, parallel: bool, text: str, right: bool
) -> None:
    use = ToolUse(TOOLS, required=required, parallel=parallel)
    source = source_of_calls(use, ToolFormat(form), None)
    assert source is not None
    assert follows(COMPILER.compile(source), text) is right


def test_calls_may_follow_thoughts() -> None:
    use = ToolUse(TOOLS, required=True)
    source = source_of_calls(use, ToolFormat.HERMES, None, thinking=True)
    assert source is not None
    assert follows(COMPILER.compile(source), f"hm</think>\n<tool_call>\n{CALL}\n</tool_call>")


def test_a_form_without_a_marker_is_not_held_to() -> None:
    assert source_of_calls(ToolUse(TOOLS), ToolFormat.LLAMA3_JSON, None) is None


def test_a_special_token_marks_a_call() -> None:
    source = source_of_calls(ToolUse(TOOLS, required=True), ToolFormat.MISTRAL, END)
    assert source is not None
    assert allowed(COMPILER.compile(source).start()) == {END}


@given(st.integers(0, 2**32 - 1))
def test_any_walk_through_a_schema_is_valid(seed: int) -> None:
    """Whatever is sampled under the mask, what comes out is a call of a tool that was offered."""
    rng = np.random.default_rng(seed)
    source = source_of_calls(ToolUse(TOOLS, required=True, parallel=False), ToolFormat.HERMES, None)
    assert source is not None
    state = COMPILER.compile(source).start()
    text: list[int] = []
    quote = ids('"')[0]
    while not state.finished:
        choices = sorted(allowed(state) - {END})
        if not choices:
            break
        # Strings end sooner than chance would have it.
        take_quote = quote in choices and rng.random() < 0.3
        text.append(quote if take_quote else int(rng.choice(choices)))
        state.accept(text[-1])
    parser = AnswerParser(ToolFormat.HERMES)
    written = BACKEND.decode(text)
    parts = [*parser.push(written), *parser.flush()]
    assert not any(isinstance(part, TextPart) for part in parts)
    (name,) = [part.name for part in parts if isinstance(part, CallPart) and part.name]
    arguments: Any = json.loads(
        "".join(part.arguments for part in parts if isinstance(part, CallPart))
    )
    assert name in {"get_weather", "now"}
    assert set(arguments) <= ({"city"} if name == "get_weather" else set())


def test_bytes_of_tokens() -> None:
    text = "é\n"
    assert b"".join(COMPILER.token_bytes(token) for token in ids(text)) == text.encode()


def test_the_same_json_is_written_in_one_way_only() -> None:
    made = grammar(Form("json_schema", SCHEMA))
    assert not follows(made, '{ "city": "Paris", "days": 3}')
    assert not follows(made, '{"city":"Paris","days":3}')
    assert re.fullmatch(r'\{"city": "', BACKEND.decode(made.start().forced()))
