"""Prompts to token ids."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from offramp.server.errors import ContextLengthExceeded, InvalidRequest, OfframpError
from offramp.server.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer as Backend

logger = logging.getLogger("offramp.tokenizer")

# Characters from which on the tokenizer's threads are quicker than they are to wake.
_WORTH_THREADS = 50_000

Render = Callable[[Sequence[Mapping[str, str]]], str]


class Tokenizer:
    """A fast tokenizer with its chat template.

    ``render`` turns messages into the prompt text, up to where the assistant begins to speak.
    Methods that encode take milliseconds and more on long prompts: call them on a worker thread.
    They share nothing that changes, so several threads may call them at once.
    """

    def __init__(self, backend: Backend, render: Render | None) -> None:
        self._backend = backend
        self._render = render
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._longest_token = max(map(len, vocabulary), default=1)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer and the chat template of a model folder.

        Raises OfframpError when the folder has no fast tokenizer.
        """
        # transformers takes seconds to import, which only a starting server should pay.
        transformers: Any = importlib.import_module("transformers")
        loaded = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if not loaded.is_fast:
            raise OfframpError(f"{folder} has no fast tokenizer (tokenizer.json).")

        def render(messages: Sequence[Mapping[str, str]]) -> str:
            text: str = loaded.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
            return text

        return cls(loaded.backend_tokenizer, render if loaded.chat_template else None)

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[tuple[int, ...]]:
        """Ids of each prompt, special tokens of the model's own format added.

        ``max_tokens`` is the context; a text too long for it by its length alone raises
        ContextLengthExceeded before any work is done.
        """
        for text in texts:
            self._refuse_hopeless(text, max_tokens, "prompt")
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=True)
        return [tuple(encoding.ids) for encoding in encodings]

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], max_tokens: int
    ) -> tuple[int, ...]:
        """Ids of a conversation; raises InvalidRequest where the template refuses it."""
        self.refuse_hopeless(messages, max_tokens, "messages")
        return self.encode_rendered([self.render_chat(messages)])[0]

    def encode_rendered(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of texts, or parts of texts, in which the template wrote the special tokens."""
        if sum(map(len, texts)) < _WORTH_THREADS:
            return [tuple(self._backend.encode(t, add_special_tokens=False).ids) for t in texts]
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [tuple(encoding.ids) for encoding in encodings]

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A decoder for one new sequence."""
        return Detokenizer(self._backend, skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation; raises InvalidRequest where the template refuses it."""
        if self._render is None:
            raise InvalidRequest(
                "This model has no chat template; use /v1/completions.", param="messages"
            )
        try:
            return self._render(messages)
        except Exception as error:
            # Templates are programs of the model's author: whatever one raises about these
            # messages is an answer to the client, never a fault of the server.
            logger.info("chat template refused a conversation: %s", type(error).__name__)
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {str(error)[:200]}",
                param="messages",
            ) from error

    def refuse_hopeless(
        self, messages: Sequence[Mapping[str, str]], max_tokens: int, param: str
    ) -> None:
        """Raise ContextLengthExceeded if the messages' length alone rules the context out."""
        self._refuse_hopeless("".join(each["content"] for each in messages), max_tokens, param)

    def _refuse_hopeless(self, text: str, max_tokens: int, param: str) -> None:
        if len(text) > max_tokens * self._longest_token:
            raise ContextLengthExceeded(
                f"This model's context is {max_tokens} tokens; a prompt of {len(text)} characters "
                "does not fit.",
                param=param,
            )
