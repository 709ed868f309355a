"""Calls of functions: how models write them, and conversations that hold some.

Three forms are known. In all of them a call is an object of a function's name and its arguments.
Where a chat template says nothing of tools, the model is told of them in a system message, and
calls are written as Hermes models do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final


class ToolFormat(StrEnum):
    """How a model writes calls."""

    HERMES = "hermes"
    """``<tool_call>{"name": ..., "arguments": ...}</tool_call>`` (Hermes, Qwen2.5, Qwen3)."""
    LLAMA3_JSON = "llama3_json"
    """``{"name": ..., "parameters": ...}``, several with ``;`` between them (Llama 3)."""
    MISTRAL = "mistral"
    """``[TOOL_CALLS]`` and a list of objects, or of names with ``[ARGS]`` between (Mistral)."""


HERMES_BEGIN: Final = "<tool_call>"
HERMES_END: Final = "</tool_call>"
MISTRAL_BEGIN: Final = "[TOOL_CALLS]"
LLAMA3_BEGIN: Final = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a client offers; ``parameters`` is a JSON schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def for_template(self) -> dict[str, Any]:
        """What chat templates understand."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, and whether the answer may or must call them.

    With ``required`` the answer is nothing but calls; ``parallel`` allows several.
    """

    tools: tuple[Tool, ...] = ()
    required: bool = False
    parallel: bool = True


def tool_format(template: str) -> ToolFormat:
    """The form that the calls of a model with this chat template have."""
    if MISTRAL_BEGIN in template:
        return ToolFormat.MISTRAL
    if HERMES_BEGIN in template or not knows_tools(template):
        return ToolFormat.HERMES
    if LLAMA3_BEGIN in template or "ipython" in template:
        return ToolFormat.LLAMA3_JSON
    return ToolFormat.HERMES


def knows_tools(template: str) -> bool:
    """Whether a chat template tells the model of tools itself."""
    return "tools" in template


def with_instructions(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
) -> list[dict[str, Any]]:
    """Messages for a template that knows no tools: these are in a system message.

    Calls and results in the conversation become text as Hermes models write it.
    """
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    text = _instructions(tools)
    if plain and plain[0]["role"] == "system":
        first = {**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [
        f"{HERMES_BEGIN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{HERMES_END}"
        for call in message.get("tool_calls", ())
    ]
    parts = [content, *calls] if content else calls
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**kept, "content": "\n".join(parts) if calls else content}


def _instructions(tools: Sequence[Tool]) -> str:
    signatures = "\n".join(json.dumps(tool.for_template(), ensure_ascii=False) for tool in tools)
    return (
        "You can call functions to help with the user's request. These are their signatures:\n"
        f"<tools>\n{signatures}\n</tools>\n"
        "To call a function, write its name and arguments as JSON between tags:\n"
        f'{HERMES_BEGIN}\n{{"name": <name>, "arguments": <object>}}\n{HERMES_END}'
    )
