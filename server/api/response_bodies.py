"""Body of POST /v1/responses (OpenAI): a conversation as a list of items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from offramp.server.api.adapted import (
    MAX_METADATA,
    AdaptedBody,
    Message,
    Names,
    joined,
    of_type,
    own_tools,
)
from offramp.server.api.fields import (
    MAX_MESSAGES,
    MAX_PARTS,
    UNSUPPORTED,
    Count,
    RequestModel,
    StopStrings,
    Text,
)
from offramp.server.api.schemas import MAX_LOGPROBS, ChatBody
from offramp.server.api.tool_bodies import MAX_TOOLS, CallItem, Name, OutputItem, check_outputs
from offramp.server.errors import InvalidRequest

LOGPROBS: Final = "message.output_text.logprobs"
NAMES: Final[Names] = {
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
# What needs a store or a second life of requests, with the values that mean "not used".
_NOT_HERE: Final[Mapping[str, tuple[object, ...]]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
}
_PART_TEXTS: Final = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "summary_text": "text",
    "reasoning_text": "text",
    "refusal": "refusal",
}
_CALLS: Final = frozenset({"function_call", "custom_tool_call"})
_OUTPUTS: Final = frozenset({f"{kind}_output" for kind in _CALLS})


class _Part(RequestModel):
    """A part of a content; ``said`` is its text."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal"]
    text: Text | None = None
    refusal: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        return of_type(data, _PART_TEXTS)

    @model_validator(mode="after")
    def _is_text(self) -> _Part:
        name = _PART_TEXTS[self.type]
        if getattr(self, name) is None:
            raise PydanticCustomError("missing", "the part needs {name}", {"name": name})
        return self

    @property
    def said(self) -> str:
        return getattr(self, _PART_TEXTS[self.type]) or ""


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


_Parts = Annotated[
    list[_Part],
    Field(max_length=MAX_PARTS, fail_fast=True),
    BeforeValidator(_as_parts, json_schema_input_type=str | list[_Part]),
]


def _text(parts: list[_Part]) -> str:
    return "\n".join(part.said for part in parts)


class _MessageItem(RequestModel):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: _Parts

    def as_message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": _text(self.content)}


class _CallItem(CallItem):
    call_id: Annotated[Text, Field(min_length=1)]
    name: Annotated[Text, Field(min_length=1)]

    def as_message(self) -> Message:
        function = {"name": self.name, "arguments": self.said}
        call = {"id": self.call_id, "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}


class _OutputItem(OutputItem):
    call_id: Annotated[Text, Field(min_length=1)]
    output: _Parts

    def as_message(self) -> Message:
        return {"role": "tool", "tool_call_id": self.call_id, "content": _text(self.output)}


class _ReasoningItem(RequestModel):
    """What the model thought; of encrypted thoughts nothing is known here."""

    type: Literal["reasoning"]
    content: _Parts = Field(default_factory=list)
    summary: _Parts = Field(default_factory=list)

    def as_message(self) -> Message:
        return {"role": "assistant", "reasoning_content": _text(self.content or self.summary)}


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind == "message":
        return "message"
    if kind in _CALLS:
        return "call"
    if kind in _OUTPUTS:
        return "output"
    return "reasoning" if kind == "reasoning" else "message"


def _known(value: Any) -> Any:
    return of_type(value, _CALLS | _OUTPUTS | {"message", "reasoning"})


_Item = Annotated[
    Annotated[_MessageItem, Tag("message")]
    | Annotated[_CallItem, Tag("call")]
    | Annotated[_OutputItem, Tag("output")]
    | Annotated[_ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
    BeforeValidator(_known),
]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


_Items = Annotated[
    list[_Item],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    BeforeValidator(_as_items, json_schema_input_type=str | list[_Item]),
]


class FunctionTool(RequestModel):
    """A function that is offered; ``parameters`` is a JSON schema of its arguments."""

    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        """The same in the chat's form."""
        fields = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": fields}


_Tools = Annotated[
    list[FunctionTool],
    Field(max_length=MAX_TOOLS, fail_fast=True),
    BeforeValidator(
        lambda tools: own_tools(tools, "function"),
        json_schema_input_type=list[FunctionTool | dict[str, Any]],
    ),
]


class _AllowedTool(RequestModel):
    type: Text = "function"
    name: Text | None = None


class Choice(RequestModel):
    """Which tools are called: ``type`` alone, a function's name, or some of the tools."""

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    name: Name | None = None
    mode: Literal["auto", "required"] = "auto"
    tools: list[_AllowedTool] = Field(default_factory=list, max_length=MAX_TOOLS)

    @model_validator(mode="after")
    def _named(self) -> Choice:
        if self.type == "function" and self.name is None:
            raise PydanticCustomError("missing", "the choice of a function needs its name")
        return self

    @property
    def names(self) -> set[str]:
        """Names of the functions that are allowed."""
        return {tool.name for tool in self.tools if tool.type == "function" and tool.name}

    def as_sent(self) -> Any:
        """What an answer repeats."""
        if self.type == "function":
            return {"type": self.type, "name": self.name}
        if self.type == "allowed_tools":
            tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
            return {"type": self.type, "mode": self.mode, "tools": tools}
        return self.type


def _as_choice(value: Any) -> Any:
    return {"type": value} if value in ("none", "auto", "required") else value


_OneChoice = Annotated[
    Choice,
    BeforeValidator(
        _as_choice, json_schema_input_type=Literal["none", "auto", "required"] | Choice
    ),
]


class Format(RequestModel):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name | None = None
    description: Text | None = None
    # A field named schema would hide a method of pydantic's.
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> Format:
        if self.type == "json_schema":
            for name, value in (("name", self.name), ("schema", self.schema_)):
                if value is None:
                    raise PydanticCustomError("missing", "the format needs {name}", {"name": name})
        return self

    def for_chat(self) -> dict[str, Any] | None:
        """The chat's ``response_format``; None where the form is free."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.schema_}}

    def as_sent(self) -> dict[str, Any]:
        """What an answer repeats."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {
            "type": self.type,
            "name": self.name,
            "description": self.description,
            "schema": self.schema_,
            "strict": bool(self.strict),
        }


class TextOptions(RequestModel):
    """How the text is to be; ``verbosity`` is without effect."""

    format: Format = Field(default_factory=Format)
    verbosity: Literal["low", "medium", "high"] | None = None

    def as_sent(self) -> dict[str, Any]:
        """What an answer repeats."""
        verbosity = {} if self.verbosity is None else {"verbosity": self.verbosity}
        return {"format": self.format.as_sent(), **verbosity}


class Reasoning(RequestModel):
    """How much a model that thinks is to think; there are no summaries of thoughts."""

    effort: Annotated[Text, Field(max_length=32)] | None = None
    summary: Text | None = None


class ResponseStreamOptions(RequestModel):
    """Events are never padded, so there is nothing to turn off."""

    include_obfuscation: bool = True


class ResponseBody(AdaptedBody):
    """Body of POST /v1/responses."""

    input: _Items
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    max_tool_calls: Count | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    stop: StopStrings = Field(default_factory=list)
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)
    include: list[Text] = Field(default_factory=list, max_length=MAX_TOOLS)
    stream_options: ResponseStreamOptions | None = None
    tools: _Tools = Field(default_factory=list)
    tool_choice: _OneChoice | None = None
    parallel_tool_calls: bool = True
    text: TextOptions = Field(default_factory=TextOptions)
    reasoning: Reasoning = Field(default_factory=Reasoning)
    store: bool = False
    truncation: Literal["auto", "disabled"] = "disabled"
    metadata: dict[Text, Text] = Field(default_factory=dict, max_length=MAX_METADATA)
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    service_tier: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _stateless(cls, data: Any) -> Any:
        for name, unused in _NOT_HERE.items():
            value = data.get(name) if isinstance(data, dict) else None
            if value is not None and value not in unused:
                raise InvalidRequest(
                    f"'{name}' is not supported by this server, which stores nothing; send the "
                    "whole conversation as 'input'.",
                    param=name,
                    code=UNSUPPORTED,
                )
        return data

    @model_validator(mode="after")
    def _calls_match(self) -> ResponseBody:
        check_outputs(self.input)
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether the text's tokens come with log-probabilities."""
        return LOGPROBS in self.include

    def as_chat(self) -> ChatBody:
        """The same request as a chat; raises InvalidRequest."""
        messages = [item.as_message() for item in self.input]
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        tools, choice = self._offered()
        own = {
            "messages": joined(messages),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature if "temperature" in self.model_fields_set else None,
            "stop": self.stop,
            "logprobs": self.wants_logprobs,
            "top_logprobs": self.top_logprobs if self.wants_logprobs else None,
            "tools": [tool.for_chat() for tool in tools] or None,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.text.format.for_chat(),
            "reasoning_effort": self.reasoning.effort,
        }
        return self.chat(NAMES, own)

    def _offered(self) -> tuple[list[FunctionTool], Any]:
        """The tools that may be called, and the chat's choice among them."""
        choice = self.tool_choice
        if choice is None or (choice.type == "auto" and not self.tools):
            return self.tools, None
        if choice.type == "function":
            return self.tools, {"type": "function", "function": {"name": choice.name}}
        if choice.type != "allowed_tools":
            return self.tools, choice.type
        missing = choice.names - {tool.name for tool in self.tools}
        if missing:
            name = min(missing)
            raise InvalidRequest(f"There is no tool named {name!r}.", param="tool_choice")
        allowed = [tool for tool in self.tools if tool.name in choice.names]
        return allowed, choice.mode if allowed or choice.mode == "required" else None
