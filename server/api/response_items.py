"""An answer's parts as output items of /v1/responses, and the events that tell of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from offramp.server.api.generation import Delta
from offramp.server.api.logprobs import ScoredToken, TokenNames, chat_logprobs
from offramp.server.text.answer_parts import CallPart, Part, ReasoningPart, TextPart

Event = dict[str, Any]
Item = dict[str, Any]


class Output:
    """Items of one answer, in order; each is closed before the next one opens.

    `feed` and `close` return the events of what they changed, without sequence numbers. With
    ``logprobs`` texts carry those of their tokens; ``parsed`` says that the answer may hold more
    than text.
    """

    def __init__(self, names: TokenNames, *, logprobs: bool, parsed: bool) -> None:
        self.items: list[Item] = []
        self._names = names
        self._wants_logprobs = logprobs
        self._parsed = parsed
        self._open: Item | None = None

    def feed(self, delta: Delta) -> Iterator[Event]:
        """Take what the answer gained."""
        scored = self._scored(delta) if self._wants_logprobs else []
        texts = [part for part in delta.parts if isinstance(part, TextPart)]
        for part in delta.parts:
            # Tokens of several texts in one delta are those of the first.
            own = scored if texts and part is texts[0] else []
            yield from self._take(part, own)
        if not texts and scored and self._is_open("message"):
            yield from self._say("", scored)

    def close(self, finish_reason: str) -> Iterator[Event]:
        """The answer ended; one that says nothing has an empty message."""
        if not self.items:
            yield from self._begin(_message())
        whole = finish_reason != "length"
        yield from self._end("completed" if whole else "incomplete")

    def give_up(self) -> None:
        """The answer broke off; no event tells of its last item."""
        if self._open is not None:
            self._open["status"] = "incomplete"

    def _take(self, part: Part, scored: Sequence[ScoredToken]) -> Iterator[Event]:
        match part:
            case TextPart():
                if not self._is_open("message"):
                    yield from self._begin(_message())
                yield from self._say(part.text, scored)
            case ReasoningPart():
                if not self._is_open("reasoning"):
                    yield from self._begin(_reasoning())
                yield from self._think(part.text)
            case CallPart():
                if part.name is not None:
                    yield from self._begin(_call(part.id or "", part.name))
                yield from self._call(part.arguments)

    def _is_open(self, kind: str) -> bool:
        return self._open is not None and self._open["type"] == kind

    def _begin(self, item: Item) -> Iterator[Event]:
        yield from self._end("completed")
        self._open = item
        self.items.append(item)
        # What is told of an item must not grow with it.
        bare = {**item, "content": []} if "content" in item else dict(item)
        yield {"type": "response.output_item.added", "output_index": self._index, "item": bare}
        if "content" in item:
            part = dict(item["content"][0])
            yield {"type": "response.content_part.added", **self._place, "part": part}

    def _say(self, text: str, scored: Sequence[ScoredToken]) -> Iterator[Event]:
        assert self._open is not None
        part = self._open["content"][0]
        logprobs = chat_logprobs(self._names, scored)["content"]
        part["text"] += text
        part["logprobs"].extend(logprobs)
        kind = "response.output_text.delta"
        yield {"type": kind, **self._place, "delta": text, "logprobs": logprobs}

    def _think(self, text: str) -> Iterator[Event]:
        assert self._open is not None
        self._open["content"][0]["text"] += text
        yield {"type": "response.reasoning_text.delta", **self._place, "delta": text}

    def _call(self, arguments: str) -> Iterator[Event]:
        assert self._open is not None
        self._open["arguments"] += arguments
        if arguments:
            kind = "response.function_call_arguments.delta"
            yield {"type": kind, **self._item_place, "delta": arguments}

    def _end(self, status: str) -> Iterator[Event]:
        item = self._open
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            kind = "response.function_call_arguments.done"
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": kind, **self._item_place, **told}
        else:
            part = item["content"][0]
            text: Mapping[str, Any] = {"text": part["text"]}
            kind = "response.reasoning_text.done"
            if item["type"] == "message":
                kind, text = "response.output_text.done", {**text, "logprobs": part["logprobs"]}
            yield {"type": kind, **self._place, **text}
            yield {"type": "response.content_part.done", **self._place, "part": part}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": item}
        self._open = None

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    @property
    def _item_place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": self._index}

    @property
    def _place(self) -> dict[str, Any]:
        return {**self._item_place, "content_index": 0}

    def _scored(self, delta: Delta) -> Sequence[ScoredToken]:
        """The tokens of a delta that are its text: not those of thoughts, calls and marks."""
        goes_on = self._is_open("message") and all(isinstance(p, TextPart) for p in delta.parts)
        if goes_on or not self._parsed:
            return delta.scored
        rest = delta.text.encode()
        found: list[ScoredToken] = []
        for each in delta.scored:
            own = self._names.bytes_of(each.token)
            if own and rest.startswith(own):
                rest = rest[len(own) :]
                found.append(each)
        return found


def _message() -> Item:
    part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {**_head("msg", "message"), "role": "assistant", "content": [part]}


def _reasoning() -> Item:
    content = [{"type": "reasoning_text", "text": ""}]
    return {**_head("rs", "reasoning"), "summary": [], "content": content}


def _call(call_id: str, name: str) -> Item:
    return {**_head("fc", "function_call"), "call_id": call_id, "name": name, "arguments": ""}


def _head(prefix: str, kind: str) -> Item:
    return {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"}
