"""Bodies of /v1/messages and /v1/messages/count_tokens (Anthropic)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from offramp.server.api.adapted import (
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
    MAX_STOP_LENGTH,
    Count,
    RequestModel,
    Text,
)
from offramp.server.api.schemas import ChatBody
from offramp.server.api.tool_bodies import MAX_TOOLS, Name
from offramp.server.errors import InvalidRequest

NAMES: Final[Names] = {
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
}
# More than OpenAI allows: this API names no bound.
MAX_STOP_SEQUENCES: Final = 64
# Blocks of a conversation, each with the fields it must have, by who may write them.
_BLOCKS: Final[Mapping[str, tuple[str, ...]]] = {
    "text": ("text",),
    "tool_result": ("tool_use_id",),
    "tool_use": ("id", "name", "input"),
    "thinking": ("thinking",),
    "redacted_thinking": (),
}
_OWN: Final[Mapping[str, frozenset[str]]] = {
    "user": frozenset({"text", "tool_result"}),
    "assistant": frozenset({"text", "tool_use", "thinking", "redacted_thinking"}),
    "system": frozenset({"text"}),
}


def _as_blocks(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _TextBlock(RequestModel):
    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        return of_type(data, {"text"})


_Texts = Annotated[
    list[_TextBlock],
    Field(max_length=MAX_PARTS, fail_fast=True),
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[_TextBlock]),
]


def _joined_texts(blocks: list[_TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)


class _Block(RequestModel):
    """A block of a message, of any type; which fields it has is up to its type."""

    type: Literal["text", "tool_result", "tool_use", "thinking", "redacted_thinking"]
    text: Text | None = None
    id: Text | None = None
    name: Text | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Text | None = None
    content: _Texts = Field(default_factory=list)
    is_error: bool = False
    thinking: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        # Before the fields, which mean other things in blocks of other types.
        return of_type(data, _BLOCKS)

    @model_validator(mode="after")
    def _complete(self) -> _Block:
        for name in _BLOCKS[self.type]:
            if getattr(self, name) is None:
                raise PydanticCustomError("missing", "the block needs {name}", {"name": name})
        return self

    def as_call(self) -> dict[str, Any]:
        """A tool_use block in the chat's form."""
        arguments = json.dumps(self.input, ensure_ascii=False)
        function = {"name": self.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}

    def as_result(self) -> Message:
        """A tool_result block in the chat's form; the model reads that the tool failed."""
        text = _joined_texts(self.content)
        if self.is_error:
            text = f"Error: {text}"
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": text}


class _Message(RequestModel):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[_Block],
        Field(max_length=MAX_PARTS, fail_fast=True),
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[_Block]),
    ]

    @model_validator(mode="after")
    def _by_whom(self) -> _Message:
        for block in self.content:
            if block.type not in _OWN[self.role]:
                raise PydanticCustomError(
                    "block_type",
                    "{kind} blocks cannot be in messages of the {role}",
                    {"kind": block.type, "role": self.role},
                )
        return self

    def as_messages(self) -> list[Message]:
        """The chat's messages: results are messages of their own, before the text."""
        results = [each.as_result() for each in self.content if each.type == "tool_result"]
        texts = [each.text or "" for each in self.content if each.type == "text"]
        thoughts = [each.thinking or "" for each in self.content if each.type == "thinking"]
        calls = [each.as_call() for each in self.content if each.type == "tool_use"]
        message: Message = {"role": self.role, "content": "\n".join(texts)}
        if thoughts:
            message["reasoning_content"] = "\n".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        return [*results, message] if texts or calls or thoughts or not results else results


class CustomTool(RequestModel):
    """A tool of the client's; ``input_schema`` is a JSON schema of its input."""

    type: Literal["custom"] = "custom"
    name: Name
    description: Text | None = None
    input_schema: dict[str, Any]

    def for_chat(self) -> dict[str, Any]:
        """The same in the chat's form."""
        fields = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
        }
        return {"type": "function", "function": fields}


_Tools = Annotated[
    list[CustomTool],
    Field(max_length=MAX_TOOLS, fail_fast=True),
    BeforeValidator(
        lambda tools: own_tools(tools, "custom"),
        json_schema_input_type=list[CustomTool | dict[str, Any]],
    ),
]


class AnthropicChoice(RequestModel):
    """Which tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _named(self) -> AnthropicChoice:
        if self.type == "tool" and self.name is None:
            raise PydanticCustomError("missing", "the choice of a tool needs its name")
        return self

    def for_chat(self) -> Any:
        """The chat's ``tool_choice``."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(RequestModel):
    """Whether a model that thinks is to; its thoughts count as part of the answer."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class AnswerFormat(RequestModel):
    """A JSON schema that the answer keeps to."""

    type: Literal["json_schema"]
    # A field named schema would hide a method of pydantic's.
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestModel):
    """How much the model thinks, and the form of its answer."""

    effort: Annotated[Text, Field(max_length=32)] | None = None
    format: AnswerFormat | None = None


class CountBody(AdaptedBody):
    """Body of POST /v1/messages/count_tokens: what a prompt is made of."""

    messages: list[_Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    system: _Texts = Field(default_factory=list)
    tools: _Tools = Field(default_factory=list)
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig = Field(default_factory=OutputConfig)

    @model_validator(mode="after")
    def _results_match(self) -> CountBody:
        used: set[str | None] = set()
        for index, message in enumerate(self.messages):
            for place, block in enumerate(message.content):
                if block.type == "tool_use":
                    used.add(block.id)
                elif block.type == "tool_result" and block.tool_use_id not in used:
                    raise InvalidRequest(
                        "A result's tool_use_id is that of no tool_use before it.",
                        param=f"messages[{index}].content[{place}].tool_use_id",
                    )
        return self

    def as_chat(self) -> ChatBody:
        """The same request as a chat; raises InvalidRequest."""
        messages = [each for message in self.messages for each in message.as_messages()]
        if self.system:
            messages.insert(0, {"role": "system", "content": _joined_texts(self.system)})
        messages = joined(messages)
        last = messages[-1]
        choice, form = self.tool_choice, self.output_config.format
        options = {} if self.thinking is None else {"enable_thinking": self._thinks}
        json_schema = {"name": "answer", "schema": form.schema_} if form else None
        own = {
            "messages": messages,
            # An assistant's text at the end is the beginning of the answer.
            "continue_final_message": last["role"] == "assistant"
            and bool(last.get("content"))
            and not last.get("tool_calls"),
            "tools": [tool.for_chat() for tool in self.tools] or None,
            "tool_choice": choice.for_chat() if choice and self._may_choose else None,
            "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
            "reasoning_effort": self.output_config.effort,
            "response_format": {"type": "json_schema", "json_schema": json_schema}
            if form
            else None,
            "chat_template_kwargs": {**options, **self.chat_template_kwargs},
        }
        return self.chat(NAMES, {**own, **self._limits()})

    def _limits(self) -> dict[str, Any]:
        """How the answer is made, in the chat's terms."""
        return {}

    @property
    def _thinks(self) -> bool:
        return self.thinking is not None and self.thinking.type != "disabled"

    @property
    def _may_choose(self) -> bool:
        """Whether the choice means anything: where all tools were skipped, "auto" is none."""
        return bool(self.tools) or (
            self.tool_choice is not None and self.tool_choice.type != "auto"
        )


class MessagesBody(CountBody):
    """Body of POST /v1/messages."""

    max_tokens: Count
    temperature: float = Field(default=1.0, ge=0, le=1)
    stop_sequences: list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]] = Field(
        default_factory=list, max_length=MAX_STOP_SEQUENCES
    )
    metadata: dict[Text, Any] = Field(default_factory=dict)
    service_tier: Text | None = None

    def as_chat(self) -> ChatBody:
        """See `CountBody`; the stop sequences may be more than a chat's."""
        return super().as_chat().model_copy(update={"stop": self.stop_sequences})

    def _limits(self) -> dict[str, Any]:
        given = "temperature" in self.model_fields_set
        return {
            "max_completion_tokens": self.max_tokens,
            "temperature": self.temperature if given else None,
        }
