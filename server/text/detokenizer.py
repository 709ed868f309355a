"""Text of a growing sequence of token ids, without broken characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What the decoder says when ids do not extend the text it has already given out.
_INVALID_PREFIX = "Invalid prefix encountered"


class Detokenizer:
    """Incremental decoder of one sequence.

    A token that ends inside a character gives no text until the character is complete; `flush`
    gives what is still incomplete at the end, as U+FFFD. ``behind`` are tokens that the text goes
    on from: some decoders drop the space with which a text begins.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        behind: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(ids=list(behind), skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []

    def fresh(self) -> Detokenizer:
        """A decoder alike for another sequence, which goes on from nothing."""
        return Detokenizer(self._tokenizer, skip_special_tokens=self._skip)

    def push(self, token_id: int) -> str:
        """Text that ``token_id`` completes; empty while a character is incomplete."""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception as error:
            # The binding raises plain Exception, so the message is all there is to go by.
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            return self._restart()
        if text is None:
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        """Text of the tokens still held back; the sequence is over."""
        pending, self._pending = self._pending, []
        if not pending:
            return ""
        return self._tokenizer.decode(pending, skip_special_tokens=self._skip)

    def _restart(self) -> str:
        """Give out what is pending and go on with a decoder that remembers nothing."""
        self._stream = DecodeStream(skip_special_tokens=self._skip)
        return self.flush()
