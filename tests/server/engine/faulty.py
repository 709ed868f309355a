"""An engine for processes of its own, which does to itself what a request's prompt says."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from offramp.server.engine.loop import EngineProtocol, EngineRequest
from offramp.server.engine.request import (
    EngineInfo,
    EngineOutput,
    FinishReason,
    GenerationRequest,
    RequestStats,
    TokenEvent,
)
from offramp.server.errors import EngineConfigError
from offramp.server.text.grammars import GrammarState

# First tokens of prompts.
ANSWER, RAISE, KILL, STOP, HANG, EXIT = range(6)


def _raise() -> None:
    raise RuntimeError("a wire came off")


_DEEDS: dict[int, Callable[[], object]] = {
    RAISE: _raise,
    KILL: lambda: os.kill(os.getpid(), signal.SIGKILL),
    STOP: lambda: os.kill(os.getpid(), signal.SIGSTOP),
    HANG: lambda: time.sleep(1e6),
    EXIT: lambda: os._exit(3),
}


class FaultyEngine:
    """One token per request and step: the number of this process, which tells engines apart.

    A request with a grammar gets a token that this allows.
    """

    def __init__(self) -> None:
        self.info = EngineInfo("faulty", 4, (2,), (0.5,), 50, 64, 8, 8, 8, "none")
        self._left: dict[str, int] = {}
        self._states: dict[str, GrammarState] = {}
        self._deeds: list[Callable[[], object]] = []

    def add(self, request: EngineRequest, submitted_at: float) -> None:
        assert isinstance(request, GenerationRequest)
        assert submitted_at <= time.monotonic()
        self._left[request.request_id] = request.sampling.max_tokens
        if request.grammar is not None:
            self._states[request.request_id] = request.grammar.start()
        if request.prompt[0] != ANSWER:
            self._deeds.append(_DEEDS[request.prompt[0]])

    def abort(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def step(self) -> EngineOutput:
        for deed in self._deeds:
            deed()
        events = []
        for request_id in list(self._left):
            self._left[request_id] -= 1
            reason = None if self._left[request_id] else FinishReason.LENGTH
            if reason is not None:
                del self._left[request_id]
            stats = RequestStats(0.0)
            events.append(TokenEvent(request_id, (self._token(request_id),), (4,), stats, reason))
        time.sleep(0.001)
        return EngineOutput(tuple(events))

    def _token(self, request_id: str) -> int:
        state = self._states.get(request_id)
        if state is None:
            return os.getpid()
        token = state.forced()[0]
        state.accept(token)
        return token


def build() -> EngineProtocol:
    """An engine."""
    return FaultyEngine()


def refuse() -> EngineProtocol:
    """What --max-model-len and the like may meet."""
    raise EngineConfigError("the model is not to be had like this")


def break_down() -> EngineProtocol:
    """What nobody foresaw."""
    raise MemoryError("no room")


def die() -> EngineProtocol:
    """What the system does where memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def write_nonsense() -> EngineProtocol:
    """What a library does that prints to the wrong descriptor."""
    for descriptor in range(3, 64):
        try:
            if os.path.samestat(os.fstat(descriptor), os.fstat(descriptor)):
                os.write(descriptor, b"\x00\x00\x00\x05hello")
        except OSError:
            continue
    time.sleep(1e6)
    raise AssertionError
