"""Request bodies of /v1/decisions (OpenAI) and /v1/systemone (System One)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from offramp.models.sampling_params import ExitMode
from offramp.server.api.fields import (
    INT64_MAX,
    MAX_MESSAGES,
    UNSUPPORTED,
    RequestModel,
    Text,
    clean_text,
    join_parts,
)
from offramp.server.api.schemas import mode_alone, warn_once
from offramp.server.api.tool_bodies import CallItem, OutputItem, check_outputs
from offramp.server.errors import InvalidRequest
from offramp.server.text.decisions import Option, Question, QuestionKind, predicate, score

MAX_QUESTIONS: Final = 400
MAX_CHOICES: Final = 255
MAX_LEVELS: Final = 100
MAX_PERMUTATIONS: Final = 8
MAX_NAME: Final = 256
# OpenAI's limits for JSON in an input.
_MAX_JSON_DEPTH: Final = 32
_MAX_JSON_VALUES: Final = 10_000
_MAX_JSON_BYTES: Final = 256 * 1024

Message = Mapping[str, str]


def _json_text(value: Any) -> str:
    """Compact JSON of a client's value, within OpenAI's limits."""
    left = _MAX_JSON_VALUES
    level = [value]
    for _ in range(_MAX_JSON_DEPTH + 1):
        left -= len(level)
        if left < 0:
            raise PydanticCustomError("too_many", "JSON may hold at most 10,000 values")
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            break
    else:
        raise PydanticCustomError("too_deep", "JSON may be nested at most 32 levels deep")
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode("utf-8", "replace")) > _MAX_JSON_BYTES:
        raise PydanticCustomError("too_long", "JSON may be at most 256 KiB long")
    return text


_PART_TEXTS: Final = {"input_text": "text", "output_text": "text", "refusal": "refusal"}


def _part_text(part: Mapping[str, Any]) -> str:
    kind = part["type"]
    if kind == "input_image":
        raise PydanticCustomError(UNSUPPORTED, "images are not supported")
    if kind == "input_json" and isinstance(part.get("data"), dict | list):
        return _json_text(part["data"])
    text = part.get(_PART_TEXTS.get(kind, ""))
    if not isinstance(text, str):
        raise PydanticCustomError(
            "invalid_part", "parts are input_text with a text or input_json with data"
        )
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "must not be blank")
    return text


Content = Annotated[Text, BeforeValidator(lambda content: join_parts(content, _part_text))]
Instructions = Annotated[Content, AfterValidator(_not_blank)]
Name = Annotated[Text, Field(min_length=1, max_length=MAX_NAME)]
Label = Annotated[Text, AfterValidator(_not_blank)]


def _choice_value(value: Any) -> str | bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise PydanticCustomError("value_type", "must be a text or a boolean")
    return _not_blank(clean_text(value))


class DecisionExit(RequestModel):
    """Early-exit wishes of a decision; ``task`` names a trained one, or "none"."""

    model_config = ConfigDict(extra="forbid")

    mode: Annotated[ExitMode, Field(strict=False)] | None = None
    quality: float | None = Field(default=None, ge=0.5, le=1)
    threshold: float | None = Field(default=None, ge=0, le=1)
    min_layer: int | None = Field(default=None, ge=0, le=INT64_MAX)
    task: Name | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> DecisionExit:
        if self.quality is not None and self.threshold is not None:
            raise PydanticCustomError("exclusive", "'quality' and 'threshold' exclude each other")
        return self


class _Body(RequestModel):
    """Fields that both routes share, ours among them."""

    model_config = ConfigDict(extra="allow")

    model: Text | None = None
    early_exit: Annotated[DecisionExit, BeforeValidator(mode_alone)] = Field(
        default_factory=DecisionExit
    )
    calibration: Literal["contextual", "none"] = "contextual"
    permutations: int = Field(default=1, ge=1, le=MAX_PERMUTATIONS)
    return_prompt_token_ids: bool = False

    @model_validator(mode="after")
    def _tell_unknown(self) -> Self:
        for name in self.model_extra or ():
            warn_once(name)
        return self


class _InputMessage(RequestModel):
    type: Literal["message"] = "message"
    role: Literal["user", "developer", "system", "assistant"]
    content: Content

    def as_message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


class _Call(CallItem):
    call_id: Name
    name: Name

    def as_message(self) -> Message:
        return {"role": "assistant", "content": f"Call {self.name}: {self.said}"}


class _Output(OutputItem):
    call_id: Name
    output: Content

    def as_message(self) -> Message:
        return {"role": "user", "content": f"Output: {self.output}"}


def _item_kind(value: Any) -> str:
    kind = value.get("type", "message") if isinstance(value, dict) else "message"
    if isinstance(kind, str) and kind.endswith("_call"):
        return "call"
    return "output" if isinstance(kind, str) and kind.endswith("_output") else "message"


_Item = Annotated[
    Annotated[_InputMessage, Tag("message")]
    | Annotated[_Call, Tag("call")]
    | Annotated[_Output, Tag("output")],
    Discriminator(_item_kind),
]


class _Predicate(RequestModel):
    type: Literal["predicate"]
    instructions: Instructions
    name: Name | None = None

    def as_question(self) -> Question:
        return predicate(self.instructions)


class _Choice(RequestModel):
    value: Annotated[str | bool, BeforeValidator(_choice_value)]
    description: Text = ""

    @property
    def spoken(self) -> str:
        """What the model says for it."""
        return self.value.strip() if isinstance(self.value, str) else str(self.value).lower()


class _ChoiceQuestion(RequestModel):
    type: Literal["choice"]
    instructions: Instructions
    choices: list[_Choice] = Field(min_length=2, max_length=MAX_CHOICES)
    name: Name | None = None

    def as_question(self) -> Question:
        options = tuple(Option(each.spoken, each.description) for each in self.choices)
        return Question(QuestionKind.CHOICE, self.instructions, options)


class _Level(RequestModel):
    label: Label
    description: Text = ""


class _ScoreQuestion(RequestModel):
    type: Literal["score"]
    instructions: Instructions
    levels: list[_Level] = Field(min_length=2, max_length=MAX_LEVELS)
    name: Name | None = None

    def as_question(self) -> Question:
        shown = [
            f"{level.label} - {level.description}" if level.description else level.label
            for level in self.levels
        ]
        return score(self.instructions, shown)


AskedQuestion = Annotated[
    _Predicate | _ChoiceQuestion | _ScoreQuestion, Field(discriminator="type")
]


class DecisionBody(_Body):
    """Body of POST /v1/decisions."""

    input: list[_Item] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    questions: list[AskedQuestion] = Field(min_length=1, max_length=MAX_QUESTIONS)

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("input"), str):
            if not data["input"].strip():
                raise InvalidRequest("input: must not be blank.", param="input")
            return {**data, "input": [{"role": "user", "content": data["input"]}]}
        return data

    @model_validator(mode="after")
    def _calls_match(self) -> DecisionBody:
        check_outputs(self.input)
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> DecisionBody:
        names = [question.name for question in self.questions]
        for index, name in enumerate(names):
            if name is not None and name in names[:index]:
                raise InvalidRequest(
                    "Two questions have this name.", param=f"questions[{index}].name"
                )
        return self

    @property
    def messages(self) -> list[Message]:
        """The conversation for a chat template, neighbours of one role joined."""
        return _joined([item.as_message() for item in self.input])


def _state_text(value: Any) -> str:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict | list):
        return clean_text(_json_text(value))
    raise PydanticCustomError("string_type", "must be a text, an object or a list")


def _said(value: Any) -> str:
    return _not_blank(_state_text(value))


def _described(value: Any) -> str:
    return "" if value is None else _state_text(value)


def _criteria(value: Any) -> Any:
    """Refuse names and descriptions that are no texts."""
    if isinstance(value, dict):
        for name in value:
            clean_text(name)
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _described(each)
    return value


class SystemOneQuestion(RequestModel):
    """A question of System One; ``criteria`` are options, levels or what true and false mean."""

    texts: ClassVar[frozenset[str]] = frozenset({"true", "false"})

    type: Literal["noul", "choice", "score"]
    instructions: Annotated[Any, AfterValidator(_said)]
    criteria: Annotated[Any, AfterValidator(_criteria)] = None

    @model_validator(mode="after")
    def _form(self) -> SystemOneQuestion:
        criteria = self.criteria
        if self.type == "noul":
            if criteria is not None and not (
                isinstance(criteria, dict) and set(criteria) <= self.texts
            ):
                raise PydanticCustomError("criteria", "criteria of a noul are true and false")
        elif self.type == "choice":
            if not isinstance(criteria, dict) or not 2 <= len(criteria) <= MAX_CHOICES:
                raise PydanticCustomError("criteria", "criteria of a choice are 2 to 255 options")
            if not all(name.strip() for name in criteria):
                raise PydanticCustomError("criteria", "an option's name must not be blank")
        elif not isinstance(criteria, list) or not 2 <= len(criteria) <= MAX_LEVELS:
            raise PydanticCustomError("criteria", "criteria of a score are 2 to 100 levels")
        return self

    def as_question(self) -> Question:
        """The same question in the terms of the decisions API."""
        if self.type == "noul":
            found = self.criteria or {}
            yes, no = (_described(found.get(name)) for name in ("true", "false"))
            return predicate(self.instructions, yes, no)
        if self.type == "score":
            return score(self.instructions, [_described(level) for level in self.criteria])
        options = tuple(
            Option(name.strip(), _described(text)) for name, text in self.criteria.items()
        )
        return Question(QuestionKind.CHOICE, self.instructions, options)


class SystemOneBody(_Body):
    """Body of POST /v1/systemone."""

    state: Annotated[Any, AfterValidator(_said)]
    questions: dict[Name, SystemOneQuestion] = Field(min_length=1, max_length=MAX_QUESTIONS)

    @model_validator(mode="before")
    @classmethod
    def _known_forms(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("images"):
            raise InvalidRequest(
                "Images are not supported by this server.", param="images", code=UNSUPPORTED
            )
        return data

    @property
    def messages(self) -> list[Message]:
        """The conversation for a chat template."""
        return [{"role": "user", "content": self.state}]


def _joined(messages: Sequence[Message]) -> list[Message]:
    found: list[dict[str, str]] = []
    for message in messages:
        if found and found[-1]["role"] == message["role"]:
            found[-1]["content"] += f"\n\n{message['content']}"
        else:
            found.append(dict(message))
    return list(found)
