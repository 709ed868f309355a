"""Bodies of both decision routes: what is taken, what is refused, and with which error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from offramp.models.sampling_params import ExitMode
from offramp.server.api.decision_bodies import DecisionBody, SystemOneBody
from offramp.server.api.wire import invalid_request
from offramp.server.errors import InvalidRequest
from offramp.server.text.decisions import Option, QuestionKind

PREDICATE = {"type": "predicate", "instructions": "It is so."}
CHOICE = {"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "b"}]}
SCORE = {"type": "score", "instructions": "How?", "levels": [{"label": "bad"}, {"label": "good"}]}
NOUL = {"type": "noul", "instructions": "It is so."}
IMAGE = {"type": "input_image", "image_url": "data:,"}
CALL = {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "1", "output": "a cat"}


def refusal(model: type[DecisionBody | SystemOneBody], body: Any) -> InvalidRequest:
    """The error a client would get for ``body``."""
    try:
        model.model_validate(body)
    except ValidationError as error:
        return invalid_request(error.errors())
    except InvalidRequest as error:
        return error
    pytest.fail(f"{body} was accepted")


def decision(**fields: Any) -> dict[str, Any]:
    return {"input": "hi", "questions": [PREDICATE], **fields}


def system_one(**fields: Any) -> dict[str, Any]:
    return {"state": "hi", "questions": {"q": NOUL}, **fields}


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


def messages_of(value: Any) -> list[tuple[str, str]]:
    body = DecisionBody.model_validate(decision(input=value))
    return [(message["role"], message["content"]) for message in body.messages]


def user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


def test_a_text_is_the_users() -> None:
    assert messages_of(" hi\n") == [("user", " hi\n")]


def test_messages_with_parts() -> None:
    data = {"b": [1, None, "é"], "a": True}
    conversation = [
        {"type": "message", "role": "developer", "content": "Be good"},
        {"role": "system", "content": [{"type": "input_text", "text": "and brief"}]},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Look:"},
                {"type": "input_json", "data": data},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "A cat.", "annotations": []},
                {"type": "refusal", "refusal": "No more."},
            ],
            "phase": "commentary",
        },
    ]
    assert messages_of(conversation) == [
        ("system", "Be good\n\nand brief"),
        ("user", 'Look:\n{"b":[1,null,"é"],"a":true}'),
        ("assistant", "A cat.\nNo more."),
    ]


def test_calls_and_outputs() -> None:
    conversation = [
        {"role": "user", "content": "What is there?"},
        {"role": "assistant", "content": "I look."},
        {**CALL, "arguments": '{"at": 1}', "status": "completed", "id": None},
        {"type": "custom_tool_call", "call_id": "2", "name": "ask", "input": "who"},
        {**OUTPUT, "output": [{"type": "input_text", "text": "a cat"}]},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "you"},
    ]
    assert messages_of(conversation) == [
        ("user", "What is there?"),
        ("assistant", 'I look.\n\nCall look: {"at": 1}\n\nCall ask: who'),
        ("user", "Output: a cat\n\nOutput: you"),
    ]


@pytest.mark.parametrize(
    "data",
    [nested(32), [0] * 9_999, ["x" * (256 * 1024 - 4)], {}],
    ids=["deep", "many", "long", "empty"],
)
def test_json_may_be_as_large_as_openai_allows(data: Any) -> None:
    text = json.dumps(data, separators=(",", ":"))
    assert messages_of(user({"type": "input_json", "data": data})) == [("user", text)]
    body = SystemOneBody.model_validate(system_one(state=data))
    assert body.messages == [{"role": "user", "content": text}]


def test_questions_of_all_kinds() -> None:
    typed = {
        **CHOICE,
        "name": "which",
        "choices": [
            {"value": True},
            {"value": " true story ", "description": "it was so"},
            {"value": False, "description": None},
        ],
    }
    levels = [{"label": "bad", "description": "of no use"}, {"label": "good"}]
    parts = [{"type": "input_text", "text": "It is"}, {"type": "input_json", "data": ["so"]}]
    asked = [{**PREDICATE, "instructions": parts}, typed, {**SCORE, "levels": levels}]
    body = DecisionBody.model_validate(decision(questions=asked))
    yes, which, how = (question.as_question() for question in body.questions)
    assert yes.kind is QuestionKind.PREDICATE
    assert yes.instructions == 'It is\n["so"]'
    assert yes.options == (Option("yes"), Option("no"))
    assert which.options == (Option("true"), Option("true story", "it was so"), Option("false"))
    assert how.options == (Option("0", "bad - of no use"), Option("1", "good"))
    assert [question.name for question in body.questions] == [None, "which", None]


def test_questions_of_system_one() -> None:
    asked = {
        "plain": NOUL,
        "told": {**NOUL, "criteria": {"true": "it is", "false": None}},
        "json": {**NOUL, "instructions": {"is": ["so"]}},
        "which": {
            "type": "choice",
            "instructions": "Which?",
            "criteria": {" a ": None, "b": "the other", "c": {"of": 3}},
        },
        "how": {"type": "score", "instructions": "How?", "criteria": ["bad", ["good"]]},
    }
    body = SystemOneBody.model_validate(system_one(questions=asked))
    found = {name: question.as_question() for name, question in body.questions.items()}
    assert found["plain"].options == (Option("yes"), Option("no"))
    assert found["told"].options == (Option("yes", "it is"), Option("no"))
    assert found["json"].instructions == '{"is":["so"]}'
    assert found["which"].options == (
        Option("a"),
        Option("b", "the other"),
        Option("c", '{"of":3}'),
    )
    assert found["how"].options == (Option("0", "bad"), Option("1", '["good"]'))
    assert [each.kind for each in found.values()] == [
        *[QuestionKind.PREDICATE] * 3,
        QuestionKind.CHOICE,
        QuestionKind.SCORE,
    ]


@pytest.mark.parametrize(("model", "body"), [(DecisionBody, decision), (SystemOneBody, system_one)])
def test_what_both_bodies_share(model: type[DecisionBody | SystemOneBody], body: Any) -> None:
    plain = model.model_validate(body(model=None, early_exit=None))
    assert plain.early_exit.mode is None
    assert plain.calibration == "contextual"
    assert plain.permutations == 1
    wish = {"mode": "adaptive", "quality": 0.9, "min_layer": 3, "task": "none"}
    full = model.model_validate(body(early_exit=wish, calibration="none", permutations=8))
    assert full.early_exit.mode is ExitMode.ADAPTIVE
    assert (full.early_exit.quality, full.early_exit.task) == (0.9, "none")
    assert model.model_validate(body(early_exit="off")).early_exit.mode is ExitMode.OFF


SHARED = [
    ("early_exit", "sometimes", "early_exit.mode"),
    ("early_exit", 5, "early_exit"),
    ("early_exit", {"speed": 1}, "early_exit.speed"),
    ("early_exit", {"quality": 0.4}, "early_exit.quality"),
    ("early_exit", {"quality": 0.9, "threshold": 0.9}, "early_exit"),
    ("early_exit", {"threshold": 1.1}, "early_exit.threshold"),
    ("early_exit", {"min_layer": -1}, "early_exit.min_layer"),
    ("early_exit", {"task": ""}, "early_exit.task"),
    ("calibration", "always", "calibration"),
    ("permutations", 0, "permutations"),
    ("permutations", 9, "permutations"),
    ("permutations", True, "permutations"),
    ("return_prompt_token_ids", 1, "return_prompt_token_ids"),
    ("model", 5, "model"),
    ("model", "a\0", "model"),
]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        *SHARED,
        ("input", None, "input"),
        ("input", 5, "input"),
        ("input", [], "input"),
        ("input", " \n", "input"),
        ("input", "a\0", "input[0].content"),
        ("input", "\ud800", "input[0].content"),
        ("input", [None], "input[0]"),
        ("input", [{"role": "wizard", "content": "a"}], "input[0].role"),
        ("input", [{"role": "user"}], "input[0].content"),
        ("input", user(), "input[0].content"),
        ("input", user("a"), "input[0].content"),
        ("input", user({"type": "input_text"}), "input[0].content"),
        ("input", user({"type": "input_json", "data": "a"}), "input[0].content"),
        ("input", user({"type": "input_json", "data": nested(34)}), "input[0].content"),
        ("input", user({"type": "input_json", "data": [0] * 10_000}), "input[0].content"),
        ("input", user({"type": "input_json", "data": ["x" * 2**18]}), "input[0].content"),
        ("input", user({"type": "input_json", "data": ["é" * 2**17]}), "input[0].content"),
        ("input", user({"type": "input_json", "data": ["\0\ud800"]}), "input[0].content"),
        ("input", [OUTPUT], "input[0].call_id"),
        ("input", [CALL, {**OUTPUT, "call_id": "2"}], "input[1].call_id"),
        ("input", [OUTPUT, CALL], "input[0].call_id"),
        ("input", [{**CALL, "arguments": None}], "input[0]"),
        ("input", [{**CALL, "type": "custom_tool_call"}], "input[0]"),
        ("input", [{**CALL, "type": "web_search_call"}], "input[0].type"),
        ("input", [{"type": "reasoning", "summary": []}], "input[0].type"),
        ("questions", None, "questions"),
        ("questions", [], "questions"),
        ("questions", [PREDICATE] * 401, "questions"),
        ("questions", ["Is it?"], "questions[0]"),
        ("questions", [{**PREDICATE, "type": "essay"}], "questions[0]"),
        ("questions", [PREDICATE, {"type": "predicate"}], "questions[1].instructions"),
        ("questions", [{**PREDICATE, "instructions": " "}], "questions[0].instructions"),
        ("questions", [{**PREDICATE, "instructions": []}], "questions[0].instructions"),
        ("questions", [{**PREDICATE, "instructions": "a\0"}], "questions[0].instructions"),
        ("questions", [{**PREDICATE, "name": ""}], "questions[0].name"),
        ("questions", [{**PREDICATE, "name": "n" * 257}], "questions[0].name"),
        (
            "questions",
            [{**PREDICATE, "name": "a"}, CHOICE, {**SCORE, "name": "a"}],
            "questions[2].name",
        ),
        ("questions", [{**CHOICE, "choices": [{"value": "a"}]}], "questions[0].choices"),
        ("questions", [{**CHOICE, "choices": [{"value": "a"}] * 256}], "questions[0].choices"),
        (
            "questions",
            [{**CHOICE, "choices": [{"value": "a"}, {"value": " "}]}],
            "questions[0].choices[1].value",
        ),
        (
            "questions",
            [{**CHOICE, "choices": [{"value": "a"}, {"value": 5}]}],
            "questions[0].choices[1].value",
        ),
        (
            "questions",
            [{**CHOICE, "choices": [{"value": "a"}, {"value": "b\0"}]}],
            "questions[0].choices[1].value",
        ),
        (
            "questions",
            [{**CHOICE, "choices": [{"value": "a"}, {}]}],
            "questions[0].choices[1].value",
        ),
        (
            "questions",
            [{**CHOICE, "choices": [{"value": "a"}, {"value": "b", "description": 1}]}],
            "questions[0].choices[1].description",
        ),
        ("questions", [{**SCORE, "levels": [{"label": "a"}]}], "questions[0].levels"),
        ("questions", [{**SCORE, "levels": [{"label": "a"}] * 101}], "questions[0].levels"),
        (
            "questions",
            [{**SCORE, "levels": [{"label": "a"}, {"label": ""}]}],
            "questions[0].levels[1].label",
        ),
    ],
)
def test_wrong_values_of_decisions_name_their_field(field: str, value: Any, param: str) -> None:
    check(refusal(DecisionBody, decision(**{field: value})), param)


def asked(**fields: Any) -> dict[str, Any]:
    return {"type": "noul", "instructions": "So?", **fields}


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        *SHARED,
        ("state", None, "state"),
        ("state", " ", "state"),
        ("state", 5, "state"),
        ("state", "a\0", "state"),
        ("state", "\ud800", "state"),
        ("state", {"a": "\0\ud800"}, "state"),
        ("state", nested(34), "state"),
        ("state", [0] * 10_000, "state"),
        ("state", ["x" * 2**18], "state"),
        ("questions", {}, "questions"),
        ("questions", [NOUL], "questions"),
        ("questions", {str(number): NOUL for number in range(401)}, "questions"),
        ("questions", {"q": {"type": "predicate", "instructions": "a"}}, "questions.q.type"),
        ("questions", {"q": {"type": "noul"}}, "questions.q.instructions"),
        ("questions", {"q": asked(instructions=" ")}, "questions.q.instructions"),
        ("questions", {"q": asked(instructions=5)}, "questions.q.instructions"),
        ("questions", {"q": asked(instructions="a\0")}, "questions.q.instructions"),
        ("questions", {"q": asked(instructions="\ud800")}, "questions.q.instructions"),
        ("questions", {"q": asked(criteria=["a", "b"])}, "questions.q"),
        ("questions", {"q": asked(criteria={"yes": "a"})}, "questions.q"),
        ("questions", {"q": asked(criteria={"true": 5})}, "questions.q.criteria"),
        ("questions", {"q": asked(criteria={"true": "\0"})}, "questions.q.criteria"),
        ("questions", {"q": asked(type="choice")}, "questions.q"),
        ("questions", {"q": asked(type="choice", criteria={"a": "b"})}, "questions.q"),
        ("questions", {"q": asked(type="choice", criteria=["a", "b"])}, "questions.q"),
        ("questions", {"q": asked(type="choice", criteria={"a": "", " ": ""})}, "questions.q"),
        (
            "questions",
            {"q": asked(type="choice", criteria={"a": 1, "b": ""})},
            "questions.q.criteria",
        ),
        (
            "questions",
            {"q": asked(type="choice", criteria={"a\0": "", "b": ""})},
            "questions.q.criteria",
        ),
        (
            "questions",
            {"q": asked(type="choice", criteria={"\ud800": "", "b": ""})},
            "questions.q.criteria",
        ),
        (
            "questions",
            {"q": asked(type="choice", criteria={str(i): "" for i in range(256)})},
            "questions.q",
        ),
        ("questions", {"q": asked(type="score", criteria={"a": "", "b": ""})}, "questions.q"),
        ("questions", {"q": asked(type="score", criteria=["a"])}, "questions.q"),
        ("questions", {"q": asked(type="score", criteria=["a", 5])}, "questions.q.criteria"),
        ("questions", {"q": asked(type="score", criteria=["a", "\ud800"])}, "questions.q.criteria"),
        ("questions", {"q": asked(type="score", criteria=["a"] * 101)}, "questions.q"),
    ],
)
def test_wrong_values_of_system_one_name_their_field(field: str, value: Any, param: str) -> None:
    check(refusal(SystemOneBody, system_one(**{field: value})), param)


def check(error: InvalidRequest, param: str) -> None:
    assert error.param == param
    assert error.code in {
        *("invalid_value", "invalid_type", "unknown_parameter", "missing_required_parameter"),
    }
    assert len(json.dumps(error.body())) < 600


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (DecisionBody, decision(input=user(IMAGE)), "input[0].content"),
        (DecisionBody, decision(input=[CALL, {**OUTPUT, "output": [IMAGE]}]), "input[1].output"),
        (
            DecisionBody,
            decision(questions=[{**PREDICATE, "instructions": [IMAGE]}]),
            "questions[0].instructions",
        ),
        (SystemOneBody, system_one(images=["data:,"]), "images"),
    ],
)
def test_images_are_refused_by_name(
    model: type[DecisionBody | SystemOneBody], body: Any, param: str
) -> None:
    error = refusal(model, body)
    assert (error.param, error.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize("body", [None, [], "hi", 5])
@pytest.mark.parametrize("model", [DecisionBody, SystemOneBody])
def test_a_body_that_is_no_object(model: type[DecisionBody | SystemOneBody], body: Any) -> None:
    error = refusal(model, body)
    assert error.param is None
    assert "JSON object" in error.message


def test_no_images_are_none_too_many() -> None:
    assert SystemOneBody.model_validate(system_one(images=[])).messages
