"""Prompts to token ids."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from offramp.server.errors import ContextLengthExceeded, InvalidRequest, OfframpError, ServerError
from offramp.server.text.detokenizer import Detokenizer
from offramp.server.text.rendering import SHARED, TemplatePastLimits
from offramp.server.text.tokenizer_info import tokenizer_info

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

logger = logging.getLogger("offramp.tokenizer")

# Tokens of a prompt that decide how a decoder goes on from it.
_LOOK_BACK = 8
# Where a special token's name in a message is cut in two, so that it stays text.
_CUT = "\ufdd0\ufdd1"
# Characters from which on the tokenizer's threads are quicker than they are to wake.
_WORTH_THREADS = 50_000

# Messages, and the template's options by name, to text.
Render = Callable[..., str]


class Tokenizer:
    """A fast tokenizer with its chat template.

    ``render`` turns messages into the prompt text, up to where the assistant begins to speak, as
    ``template`` (Jinja) says. The names of special tokens in messages are text, unless
    ``special_in_messages``: a client cannot end its turn, or speak as somebody else. Texts end with
    one of ``end_tokens``, whatever the model's own configuration names.

    Methods that encode take milliseconds and more on long prompts: call them on a worker thread.
    They share nothing that changes, so several threads may call them at once.
    """

    def __init__(
        self,
        backend: Backend,
        render: Render | None,
        *,
        special_in_messages: bool = False,
        template: str = "",
        end_tokens: Sequence[int] = (),
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.template = template
        self.end_tokens = tuple(end_tokens)
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

        Raises OfframpError when the folder has no fast tokenizer, or a broken one.
        """
        # transformers takes seconds to import, which only a starting server should pay.
        transformers: Any = importlib.import_module("transformers")
        read = transformers.AutoTokenizer.from_pretrained
        try:
            loaded = read(str(folder), local_files_only=True, trust_remote_code=False)
        except BaseException as error:
            _let_through(error)
            raise OfframpError(f"{folder} has no tokenizer that can be read: {error}") from error
        if not loaded.is_fast:
            raise OfframpError(f"{folder} has no fast tokenizer (tokenizer.json).")

        def render(messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
            # As transformers' apply_chat_template does, in another process.
            chosen = loaded.get_chat_template(tools=options.get("tools"))
            given = [{k: v for k, v in each.items() if v is not None} for each in messages]
            options = {**loaded.special_tokens_map, "add_generation_prompt": True, **options}
            return SHARED.render(chosen, given, options)

        backend = loaded.backend_tokenizer
        # A tokenizer.json may say that texts are to be cut or filled up; prompts never are.
        backend.no_truncation()
        backend.no_padding()
        template = loaded.chat_template
        # A folder may hold several by name; the one that is used for tools is the fuller one.
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default")
        if template:
            SHARED.start()
        return cls(
            backend,
            render if template else None,
            special_in_messages=special_in_messages,
            template=template or "",
            end_tokens=() if loaded.eos_token_id is None else (loaded.eos_token_id,),
            info=tokenizer_info(loaded, template or ""),
        )

    def encode(
        self, texts: Sequence[str], max_tokens: int, *, special: bool = True
    ) -> list[tuple[int, ...]]:
        """Ids of each prompt, with the special tokens of the model's own format if ``special``.

        ``max_tokens`` is the context; a text too long for it by its length alone raises
        ContextLengthExceeded before any work is done.
        """
        for text in texts:
            self._refuse_hopeless(text, max_tokens, "prompt")
        encodings = self._encoded(list(texts), special=special)
        return [tuple(encoding.ids) for encoding in encodings]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Ids of a conversation; raises InvalidRequest where the template refuses it.

        ``options`` are variables of the template, and transformers' own for rendering it.
        """
        self.refuse_hopeless(messages, max_tokens, "messages")
        return self.encode_rendered([self.render_chat(messages, options)])[0]

    def encode_rendered(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of texts, or parts of texts, in which the template wrote the special tokens."""
        parts = [text.split(_CUT) for text in texts]
        flat = [part for own in parts for part in own]
        if sum(map(len, texts)) < _WORTH_THREADS:
            encodings = [each for part in flat for each in self._encoded([part], special=False)]
        else:
            encodings = self._encoded(flat, special=False)
        ids = iter(encodings)
        return [tuple(i for _ in own for i in next(ids).ids) for own in parts]

    def _encoded(self, texts: list[str], *, special: bool) -> list[Encoding]:
        """Encodings; raises InvalidRequest where the tokenizer cannot make one."""
        try:
            # Other than `encode`, this lets other Python threads run meanwhile.
            return self._backend.encode_batch(texts, add_special_tokens=special)
        except BaseException as error:
            _let_through(error)
            reason = str(error)[:200]
            raise InvalidRequest(
                f"The model's tokenizer cannot encode this text: {reason}", code="not_encodable"
            ) from error

    def as_text(self, text: str) -> str:
        """A client's text for `encode_rendered`, in which names of special tokens stay text."""
        return text if self._special is None else self._special.sub(_cut, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    @property
    def definition(self) -> str:
        """The tokenizer as tokenizer.json has it."""
        text: str = self._backend.to_str()
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

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
    ) -> str:
        """The text of a conversation; raises InvalidRequest where the template refuses it."""
        if self._render is None:
            raise InvalidRequest(
                "This model has no chat template; use /v1/completions.", param="messages"
            )
        try:
            return self._render(self._all_as_text(messages), **self._all_as_text(options or {}))
        except TemplatePastLimits as error:
            logger.warning("the chat template %s", error)
            raise InvalidRequest(
                f"The model's chat template {error} for these messages.",
                param="messages",
                code="template_past_limits",
            ) from error
        except ServerError:
            raise
        except Exception as error:
            # Templates are programs of the model's author: whatever one raises about these
            # messages is an answer to the client, never a fault of the server.
            logger.info("chat template refused a conversation: %s", type(error).__name__)
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {str(error)[:200]}",
                param="messages",
            ) from error

    def _all_as_text(self, value: Any) -> Any:
        """``value``, as it comes from JSON, with its texts made into `as_text`."""
        match value:
            case str():
                return self.as_text(value)
            case Mapping():
                return {key: self._all_as_text(each) for key, each in value.items()}
            case list() | tuple():
                return [self._all_as_text(each) for each in value]
        return value

    def refuse_hopeless(
        self, messages: Sequence[Mapping[str, Any]], max_tokens: int, param: str
    ) -> None:
        """Raise ContextLengthExceeded if the messages' length alone rules the context out."""
        texts = (each.get("content") or "" for each in messages)
        self._refuse_hopeless("".join(texts), max_tokens, param)

    def _refuse_hopeless(self, text: str, max_tokens: int, param: str) -> None:
        if len(text) > max_tokens * self._longest_token:
            raise ContextLengthExceeded(
                f"This model's context is {max_tokens} tokens; a prompt of {len(text)} characters "
                "does not fit.",
                param=param,
            )


def _let_through(error: BaseException) -> None:
    """Raise it again unless it says what a tokenizer could not do; its panics are no Exception."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _cut(found: re.Match[str]) -> str:
    """A special token's name in two parts, neither of which is one."""
    name = found[0]
    return f"{name[:1]}{_CUT}{name[1:]}"
