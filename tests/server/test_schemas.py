"""Request bodies: what is taken, what is refused, and with which error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from offramp.server.api.schemas import ChatBody, CompletionBody, GenerationBody
from offramp.server.api.wire import invalid_request
from offramp.server.errors import InvalidRequest

MESSAGES = [{"role": "user", "content": "hi"}]


def refusal(model: type[GenerationBody], body: Any) -> InvalidRequest:
    """The error a client would get for ``body``."""
    try:
        model.model_validate(body)
    except ValidationError as error:
        return invalid_request(error.errors())
    except InvalidRequest as error:
        return error
    pytest.fail(f"{body} was accepted")


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("stream", 0, "stream"),
        ("stream", "true", "stream"),
        ("temperature", -0.1, "temperature"),
        ("temperature", 2.1, "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("temperature", "1", "temperature"),
        ("top_p", -0.1, "top_p"),
        ("top_p", 1.1, "top_p"),
        ("presence_penalty", 3, "presence_penalty"),
        ("frequency_penalty", -3, "frequency_penalty"),
        ("n", 0, "n"),
        ("n", 1000, "n"),
        ("n", True, "n"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", 2**64, "max_tokens"),
        ("max_tokens", "5", "max_tokens"),
        ("max_tokens", 5.5, "max_tokens"),
        ("seed", 2**63, "seed"),
        ("seed", 10**400, "seed"),
        ("stop", [""], "stop[0]"),
        ("stop", ["a"] * 5, "stop"),
        ("stop", 5, "stop"),
        ("stop", "a\0", "stop[0]"),
        ("logit_bias", {"x": 1}, "logit_bias"),
        ("logit_bias", {"1": 101}, "logit_bias"),
        ("logit_bias", {"1": float("nan")}, "logit_bias"),
        ("logit_bias", {"9" * 5000: 1}, "logit_bias"),
        ("logit_bias", [1], "logit_bias"),
        ("top_k", -2, "top_k"),
        ("min_p", 1.5, "min_p"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("repetition_penalty", 1e-300, "repetition_penalty"),
        ("stop_token_ids", [-1], "stop_token_ids[0]"),
        ("ignore_eos", 1, "ignore_eos"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("early_exit", "sometimes", "early_exit.mode"),
        ("early_exit", 5, "early_exit"),
        ("early_exit", {"mode": "nope"}, "early_exit.mode"),
        ("early_exit", {"threshold": 1.5}, "early_exit.threshold"),
        ("early_exit", {"min_layer": -1}, "early_exit.min_layer"),
        ("early_exit", {"kv_fill": "magic"}, "early_exit.kv_fill"),
        ("early_exit", {"quality": 0.1}, "early_exit.quality"),
        ("early_exit", {"criterion": "luck"}, "early_exit.criterion"),
        ("early_exit", {"deadline_ms": 0}, "early_exit.deadline_ms"),
        ("early_exit", {"prefill": "maybe"}, "early_exit.prefill"),
        ("early_exit", {"speed": 1}, "early_exit.speed"),
        ("messages", [], "messages"),
        ("messages", "hi", "messages"),
        ("messages", [{"role": "user", "content": "a\0b"}], "messages[0].content"),
        ("messages", [{"role": "user", "content": "\ud800"}], "messages[0].content"),
        ("messages", [{"role": "wizard", "content": "a"}], "messages[0].role"),
        ("messages", [{"role": "user"}], "messages[0]"),
        ("messages", [{"role": "user", "content": []}], "messages[0].content"),
        ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
        ("messages", [None], "messages[0]"),
    ],
)
def test_wrong_values_name_their_field(field: str, value: object, param: str) -> None:
    error = refusal(ChatBody, {"messages": MESSAGES, field: value})
    assert error.param == param
    assert error.code in {
        *("invalid_value", "invalid_type", "unknown_parameter", "missing_required_parameter"),
    }
    assert len(json.dumps(error.body())) < 600


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("functions", [{"name": "f"}], "functions"),
        ("function_call", "auto", "function_call"),
        ("echo", True, "echo"),
        ("structural_tag", {}, "structural_tag"),
        ("tools", [{"type": "web_search"}], "tools[0]"),
        ("modalities", ["audio"], "modalities"),
        ("best_of", 2, "best_of"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content",
        ),
        ("messages", [{"role": "function", "content": "a", "name": "f"}], "messages[0]"),
    ],
)
def test_known_but_unsupported_is_refused_by_name(field: str, value: object, param: str) -> None:
    error = refusal(ChatBody, {"messages": MESSAGES, field: value})
    assert (error.param, error.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    "extra",
    [
        {"logprobs": False},
        {"response_format": {"type": "text"}},
        {"tool_choice": "none"},
        {"n": 2, "best_of": 2},
        {"user": "u", "metadata": {}, "store": False, "service_tier": "auto"},
        {"some_new_field": {"deep": [1]}},
    ],
)
def test_harmless_fields_are_taken(extra: dict[str, Any]) -> None:
    ChatBody.model_validate({"messages": MESSAGES, **extra})


def test_null_is_the_same_as_left_out() -> None:
    names = [name for name in ChatBody.model_fields if name != "messages"]
    body = ChatBody.model_validate({"messages": MESSAGES, **dict.fromkeys(names), "tools": None})
    plain = ChatBody.model_validate({"messages": MESSAGES})
    assert body.model_dump() == plain.model_dump()


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = ChatBody.model_validate({"messages": [{"role": "developer", "content": parts}]})
    assert message.messages[0].for_template() == {"role": "system", "content": "a\nb"}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: object, expected: object) -> None:
    assert CompletionBody.model_validate({"prompt": prompt}).prompt == expected


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], [-1], [1, "a"], ["a", 1], 3, {}, [True], [2**70], [1.5], [None], "a\0", ["a"] * 129],
)
def test_wrong_prompts_name_the_field(prompt: object) -> None:
    param = refusal(CompletionBody, {"prompt": prompt}).param
    assert param is not None
    assert param.split("[")[0] == "prompt"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from([*ChatBody.model_fields, "prompt", "best_of", "tools", "anything"])


@given(body=st.dictionaries(FIELDS, JSON) | JSON)
def test_any_json_is_taken_or_refused_with_the_envelope(body: Any) -> None:
    for model in (ChatBody, CompletionBody):
        try:
            model.model_validate(body)
        except ValidationError as error:
            json.dumps(invalid_request(error.errors()).body()).encode()
        except InvalidRequest as error:
            json.dumps(error.body()).encode()


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (ChatBody, {"messages": [1] * 1_000}, "messages[0]"),
        (ChatBody, {"messages": [{}] * 100_000}, "messages[0].role"),
        (ChatBody, {"messages": [{"role": "user", "content": ""}] * 2049}, "messages"),
        (
            ChatBody,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}]},
            "messages[0].content",
        ),
        (CompletionBody, {"prompt": ["a"] * 2049}, "prompt"),
        (CompletionBody, {"prompt": [[1.5] * 1_000]}, "prompt[0][0]"),
        (CompletionBody, {"prompt": "a", **{f"x{i}": 1 for i in range(300)}}, ""),
    ],
)
def test_long_lists_are_looked_at_up_to_the_first_fault(
    model: type[GenerationBody], body: Any, param: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() == 1
    if param:
        assert invalid_request(caught.value.errors()).param == param
