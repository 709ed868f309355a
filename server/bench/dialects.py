"""How servers are asked for token ids, and how they tell theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from offramp.server.bench.load import Trace


@dataclass(frozen=True, slots=True)
class Ask:
    """One greedy answer of at most ``max_tokens`` tokens; ``ignore_eos`` makes it that long."""

    prompt: tuple[int, ...]
    mode: str
    max_tokens: int
    ignore_eos: bool


class Dialect(Protocol):
    """The wire format of one kind of server."""

    path: ClassVar[str]

    def body(self, ask: Ask, *, stream: bool) -> dict[str, Any]:
        """The request."""
        ...

    def absorb(self, trace: Trace, chunk: Mapping[str, Any], now: float) -> None:
        """Add the tokens of a streamed chunk, seen at ``now``, to ``trace``."""
        ...

    def token_ids(self, reply: Mapping[str, Any]) -> list[int]:
        """Ids of an answer that was not streamed."""
        ...


class Offramp:
    """OpenAI's completions with Offramp's fields.

    ``wishes`` are fields of ``early_exit`` for mode adaptive.
    """

    path: ClassVar[str] = "/v1/completions"

    def __init__(self, model: str, wishes: Mapping[str, Any]) -> None:
        self._model = model
        self._wishes = wishes

    def body(self, ask: Ask, *, stream: bool) -> dict[str, Any]:
        """See Dialect."""
        wishes = self._wishes if ask.mode == "adaptive" else {}
        streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return {
            "model": self._model,
            "prompt": list(ask.prompt),
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "ignore_eos": ask.ignore_eos,
            "return_token_ids": True,
            "early_exit": {"mode": ask.mode, **wishes},
            **streaming,
        }

    def absorb(self, trace: Trace, chunk: Mapping[str, Any], now: float) -> None:
        """See Dialect."""
        for choice in chunk["choices"]:
            ids = choice.get("token_ids") or []
            trace.token_ids += ids
            trace.times += [now] * len(ids)
        early_exit = (chunk.get("metrics") or {}).get("early_exit")
        if early_exit:
            trace.layers_executed = early_exit["layers_executed"]

    def token_ids(self, reply: Mapping[str, Any]) -> list[int]:
        """See Dialect."""
        return list(reply["choices"][0]["token_ids"])


class LlamaCpp:
    """llama.cpp's own completions: the OpenAI route next to it takes token ids but returns none.

    ``cache_prompt`` lets a prompt reuse what its slot still holds of the one before.
    """

    path: ClassVar[str] = "/completion"

    def __init__(self, *, cache_prompt: bool) -> None:
        self._cache_prompt = cache_prompt

    def body(self, ask: Ask, *, stream: bool) -> dict[str, Any]:
        """See Dialect."""
        return {
            "prompt": list(ask.prompt),
            "n_predict": ask.max_tokens,
            "temperature": 0,
            "ignore_eos": ask.ignore_eos,
            "cache_prompt": self._cache_prompt,
            "return_tokens": True,
            "stream": stream,
        }

    def absorb(self, trace: Trace, chunk: Mapping[str, Any], now: float) -> None:
        """See Dialect; ``tokens_predicted`` counts tokens whose ids are never streamed too."""
        trace.token_ids += chunk["tokens"]
        trace.times += [now] * (chunk["tokens_predicted"] - len(trace.times))

    def token_ids(self, reply: Mapping[str, Any]) -> list[int]:
        """See Dialect."""
        return list(reply["tokens"])
