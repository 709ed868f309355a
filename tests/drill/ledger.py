"""Requests as their clients see them, and the account of how each of them ended."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

# Answers that say "not now": such a request was never accepted.
_REFUSALS = frozenset({429, 503})
_FINISHED = frozenset({"stop", "length", "tool_calls"})


@dataclass
class Ledger:
    """How the requests of a phase ended, each once; ``faults`` is what must not be."""

    ended: Counter[str] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        """Requests that the server took."""
        return sum(count for how, count in self.ended.items() if not how.startswith("refused"))

    def fault(self, text: str) -> None:
        """Note what must not be."""
        self.faults.append(text)

    def unless(self, good: bool, text: str) -> None:  # noqa: FBT001 (reads as a sentence)
        """Note ``text`` as a fault unless ``good``."""
        if not good:
            self.fault(text)

    def only(self, *allowed: str) -> None:
        """Requests may have ended in these ways alone."""
        for how, count in self.ended.items():
            self.unless(how in allowed, f"{count} requests ended with {how}")


class Stream:
    """Reads one streamed answer and checks its form: one terminal event, then ``[DONE]``."""

    def __init__(self) -> None:
        self.request_id: str | None = None
        self.tokens = 0
        self._ends: list[str] = []
        self._done = False
        self._faults: list[str] = []

    def feed(self, line: str) -> None:
        """A line of the body."""
        if not line.startswith("data: "):
            return
        if self._done:
            self._faults.append("something came behind [DONE]")
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self._done = True
        else:
            self._chunk(json.loads(data))

    def _chunk(self, chunk: Mapping[str, Any]) -> None:
        if "error" in chunk:
            self._ends.append("error")
            self._faults += _not_an_envelope(chunk)
            return
        self.request_id = chunk["id"]
        for choice in chunk["choices"]:
            self.tokens += 1
            if choice["finish_reason"] is not None:
                self._ends.append(choice["finish_reason"])

    def end(self) -> tuple[str, list[str]]:
        """How it ended, and what was wrong with that, once nothing more comes."""
        faults = list(self._faults)
        if len(self._ends) != 1:
            faults.append(f"a stream had {len(self._ends)} terminal events")
        if not self._done:
            faults.append("a stream ended without [DONE]")
        how = self._ends[0] if self._ends else "nothing"
        return ("finished" if how in _FINISHED else how), faults


async def ask(
    client: httpx2.AsyncClient,
    ledger: Ledger,
    body: Mapping[str, Any],
    *,
    leave_after: int | None = None,
    on_first: Callable[[], None] | None = None,
) -> None:
    """Send a streamed completion and enter its end; leave after so many events if told to."""
    stream = Stream()
    try:
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
            if reply.status_code != httpx2.codes.OK:
                refused = json.loads(await reply.aread())
                ledger.faults += _not_an_envelope(refused)
                kind = "refused" if reply.status_code in _REFUSALS else "failed"
                ledger.ended[f"{kind} {reply.status_code}"] += 1
                return
            async for line in _lines(reply):
                stream.feed(line)
                if on_first is not None and stream.tokens == 1:
                    on_first()
                if leave_after is not None and stream.tokens >= leave_after:
                    ledger.ended["left"] += 1
                    return
    except (httpx2.HTTPError, ValueError) as error:
        ledger.ended["connection lost"] += 1
        ledger.fault(f"a connection was lost: {type(error).__name__}: {error}")
        return
    how, faults = stream.end()
    ledger.ended[how] += 1
    ledger.faults += faults
    if stream.request_id is not None:
        ledger.unless(stream.request_id not in ledger.ids, f"{stream.request_id} was used twice")
        ledger.ids.add(stream.request_id)


async def _lines(reply: httpx2.Response) -> AsyncIterator[str]:
    async for line in reply.aiter_lines():
        if line:
            yield line


def _not_an_envelope(answer: Any) -> list[str]:
    """What is wrong with an error's form."""
    error = answer.get("error") if isinstance(answer, dict) else None
    wanted = {"message", "type", "param", "code"}
    if isinstance(error, dict) and wanted <= error.keys():
        return []
    return [f"an error is not in OpenAI's form: {str(answer)[:100]}"]
