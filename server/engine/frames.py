"""What the server and the engine's process write to each other: pickles behind their length.

Both ends are the same program on one socket pair that nobody else holds, which is what makes pickle
safe here. A grammar cannot be pickled: its source travels, and the engine's process compiles it
anew, with the tokenizer that came with the first one.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from offramp.server.engine.request import EngineOutput, RequestStats, StepStats, TokenEvent
from offramp.server.text.grammars import Grammar, GrammarCompiler, GrammarVocabulary

if TYPE_CHECKING:
    import socket

    from offramp.server.engine.loop import EngineInput

HEAD: Final = struct.Struct("!I")
_PROTOCOL: Final = pickle.HIGHEST_PROTOCOL
# What one read from the socket brings at most.
_READ_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Beat:
    """The engine's process lives; its step under way has taken ``stuck_for`` seconds."""

    stuck_for: float


@dataclass(frozen=True, slots=True)
class Ending:
    """Why the engine's process ends: a fault of the configuration, or of the engine itself."""

    message: str
    misconfigured: bool


@dataclass(frozen=True, slots=True)
class Request:
    """A request's pickle apart from its id, so that one that cannot be read still has a name."""

    request_id: str
    submitted_at: float
    body: bytes


def frame(message: object) -> bytes:
    """A message as it is sent."""
    body = pickle.dumps(message, _PROTOCOL)
    return HEAD.pack(len(body)) + body


def read(body: bytes) -> Any:
    """The message of a frame, without its length."""
    message = pickle.loads(body)  # noqa: S301 (of this program's other process)
    return _outputs(message) if isinstance(message, list) else message


def output_frame(outputs: Sequence[EngineOutput]) -> bytes:
    """Outputs as they are sent, after every step: plain values, without the names of their types.

    That takes a quarter of the time, here and where they are read.
    """
    return frame([(list(map(_event_values, events)), _step_values(s)) for events, s in outputs])


_STATS: Final = TokenEvent._fields.index("stats")
_fields_of_step = attrgetter(*(each.name for each in fields(StepStats)))


def _event_values(event: TokenEvent) -> tuple[Any, ...]:
    return *event[:_STATS], tuple(event.stats), *event[_STATS + 1 :]


def _step_values(stats: StepStats | None) -> Any:
    return None if stats is None else _fields_of_step(stats)


def _outputs(message: list[Any]) -> list[EngineOutput]:
    return [
        EngineOutput(tuple(map(_event, events)), None if stats is None else StepStats(*stats))
        for events, stats in message
    ]


def _event(values: Sequence[Any]) -> TokenEvent:
    own = list(values)
    own[_STATS] = RequestStats._make(own[_STATS])
    return TokenEvent._make(own)


class FrameReader:
    """Cuts what comes from a connection into messages."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that end in ``data``, the next bytes that came."""
        self._rest += data
        start = 0
        while len(self._rest) - start >= HEAD.size:
            (size,) = HEAD.unpack_from(self._rest, start)
            end = start + HEAD.size + size
            if end > len(self._rest):
                break
            yield read(bytes(self._rest[start + HEAD.size : end]))
            start = end
        del self._rest[:start]


def receive(connection: socket.socket) -> Any:
    """Wait for a frame's message; raises EOFError where the other end is gone."""
    (size,) = HEAD.unpack(_exactly(connection, HEAD.size))
    return read(_exactly(connection, size))


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = connection.recv(min(size, _READ_BYTES))
        if not part:
            raise EOFError("the connection was closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class RequestWriter:
    """Frames of requests for one engine process."""

    def __init__(self) -> None:
        self._vocabulary_sent = False

    def frame(self, item: EngineInput) -> bytes:
        """The frame of a request or an abort."""
        if isinstance(item, str):
            return frame(item)
        request, submitted_at = item
        body = io.BytesIO()
        pickler = _RequestPickler(body, with_vocabulary=not self._vocabulary_sent)
        pickler.dump(request)
        self._vocabulary_sent |= pickler.has_grammar
        return frame(Request(request.request_id, submitted_at, body.getvalue()))


class RequestReader:
    """Reads the bodies of requests in the engine's process."""

    def __init__(self) -> None:
        self._compiler: GrammarCompiler | None = None

    def read(self, request: Request) -> EngineInput:
        """The request; raises whatever keeps it from being read."""
        return _RequestUnpickler(
            io.BytesIO(request.body), self.grammar
        ).load(), request.submitted_at

    def grammar(self, source: str, vocabulary: GrammarVocabulary | None) -> Grammar:
        """The grammar of ``source``; ``vocabulary`` comes with the first one."""
        if vocabulary is not None:
            self._compiler = GrammarCompiler(vocabulary, vocabulary.size, vocabulary.ends)
        if self._compiler is None:
            raise pickle.UnpicklingError("a grammar came without its vocabulary")
        return self._compiler.compile(source)


class _RequestPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, *, with_vocabulary: bool) -> None:
        super().__init__(file, _PROTOCOL)
        self._with_vocabulary = with_vocabulary
        self.has_grammar = False

    def persistent_id(self, obj: object) -> tuple[str, GrammarVocabulary | None] | None:
        """Grammars by their source."""
        if not isinstance(obj, Grammar):
            return None
        self.has_grammar = True
        return obj.source, obj.vocabulary if self._with_vocabulary else None


class _RequestUnpickler(pickle.Unpickler):
    def __init__(
        self,
        file: io.BytesIO,
        grammar: Callable[[str, GrammarVocabulary | None], Grammar],
    ) -> None:
        super().__init__(file)
        self._grammar = grammar

    def persistent_load(self, pid: tuple[str, GrammarVocabulary | None]) -> Grammar:
        """A grammar of its source."""
        return self._grammar(*pid)
