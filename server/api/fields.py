"""Checks shared by the request bodies: text, stop strings, biases, and what is not supported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from offramp.server.errors import InvalidRequest

INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1
# Lists are bounded before their items are looked at, and checked up to the first fault: checking
# holds the event loop.
MAX_FIELDS: Final = 256
MAX_PROMPTS: Final = 2048
MAX_MESSAGES: Final = 2048
MAX_PARTS: Final = 1024
MAX_STOP_STRINGS: Final = 4
MAX_STOP_LENGTH: Final = 1024
MAX_BIASES: Final = 1024
MAX_BIAS: Final = 100.0
# Longer keys are no token id of any vocabulary; int() on them would be slow.
_MAX_KEY_DIGITS: Final = 12
UNSUPPORTED: Final = "unsupported_parameter"

# Known parameters this server does not implement, with the values that mean "not used". They are
# refused rather than ignored, so that no client takes plain text for what it asked for.
_NOT_USED: Final[Mapping[str, tuple[object, ...]]] = {
    "functions": (),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "prediction": (),
    "prompt_embeds": (),
    "suffix": ("",),
    "best_of": (),
    "structural_tag": (),
    "chat_template": (),
    "truncate_prompt_tokens": (-1,),
    "use_beam_search": (False,),
}


class RequestModel(BaseModel):
    """Base of request bodies: JSON types as they are, null is the same as left out."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_omitted(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise PydanticCustomError("too_many", "too many fields")
        return {name: value for name, value in data.items() if value is not None}


# Parameters of one route that are known, and mean nothing, on the other.
NOT_FOR_CHAT: Final[Mapping[str, tuple[object, ...]]] = {"echo": (False,)}
NOT_FOR_COMPLETIONS: Final[Mapping[str, tuple[object, ...]]] = {
    "top_logprobs": (0,),
    "tools": (),
    "tool_choice": ("none",),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
}


def refuse_unsupported(data: Mapping[str, Any], own: Mapping[str, tuple[object, ...]]) -> None:
    """Raise InvalidRequest for the first known parameter that this server cannot honour.

    ``own`` are those of the route, each with its values that mean "not used".
    """
    for name, harmless in {**_NOT_USED, **own}.items():
        if name in data and not any(_same(data[name], value) for value in harmless):
            raise InvalidRequest(
                f"'{name}' is not supported by this server.", param=name, code=UNSUPPORTED
            )


def _same(value: object, other: object) -> bool:
    # 0 == False in Python, but not on the wire.
    return type(value) is type(other) and value == other


def clean_text(text: str) -> str:
    """The text; raises PydanticCustomError for characters that no request may hold."""
    if "\0" in text:
        raise PydanticCustomError("nul_character", "NUL characters are not allowed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("surrogate", "lone surrogates are not allowed") from None
    return text


def _stop_list(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and len(stops) > MAX_STOP_STRINGS:
        raise PydanticCustomError("too_many", "at most 4 stop strings are allowed")
    return stops


def join_parts(content: Any, text_of: Callable[[Mapping[str, Any]], str]) -> Any:
    """Text of a content given as a list of parts, each of which ``text_of`` reads."""
    if not isinstance(content, list):
        return content
    if len(content) > MAX_PARTS:
        raise PydanticCustomError("too_many", "at most 1024 parts are allowed")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise PydanticCustomError("invalid_part", "content parts must be objects with a type")
    if not content:
        raise PydanticCustomError("too_short", "content must have at least one part")
    return "\n".join(map(text_of, content))


def _text_part(part: Mapping[str, Any]) -> str:
    if part["type"] != "text":
        raise PydanticCustomError(UNSUPPORTED, "only text content parts are supported")
    text = part.get("text")
    if not isinstance(text, str):
        raise PydanticCustomError("string_type", "a text part must have a string 'text'")
    return text


def _biases(value: Any) -> Any:
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "must be an object of token ids and numbers")
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("too_many", "at most 1024 entries are allowed")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= _MAX_KEY_DIGITS):
            raise PydanticCustomError("token_id", "keys must be token ids")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise PydanticCustomError("float_type", "values must be numbers")
        # Written so that NaN fails too.
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise PydanticCustomError("out_of_range", "values must be between -100 and 100")
        biases[int(key)] = float(bias)
    return biases


def _prompt_list(value: Any) -> Any:
    """The four forms of OpenAI's prompt as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and not isinstance(value[0], str | list):
        return [value]
    if isinstance(value, list) and len(value) > MAX_PROMPTS:
        raise PydanticCustomError("too_many", "at most 2048 are allowed")
    return value


def _prompt_kind(value: Any) -> str:
    is_ids = isinstance(value, list) and bool(value) and isinstance(value[0], list)
    return "token_ids" if is_ids else "texts"


Text = Annotated[str, AfterValidator(clean_text)]
Content = Annotated[
    Text,
    BeforeValidator(
        lambda content: join_parts(content, _text_part),
        json_schema_input_type=str | list[dict[str, Any]],
    ),
]
StopStrings = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
    BeforeValidator(_stop_list, json_schema_input_type=str | list[str]),
]
TokenId = Annotated[int, Field(ge=0, le=INT64_MAX)]
LogitBias = Annotated[
    dict[int, float], BeforeValidator(_biases, json_schema_input_type=dict[str, float])
]
_TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[
    Annotated[list[Text], Field(fail_fast=True), Tag("texts")]
    | Annotated[list[_TokenIds], Field(fail_fast=True), Tag("token_ids")],
    Discriminator(_prompt_kind),
    Field(min_length=1),
    BeforeValidator(
        _prompt_list,
        json_schema_input_type=str
        | Annotated[list[str], Field(min_length=1)]
        | _TokenIds
        | Annotated[list[_TokenIds], Field(min_length=1)],
    ),
]
Count = Annotated[int, Field(ge=1, le=INT64_MAX)]
