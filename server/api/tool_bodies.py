"""Functions that a request offers, the choice among them, and calls of them in a conversation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from offramp.server.api.fields import UNSUPPORTED, RequestModel, Text
from offramp.server.errors import InvalidRequest
from offramp.server.text.tools import Tool, ToolUse

MAX_TOOLS: Final = 128
_NO_PARAMETERS: Final = {"type": "object", "properties": {}}

Name = Annotated[Text, Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")]


class Function(RequestModel):
    """A function's signature; ``parameters`` is a JSON schema of its arguments."""

    name: Name
    description: Text = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: dict(_NO_PARAMETERS))
    strict: bool = False


def _only_functions(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type", "function") != "function":
        raise PydanticCustomError(UNSUPPORTED, "only tools of type function are supported")
    return value


class ToolBody(RequestModel):
    """A tool that a request offers."""

    type: Literal["function"]
    function: Function


class NamedFunction(RequestModel):
    """A function by its name."""

    name: Name


class NamedTool(RequestModel):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(RequestModel):
    """A function with the arguments it was called with, JSON in a string."""

    name: Text
    arguments: Text = "{}"


class ToolCall(RequestModel):
    """A call in an assistant's message."""

    id: Text = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """What chat templates understand: arguments are an object."""
        try:
            arguments: Any = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            # A model may have written anything; the template gets it as it was.
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class CallItem(RequestModel):
    """A call in a conversation: ``arguments`` of a function, ``input`` of a custom tool."""

    type: Literal["function_call", "custom_tool_call"]
    call_id: Text
    arguments: Text | None = None
    input: Text | None = None

    @model_validator(mode="after")
    def _has_its_text(self) -> CallItem:
        wanted = "arguments" if self.type == "function_call" else "input"
        if getattr(self, wanted) is None:
            raise PydanticCustomError("missing", "the call needs {name}", {"name": wanted})
        return self

    @property
    def said(self) -> str:
        """What the tool was called with."""
        return (self.arguments if self.type == "function_call" else self.input) or ""


class OutputItem(RequestModel):
    """What a call gave, by the call's id."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Text


def check_outputs(items: Sequence[RequestModel]) -> None:
    """Raise InvalidRequest for an output in ``input`` whose call does not come before it."""
    calls: set[str] = set()
    for index, item in enumerate(items):
        if isinstance(item, CallItem):
            calls.add(item.call_id)
        elif isinstance(item, OutputItem) and item.call_id not in calls:
            raise InvalidRequest(
                "An output's call_id is that of no call before it.",
                param=f"input[{index}].call_id",
            )


Tools = Annotated[
    list[Annotated[ToolBody, BeforeValidator(_only_functions)]],
    Field(min_length=1, max_length=MAX_TOOLS),
]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[NamedTool, Tag("named")],
    Discriminator(lambda value: "named" if isinstance(value, dict | NamedTool) else "word"),
]


def tool_use(
    tools: Sequence[ToolBody] | None, choice: ToolChoice | None, *, parallel: bool
) -> ToolUse:
    """What a request says of tools; raises InvalidRequest where it makes no sense."""
    offered = [tool.function for tool in tools or ()]
    names = [function.name for function in offered]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"Two tools are named {twice!r}.", param="tools")
    if isinstance(choice, NamedTool):
        wanted = choice.function.name
        if wanted not in names:
            raise InvalidRequest(f"There is no tool named {wanted!r}.", param="tool_choice")
        offered = [function for function in offered if function.name == wanted]
    elif choice in ("auto", "required") and not offered:
        raise InvalidRequest("'tool_choice' is only allowed with 'tools'.", param="tool_choice")
    if choice == "none":
        return ToolUse()
    return ToolUse(
        tuple(Tool(each.name, each.description, each.parameters) for each in offered),
        required=choice == "required" or isinstance(choice, NamedTool),
        parallel=parallel and not isinstance(choice, NamedTool),
    )
