"""Answers in a given form: grammars compiled, and followed token by token (llguidance).

A `Grammar` is compiled where requests are read, on a worker thread; its states belong to one
sequence each and are moved by the engine. Both hold llguidance's matchers, which know the
tokenizer, so a mask over the vocabulary says which tokens keep to the form.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import llguidance
import numpy as np

from offramp.server.text.tools import (
    HERMES_BEGIN,
    HERMES_END,
    MISTRAL_BEGIN,
    ToolFormat,
    ToolUse,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_COMPILED: Final = 256
# A small model that may call again seldom stops by itself.
_MOST_CALLS: Final = 8
# One way to write each object: no room for a model to lose itself in white space. Of oneOf any
# branch is taken: that no other one fits as well is nothing that a grammar can say.
_JSON_STYLE: Final = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}
# Formats that are held to. Others are notes for readers, as JSON Schema (2020-12, 7.2.3) has it.
_FORMATS: Final = frozenset(
    {
        *("date-time", "time", "date", "duration", "email", "hostname"),
        *("ipv4", "ipv6", "uuid", "uri"),
    }
)
# Parts of a schema that are values, not schemas.
_VALUES: Final = frozenset({"const", "enum", "default", "examples"})
_TEXT: Final = r"/(.|\n)*/"
_NEW_LINE: Final = r'"\n"'
_COMMA: Final = '", " object'
_SEMICOLON: Final = '"; " object'


class GrammarError(ValueError):
    """A grammar that cannot be compiled; the message says to its author why."""


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer is to look like: ``kind`` is json_schema, regex, choice or grammar.

    ``value`` is a schema (an object, or its text), an expression, the choices, or a grammar in
    Lark's or GBNF's syntax.
    """

    kind: str
    value: Any


class GrammarState:
    """Where one sequence is in its grammar; drafts are looked at without being taken."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int, ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._words = words
        self._ends = ends
        self._masks: dict[tuple[int, ...], NDArray[np.int32]] = {}

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, or cannot be continued."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further; None if it can."""
        found = self._matcher.get_error()
        return _reason(found) if found else None

    def accept(self, token: int) -> None:
        """The answer goes on with ``token``."""
        self._masks.clear()
        self._matcher.consume_token(token)

    def allowed(self, drafts: Sequence[int]) -> int:
        """How many of ``drafts`` keep to the grammar, up to one that would end the answer."""
        end = next((i for i, token in enumerate(drafts) if token in self._ends), len(drafts))
        return int(self._matcher.validate_tokens(list(drafts[:end])))

    def forced(self) -> list[int]:
        """Tokens that must come next, as the tokenizer writes the text that must."""
        return [] if self.finished else list(self._matcher.compute_ff_tokens())

    def mask(self, drafts: Sequence[int] = ()) -> NDArray[np.int32]:
        """Bits [vocabulary, rounded up] of the tokens that may follow ``drafts``."""
        key = tuple(drafts)
        found = self._masks.get(key)
        if found is None:
            found = self._masks[key] = self._computed(list(key))
        return found

    def _computed(self, drafts: list[int]) -> NDArray[np.int32]:
        mask = np.zeros(self._words, dtype=np.int32)
        taken = self._matcher.try_consume_tokens(drafts) if drafts else 0
        # Behind a draft that keeps to no grammar nothing is verified, so any mask will do.
        if taken == len(drafts):
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if taken:
            self._matcher.rollback(taken)
        if not mask.any():
            mask[:] = -1
        return mask


class Grammar:
    """A compiled grammar, shared by the sequences that follow it.

    ``source`` and ``vocabulary`` are what it was compiled of.
    """

    def __init__(
        self, matcher: llguidance.LLMatcher, source: str, vocabulary: GrammarVocabulary
    ) -> None:
        self.source = source
        self.vocabulary = vocabulary
        self._matcher = matcher
        self._words = -(-vocabulary.size // 32)
        self._ends = frozenset(vocabulary.ends)

    def start(self) -> GrammarState:
        """The state of a new answer."""
        return GrammarState(self._matcher.deep_copy(), self._words, self._ends)


class Definition(Protocol):
    """A tokenizer, as far as grammars need it."""

    @property
    def definition(self) -> str:
        """All of it as JSON (tokenizer.json)."""
        ...


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """A tokenizer's ``definition``, the tokens the model tells apart, and those that end texts."""

    definition: str
    size: int
    ends: tuple[int, ...]


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps those that were used last.

    Methods may be called on several threads; they take milliseconds and more, the first of all
    about a quarter of a second.
    """

    def __init__(self, tokenizer: Definition, vocab_size: int, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = tuple(ends)
        self._known: OrderedDict[bytes, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._native: tuple[llguidance.LLTokenizer, GrammarVocabulary] | None = None

    def compile(self, source: str) -> Grammar:
        """Compile llguidance's own form of a grammar; raises GrammarError."""
        key = hashlib.sha256(source.encode()).digest()
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        tokenizer, vocabulary = self._loaded()
        matcher = llguidance.LLMatcher(tokenizer, source, log_level=0)
        if matcher.is_error():
            raise GrammarError(_reason(matcher.get_error()))
        grammar = Grammar(matcher, source, vocabulary)
        with self._lock:
            self._known[key] = grammar
            while len(self._known) > _MOST_COMPILED:
                self._known.popitem(last=False)
        return grammar

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        return bytes(self.native().decode_bytes([token]))

    def native(self) -> llguidance.LLTokenizer:
        """The tokenizer for llguidance; raises GrammarError if it cannot be had."""
        return self._loaded()[0]

    def _loaded(self) -> tuple[llguidance.LLTokenizer, GrammarVocabulary]:
        with self._lock:
            if self._native is None:
                ends = list(self._ends) or None
                try:
                    definition = self._tokenizer.definition
                    tokenizer = llguidance.LLTokenizer(
                        definition, n_vocab=self._vocab_size, eos_token=ends
                    )
                except Exception as error:
                    # The binding raises whatever its parser of tokenizers says.
                    message = f"this model's tokenizer is not supported: {error}"
                    raise GrammarError(message) from error
                vocabulary = GrammarVocabulary(definition, self._vocab_size, self._ends)
                self._native = tokenizer, vocabulary
            return self._native


def source_of(form: Form, *, thinking: bool | None = None) -> str:
    """An answer's form as llguidance takes it; raises GrammarError.

    Before the answer there may be thoughts, which the prompt has begun already if ``thinking``;
    None: there are none.
    """
    parts: list[dict[str, Any]] = [{"name": "answer", **_answer(form)}]
    if thinking is not None:
        name, rule = _thoughts(thinking=thinking)
        parts.insert(0, {"lark_grammar": f"start: {name} @answer\n{rule}\n"})
    return json.dumps({"grammars": parts})


def source_of_calls(
    use: ToolUse,
    form: ToolFormat,
    begin_token: int | None,
    *,
    thinking: bool | None = None,
) -> str | None:
    """A grammar of answers that call tools as ``use`` says; None where there is nothing to hold.

    ``begin_token`` is the id of the token that begins calls, where it is a special one. See
    `source_of` for ``thinking``.
    """
    begin = {ToolFormat.HERMES: HERMES_BEGIN, ToolFormat.MISTRAL: MISTRAL_BEGIN}.get(form, "")
    marker = json.dumps(begin) if begin_token is None else f"<[{begin_token}]>"
    match form:
        case ToolFormat.HERMES:
            end = json.dumps(f"\n{HERMES_END}")
            behind = f"{_NEW_LINE} object {end}"
            calls = f"{marker} {behind}{_more(use, f'{_NEW_LINE} {marker} {behind}')}"
        case ToolFormat.MISTRAL:
            behind = f'"[" object{_more(use, _COMMA)} "]"'
            calls = f"{marker} {behind}"
        case ToolFormat.LLAMA3_JSON:
            calls = f"object{_more(use, _SEMICOLON)}"
            if not use.required:
                # Nothing marks where a call begins, so an answer cannot be held to it.
                return None
    objects = [_call(tool.name, tool.parameters, form) for tool in use.tools]
    name, rule = ("", "") if thinking is None else _thoughts(thinking=thinking)
    if use.required:
        rules = [f"start: {name} calls", f"calls: {calls}"]
    else:
        # A special token ends text by itself; other markers end it where they first appear.
        lazy = "[lazy]" if begin_token is None else ""
        rules = [
            f"start: {name} tool{'*' if use.parallel else '?'} tail",
            "tail: TEXT",
            f"TEXT: {_TEXT}",
            f"head{lazy}: TEXT {marker}",
            f"tool: head {behind}",
        ]
    rules.append(f"object: %json {json.dumps({'anyOf': objects, 'x-guidance': _JSON_STYLE})}")
    return "\n".join([*rules, rule, ""])


def _thoughts(*, thinking: bool) -> tuple[str, str]:
    """The rule of thoughts, and how it is called in another."""
    begin = "" if thinking else "<think>"
    rule = rf"thinking[lazy]: /{begin}(.|\n)*<\/think>/"
    return "thoughts" if thinking else "thoughts?", f"thoughts: thinking /\\s{{0,4}}/\n{rule}"


def _more(use: ToolUse, call: str) -> str:
    """The rule of further calls, each a ``call``."""
    return f" ({call}){{0,{_MOST_CALLS - 1}}}" if use.parallel else ""


def _call(name: str, parameters: Mapping[str, Any], form: ToolFormat) -> dict[str, Any]:
    key = "parameters" if form is ToolFormat.LLAMA3_JSON else "arguments"
    # Arguments that no schema speaks of are none that a function knows.
    parameters = {"additionalProperties": False, **_without_notes(parameters)}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, key: parameters},
        "required": ["name", key],
        "additionalProperties": False,
    }


def _answer(form: Form) -> dict[str, Any]:
    match form.kind:
        case "json_schema":
            schema = form.value
            try:
                schema = json.loads(schema) if isinstance(schema, str) else schema
            except ValueError as error:
                raise GrammarError(f"the schema is not valid JSON ({error})") from error
            if not isinstance(schema, Mapping):
                raise GrammarError("a schema is a JSON object")
            return {"json_schema": {"x-guidance": _JSON_STYLE, **_without_notes(schema)}}
        case "regex":
            return {"lark_grammar": f"start: {_regex(form.value)}"}
        case "choice":
            choices = " | ".join(json.dumps(choice) for choice in form.value)
            return {"lark_grammar": f"start: {choices}"}
    try:
        lark = llguidance.gbnf_to_lark.any_to_lark(form.value)
    except Exception as error:
        # The converter has an error class of its own for some faults, and Python's for others.
        raise GrammarError(_reason(str(error))) from error
    return {"lark_grammar": lark}


def _without_notes(schema: Any) -> Any:
    """A schema without formats that say nothing here."""
    if isinstance(schema, Mapping):
        return {
            key: value if key in _VALUES else _without_notes(value)
            for key, value in schema.items()
            if key != "format" or not isinstance(value, str) or value in _FORMATS
        }
    return [_without_notes(each) for each in schema] if isinstance(schema, list) else schema


def _regex(expression: str) -> str:
    made = json.loads(llguidance.LLMatcher.grammar_from_regex(expression))
    rule: str = made["grammars"][0]["lark_grammar"]
    return rule.removeprefix("start:").strip()


def _reason(text: str) -> str:
    """What llguidance says, without the source it repeats."""
    lines = [line.strip() for line in text.splitlines()]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join([*lines[:1], *named[:1]])[:300]
