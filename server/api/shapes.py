"""How the two generation routes differ on the wire: names of objects and the form of a choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from offramp.server.api.choice import Delta


class Shape(Protocol):
    """The form of one route's answers."""

    id_prefix: ClassVar[str]
    whole: ClassVar[str]
    chunk: ClassVar[str]

    def choice(self, text: str) -> Mapping[str, Any]:
        """Text of a finished choice."""
        ...

    def delta(self, delta: Delta, *, first: bool) -> Mapping[str, Any]:
        """What a streamed choice gained; ``first`` marks its first chunk."""
        ...


class ChatShape:
    """POST /v1/chat/completions."""

    id_prefix: ClassVar[str] = "chatcmpl-"
    whole: ClassVar[str] = "chat.completion"
    chunk: ClassVar[str] = "chat.completion.chunk"

    def choice(self, text: str) -> Mapping[str, Any]:
        """The assistant's message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, delta: Delta, *, first: bool) -> Mapping[str, Any]:
        """The role comes once, in the first chunk."""
        gained: dict[str, str] = {"role": "assistant"} if first else {}
        if delta.text or first:
            gained["content"] = delta.text
        return {"delta": gained}


class CompletionShape:
    """POST /v1/completions."""

    id_prefix: ClassVar[str] = "cmpl-"
    whole: ClassVar[str] = "text_completion"
    chunk: ClassVar[str] = "text_completion"

    def choice(self, text: str) -> Mapping[str, Any]:
        """Plain text."""
        return {"text": text}

    def delta(self, delta: Delta, *, first: bool) -> Mapping[str, Any]:
        """Plain text."""
        del first
        return {"text": delta.text}
