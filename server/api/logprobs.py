"""Log-probabilities in the forms of OpenAI's and vLLM's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from offramp.models.step import TokenLogprobs
from offramp.server.text.grammars import GrammarError

if TYPE_CHECKING:
    from offramp.server.api.context import Context

# JSON has no infinity. A token that could not come has this log-probability, as in vLLM.
_LEAST: Final = -9999.0


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of an answer, or of its prompt, and where in the text it begins (characters).

    The first token of a prompt has no ``logprobs``.
    """

    token: int
    offset: int
    logprobs: TokenLogprobs | None


class TokenNames:
    """Tokens as texts and bytes."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def bytes_of(self, token: int) -> bytes:
        """The bytes that the token stands for."""
        try:
            return self._context.grammars.token_bytes(token)
        except GrammarError:
            # A tokenizer that only transformers knows: what it makes of the token alone.
            return self._context.loaded_tokenizer().decode([token]).encode()

    def unique(self, token: int) -> str:
        """A text that differs from that of every other token: part of a character is in hex."""
        own = self.bytes_of(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


def chat_logprobs(names: TokenNames, scored: Sequence[ScoredToken]) -> dict[str, Any]:
    """``logprobs`` of a chat's choice."""
    return {"content": [_entry(names, each) for each in scored], "refusal": None}


def completion_logprobs(
    names: TokenNames, scored: Sequence[ScoredToken], top: int
) -> dict[str, Any]:
    """``logprobs`` of a completion's choice; ``top`` best tokens were asked for."""
    return {
        "text_offset": [each.offset for each in scored],
        "token_logprobs": [each.logprobs and _finite(each.logprobs.logprob) for each in scored],
        "tokens": [names.unique(each.token) for each in scored],
        "top_logprobs": [_tops(names, each) for each in scored] if top else None,
    }


def prompt_logprobs(
    names: TokenNames, prompt: Sequence[int], found: Sequence[TokenLogprobs]
) -> list[dict[str, Any] | None]:
    """VLLM's ``prompt_logprobs``: for each token of the prompt what might have come there."""
    entries: list[dict[str, Any] | None] = [None]
    for token, own in zip(prompt[1:], found, strict=True):
        ranked = [(top, logprob, rank) for rank, (top, logprob) in enumerate(own.top, start=1)]
        others = [each for each in ranked if each[0] != token]
        entries.append(
            {
                str(index): {
                    "logprob": _finite(logprob),
                    "rank": rank,
                    "decoded_token": names.bytes_of(index).decode(errors="replace"),
                }
                for index, logprob, rank in [(token, own.logprob, own.rank), *others]
            }
        )
    return entries


def _entry(names: TokenNames, scored: ScoredToken) -> dict[str, Any]:
    assert scored.logprobs is not None
    return {
        **_named(names, scored.token, scored.logprobs.logprob),
        "top_logprobs": [_named(names, *each) for each in scored.logprobs.top],
    }


def _named(names: TokenNames, token: int, logprob: float) -> dict[str, Any]:
    own = names.bytes_of(token)
    text = own.decode(errors="replace")
    return {"token": text, "logprob": _finite(logprob), "bytes": list(own)}


def _tops(names: TokenNames, scored: ScoredToken) -> dict[str, float] | None:
    """The best tokens, and the one that came if it is none of them, as OpenAI has it."""
    if scored.logprobs is None:
        return None
    found = {names.unique(token): _finite(logprob) for token, logprob in scored.logprobs.top}
    return {**found, names.unique(scored.token): _finite(scored.logprobs.logprob)}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
