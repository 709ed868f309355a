"""An answer's text, as it comes, to its parts: reasoning, text and calls of functions."""

from __future__ import annotations

import json
import re
import secrets
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from offramp.server.text.tools import (
    HERMES_BEGIN,
    HERMES_END,
    LLAMA3_BEGIN,
    MISTRAL_BEGIN,
    ToolFormat,
)

THINK_BEGIN: Final = "<think>"
THINK_END: Final = "</think>"
_ARGUMENT_KEYS: Final = ("arguments", "parameters")
# An object whose name comes first and whose arguments are an object: these can be sent as they
# come. Of all others the end must be known.
_HEAD: Final = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAME: Final = re.compile(r"([\w.-]{1,64})\s*(?:\[ARGS\]\s*)?(?=\{)")
_LONGEST_NAME: Final = 64
_SHORT_ID: Final = 9


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """Text that the model wrote to think."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """Part of the ``index``-th call: ``id`` and ``name`` come first, then pieces of arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


Part = TextPart | ReasoningPart | CallPart


class AnswerParser:
    """Splits an answer into parts; nothing is lost: what is no call after all stays text.

    With ``tools`` calls in that form are looked for. With ``reasoning`` the answer may begin with
    text between ``<think>`` tags; ``thinking`` says that the prompt opened them already.
    """

    def __init__(
        self,
        tools: ToolFormat | None = None,
        *,
        reasoning: bool = False,
        thinking: bool = False,
    ) -> None:
        self._format = tools
        self._buffer = ""
        self._parts: list[Part] = []
        self._call: _CallReader | None = None
        self._thought = False
        self.num_calls = 0
        self._state: Callable[[bool], bool] = self._text
        if reasoning:
            self._state = self._thinking if thinking else self._before_thinking
        elif tools is ToolFormat.LLAMA3_JSON:
            self._state = self._llama

    @property
    def in_thoughts(self) -> bool:
        """Whether the answer is still in thoughts that have begun."""
        return self._state == self._thinking

    def push(self, text: str) -> list[Part]:
        """Take the next piece; returns the parts that are now certain."""
        self._buffer += text
        return self._run(ended=False)

    def flush(self) -> list[Part]:
        """The answer ended: what was held back is what it looks like."""
        return self._run(ended=True)

    def _run(self, *, ended: bool) -> list[Part]:
        while self._state(ended):
            pass
        parts, self._parts = self._parts, []
        return _joined(parts)

    def _before_thinking(self, ended: bool) -> bool:  # noqa: FBT001 (as all states)
        stripped = self._buffer.lstrip()
        if stripped.startswith(THINK_BEGIN):
            self._buffer = stripped[len(THINK_BEGIN) :]
            self._state = self._thinking
            return True
        if THINK_BEGIN.startswith(stripped) and not ended:
            return False
        self._state = self._answer_state()
        return True

    def _thinking(self, ended: bool) -> bool:  # noqa: FBT001
        if not self._thought:
            self._buffer = self._buffer.lstrip()
        before, found, after = self._buffer.partition(THINK_END)
        if found:
            self._reasoning(before.rstrip())
            self._buffer = after
            self._state = self._after_thinking
            return True
        self._reasoning(self._take(self._certain(THINK_END, ended)))
        return False

    def _after_thinking(self, ended: bool) -> bool:  # noqa: FBT001
        # Line breaks between thoughts and answer belong to neither.
        self._buffer = self._buffer.lstrip("\n")
        if not self._buffer and not ended:
            return False
        self._state = self._answer_state()
        return True

    def _answer_state(self) -> Callable[[bool], bool]:
        return self._llama if self._format is ToolFormat.LLAMA3_JSON else self._text

    def _text(self, ended: bool) -> bool:  # noqa: FBT001
        """Text up to where a call begins."""
        begin = {ToolFormat.HERMES: HERMES_BEGIN, ToolFormat.MISTRAL: MISTRAL_BEGIN}.get(
            self._format or ToolFormat.LLAMA3_JSON
        )
        if begin is None:
            self._emit(self._take(len(self._buffer)))
            return False
        before, found, after = self._buffer.partition(begin)
        if found:
            # Space between text and calls belongs to neither.
            self._emit(before.rstrip())
            self._buffer = after
            hermes = self._format is ToolFormat.HERMES
            self._state = self._hermes if hermes else self._mistral
            return True
        text = self._take(self._certain(begin, ended))
        if text.strip() or not self.num_calls:
            self._emit(text)
        return False

    def _certain(self, marker: str, ended: bool) -> int:  # noqa: FBT001
        """Characters of the buffer that lie before a ``marker`` and the space around it."""
        if ended:
            return len(self._buffer)
        kept = _held_back(self._buffer, marker)
        return len(self._buffer[: len(self._buffer) - kept].rstrip())

    def _hermes(self, ended: bool) -> bool:  # noqa: FBT001
        if self._read_call(ended, HERMES_BEGIN):
            self._state = self._hermes_end
            return True
        return self._state != self._hermes

    def _hermes_end(self, ended: bool) -> bool:  # noqa: FBT001
        rest = self._buffer.lstrip()
        if rest.startswith(HERMES_END):
            self._buffer = rest[len(HERMES_END) :]
        elif HERMES_END.startswith(rest) and not ended:
            return False
        self._state = self._between
        return True

    def _between(self, ended: bool) -> bool:  # noqa: FBT001
        # Space behind a call, up to the next one or to text.
        self._buffer = self._buffer.lstrip()
        if not self._buffer and not ended:
            return False
        self._state = self._text
        return True

    def _mistral(self, ended: bool) -> bool:  # noqa: FBT001
        """What follows the marker: a list of objects, or a name and an object."""
        rest = self._buffer.lstrip()
        if rest.startswith("["):
            self._buffer = rest[1:]
            self._state = self._mistral_list
            return True
        named = _NAME.match(rest)
        if named is not None:
            self._call = _CallReader(self._begin(named[1]))
            self._buffer = rest[named.end() :]
            self._state = self._mistral_named
            return True
        if not ended and len(rest) < _LONGEST_NAME:
            return False
        self._emit(MISTRAL_BEGIN)
        return self._give_up()

    def _mistral_named(self, ended: bool) -> bool:  # noqa: FBT001
        if self._read_call(ended, ""):
            self._state = self._between
        return self._state != self._mistral_named

    def _mistral_list(self, ended: bool) -> bool:  # noqa: FBT001
        if self._call is None:
            self._buffer = self._buffer.lstrip(" \n\t,")
            if self._buffer.startswith("]"):
                self._buffer = self._buffer[1:]
                self._state = self._between
                return True
            if not self._buffer:
                return False
        begin = "" if self.num_calls else f"{MISTRAL_BEGIN}["
        return self._read_call(ended, begin) or self._state != self._mistral_list

    def _llama(self, ended: bool) -> bool:  # noqa: FBT001
        """Calls fill the whole answer, or there are none."""
        if self._call is None:
            rest = self._buffer.lstrip(" \n\t;") if self.num_calls else self._buffer.lstrip()
            rest = rest.removeprefix(LLAMA3_BEGIN).lstrip()
            if rest and not rest.startswith("{") and not LLAMA3_BEGIN.startswith(rest):
                return self._give_up()
            if not rest or LLAMA3_BEGIN.startswith(rest):
                return self._give_up() if ended and rest else False
            self._buffer = rest
        return self._read_call(ended, "") or self._state != self._llama

    def _give_up(self) -> bool:
        """The rest is plain text."""
        self._call = None
        self._format = None
        self._state = self._text
        return True

    def _read_call(self, ended: bool, begin: str) -> bool:  # noqa: FBT001
        """Go on with a call; True when it is complete. What is none becomes text."""
        reader = self._call = self._call or _CallReader()
        arguments = reader.push(self._buffer)
        self._buffer = ""
        if reader.call is None and reader.name is not None:
            reader.call = self._begin(reader.name)
        if reader.call is not None and arguments:
            self._parts.append(CallPart(reader.call, arguments=arguments))
        if reader.complete and reader.call is not None:
            self._buffer, self._call = reader.rest, None
            return True
        if reader.call is None and (reader.complete or reader.broken or ended):
            self._buffer = reader.text
            if begin:
                self._emit(begin)
            self._give_up()
        return False

    def _begin(self, name: str) -> int:
        index, self.num_calls = self.num_calls, self.num_calls + 1
        self._parts.append(CallPart(index, _call_id(self._format), name))
        return index

    def _take(self, count: int) -> str:
        text, self._buffer = self._buffer[:count], self._buffer[count:]
        return text

    def _emit(self, text: str) -> None:
        if text:
            self._parts.append(TextPart(text))

    def _reasoning(self, text: str) -> None:
        if text:
            self._thought = True
            self._parts.append(ReasoningPart(text))


class _CallReader:
    """A JSON object of name and arguments, or only the arguments of call ``call``, as it comes.

    ``call`` is the number of the call once its ``name`` is known, ``rest`` what follows when it is
    ``complete``, ``text`` all that was read.
    """

    def __init__(self, call: int | None = None) -> None:
        self.call = call
        self.name: str | None = None
        self.complete = False
        self.broken = False
        self.text = ""
        self.rest = ""
        self._whole = _ObjectEnd()
        self._arguments = _ObjectEnd()
        self._start = None if call is None else 0
        self._in_object = call is None
        self._end: int | None = None
        self._sent = 0

    def push(self, text: str) -> str:
        """Take more text; returns the arguments that came with it."""
        self.text += text
        if self._start is None:
            head = _HEAD.match(self.text)
            if head is None:
                return self._read_whole()
            self.name, self._start = json.loads(head[1]), head.end()
        own = self.text[self._start :]
        if self._end is None:
            self._end = self._arguments.find(own)
        piece = own[self._sent : self._end]
        self._sent += len(piece)
        if self._end is not None:
            self._close(own[self._end :])
        return piece

    def _close(self, after: str) -> None:
        """The arguments are over; the bracket of the object around them may yet come."""
        rest = after.lstrip() if self._in_object else after
        if rest or not self._in_object:
            self.complete = True
            self.rest = rest[1:] if self._in_object and rest[0] == "}" else after

    def _read_whole(self) -> str:
        """An object in another order: all of its arguments once it is complete."""
        end = self._whole.find(self.text)
        self.broken = self._whole.broken
        if end is None:
            return ""
        self.complete, self.rest = True, self.text[end:]
        try:
            found = json.loads(self.text[:end])
            name = found["name"]
            given: Any = next((found[key] for key in _ARGUMENT_KEYS if key in found), {})
        except (ValueError, KeyError, RecursionError):
            return ""
        if not isinstance(name, str):
            return ""
        self.name = name
        return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


class _ObjectEnd:
    """Finds where a JSON object that grows ends, looking at each character once."""

    def __init__(self) -> None:
        self._place = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.broken = False

    def find(self, text: str) -> int | None:
        """The place behind the object that ``text`` begins with, None while it is not there."""
        for place in range(self._place, len(text)):
            self._look(text[place])
            if self.broken or (self._depth == 0 and text[place] == "}"):
                self._place = place + 1
                return None if self.broken else place + 1
        self._place = len(text)
        return None

    def _look(self, char: str) -> None:
        if self._in_string:
            closes = char == '"' and not self._escaped
            self._escaped = char == "\\" and not self._escaped
            self._in_string = not closes
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        if self._depth <= 0 and not char.isspace() and char not in "}]":
            self.broken = True


def _held_back(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that a ``marker`` may begin with."""
    most = min(len(text), len(marker) - 1)
    return next((n for n in range(most, 0, -1) if marker.startswith(text[-n:])), 0)


def _joined(parts: list[Part]) -> list[Part]:
    """Parts with neighbours of one kind put together."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, TextPart) and isinstance(last, TextPart):
            joined[-1] = TextPart(last.text + part.text)
        elif isinstance(part, ReasoningPart) and isinstance(last, ReasoningPart):
            joined[-1] = ReasoningPart(last.text + part.text)
        elif isinstance(part, CallPart) and isinstance(last, CallPart) and part.name is None:
            joined[-1] = replace(last, arguments=last.arguments + part.arguments)
        else:
            joined.append(part)
    return joined


def _call_id(form: ToolFormat | None) -> str:
    if form is ToolFormat.MISTRAL:
        # Mistral's templates accept no other ids.
        letters = string.ascii_letters + string.digits
        return "".join(secrets.choice(letters) for _ in range(_SHORT_ID))
    return f"call_{uuid.uuid4().hex[:24]}"
