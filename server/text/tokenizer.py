"""Prompts to token ids."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from offramp.server.errors import ContextLengthExceeded, InvalidRequest, OfframpError
from offramp.server.text.detokenizer import Detokenizer
from offramp.server.text.tokenizer_info import tokenizer_info

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer as Backend

logger = logging.getLogger("offramp.tokenizer")

# Tokens of a prompt that decide how a decoder goes on from it.
_LOOK_BACK = 8
# Where a special token's name in a message is cut in two, so that it stays text.
_CUT = "\ufdd0\ufdd1"
# Characters from which on the tokenizer's threads are quicker than they are to wake.
_WORTH_THREADS = 50_000

Render = Callable[[Sequence[Mapping[str, str]]], str]


class Tokenizer:
    """A fast tokenizer with its chat template.

    ``render`` turns messages into the prompt text, up to where the assistant begins to speak.
    The names of special tokens in messages are text, unless ``special_in_messages``: a client
    cannot end its turn, or speak as somebody else.

    Methods that encode take milliseconds and more on long prompts: call them on a worker thread.
    They share nothing that changes, so several threads may call them at once.
    """

    def __init__(
        self,
        backend: Backend,
        render: Render | None,
        *,
        special_in_messages: bool = False,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.info = info or {}
        """Its settings, see `tokenizer_info`; empty where they are not known."""
        self._backend = backend
        self._render = render
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._longest_token = max(map(len, vocabulary), default=1)
        added = backend.get_added_tokens_decoder().items()
        self._special_ids = {token.content: index for index, token in added if token.special}
        names = sorted(self._special_ids, key=len, reverse=True)
        found = "|".join(map(re.escape, names))
        self._special = re.compile(found) if names and not special_in_messages else None

    @classmethod
    def load(cls, folder: Path, *, special_in_messages: bool = False) -> Tokenizer:
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

        backend = loaded.backend_tokenizer
        # A tokenizer.json may say that texts are to be cut or filled up; prompts never are.
        backend.no_truncation()
        backend.no_padding()
        template = render if loaded.chat_template else None
        info = tokenizer_info(loaded)
        return cls(backend, template, special_in_messages=special_in_messages, info=info)

    def encode(
        self, texts: Sequence[str], max_tokens: int, *, special: bool = True
    ) -> list[tuple[int, ...]]:
        """Ids of each prompt, with the special tokens of the model's own format if ``special``.

        ``max_tokens`` is the context; a text too long for it by its length alone raises
        ContextLengthExceeded before any work is done.
        """
        for text in texts:
            self._refuse_hopeless(text, max_tokens, "prompt")
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=special)
        return [tuple(encoding.ids) for encoding in encodings]

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], max_tokens: int
    ) -> tuple[int, ...]:
        """Ids of a conversation; raises InvalidRequest where the template refuses it."""
        self.refuse_hopeless(messages, max_tokens, "messages")
        return self.encode_rendered([self.render_chat(messages)])[0]

    def encode_rendered(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of texts, or parts of texts, in which the template wrote the special tokens."""
        parts = [text.split(_CUT) for text in texts]
        flat = [part for own in parts for part in own]
        if sum(map(len, texts)) < _WORTH_THREADS:
            encodings = [self._backend.encode(part, add_special_tokens=False) for part in flat]
        else:
            encodings = self._backend.encode_batch(flat, add_special_tokens=False)
        ids = iter(encodings)
        return [tuple(i for _ in own for i in next(ids).ids) for own in parts]

    def as_text(self, text: str) -> str:
        """A client's text for `encode_rendered`, in which names of special tokens stay text."""
        return text if self._special is None else self._special.sub(_cut, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def names(self, ids: Sequence[int]) -> list[str]:
        """Token ids as the vocabulary writes them."""
        return [self._backend.id_to_token(index) or "" for index in ids]

    def special_ids(self, names: Sequence[str]) -> tuple[int, ...]:
        """Ids of those ``names`` that are special tokens."""
        return tuple(self._special_ids[name] for name in names if name in self._special_ids)

    def detokenizer(
        self, *, skip_special_tokens: bool = True, behind: Sequence[int] = ()
    ) -> Detokenizer:
        """A decoder for one new sequence; ``behind`` is a text that it goes on from."""
        return Detokenizer(
            self._backend,
            skip_special_tokens=skip_special_tokens,
            behind=behind[-_LOOK_BACK:],
        )

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation; raises InvalidRequest where the template refuses it."""
        if self._render is None:
            raise InvalidRequest(
                "This model has no chat template; use /v1/completions.", param="messages"
            )
        messages = [{**each, "content": self.as_text(each["content"])} for each in messages]
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


def _cut(found: re.Match[str]) -> str:
    """A special token's name in two parts, neither of which is one."""
    name = found[0]
    return f"{name[:1]}{_CUT}{name[1:]}"
