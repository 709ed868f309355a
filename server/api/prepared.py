"""A checked body to what is generated: prompts as token ids, the answer's form, and its parser."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from offramp.server.api.answer_forms import wished_form
from offramp.server.api.tool_bodies import tool_use
from offramp.server.errors import InvalidRequest
from offramp.server.text.answer_parts import THINK_BEGIN, THINK_END, AnswerParser
from offramp.server.text.grammars import (
    Form,
    Grammar,
    GrammarError,
    source_of,
    source_of_calls,
)
from offramp.server.text.rendering import on_chat_worker
from offramp.server.text.tools import (
    LLAMA3_BEGIN,
    MISTRAL_BEGIN,
    ToolFormat,
    ToolUse,
    knows_tools,
    tool_format,
    with_instructions,
)

if TYPE_CHECKING:
    from offramp.server.api.context import Context
    from offramp.server.api.schemas import ChatBody, CompletionBody, GenerationBody
    from offramp.server.text.tokenizer import Tokenizer

Prompt = tuple[int, ...]

# Bound of bad words in tokens, which their length in characters keeps to anyway.
_LONGEST_WORD: Final = 10_000

# What transformers takes for itself when it renders a template; no request may set these.
_RESERVED: Final = frozenset(
    {
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("tokenizer_kwargs", "chat_template", "conversation", "messages", "tools", "documents"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
        *("conversations", "sanitize_control_tokens"),
    }
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a request is to the engine.

    ``bad_words`` are token ids in a row that must not come. ``param`` is the field that the prompts
    came in. ``texts`` are the prompts where an answer
    repeats them. Where answers may hold thoughts or calls, ``tools`` is the form of calls and
    ``reasoning`` says whether there may be thoughts, ``thinking`` that the prompt began them.
    """

    prompts: tuple[Prompt, ...]
    param: str
    grammar: Grammar | None = None
    bad_words: tuple[Prompt, ...] = ()
    texts: tuple[str, ...] = ()
    tools: ToolFormat | None = None
    reasoning: bool = False
    thinking: bool = False

    def parser(self) -> AnswerParser | None:
        """A parser of one answer; None where answers are plain text."""
        if self.tools is None and not self.reasoning:
            return None
        return AnswerParser(self.tools, reasoning=self.reasoning, thinking=self.thinking)

    @property
    def shows_special_tokens(self) -> bool:
        """Whether calls are marked by tokens that texts leave out."""
        return self.tools in {ToolFormat.MISTRAL, ToolFormat.LLAMA3_JSON}


async def prepare_chat(context: Context, body: ChatBody) -> Prepared:
    """A conversation, encoded on a worker thread; raises what the client is to be told."""
    context.check_model(body.model)
    use = tool_use(body.tools, body.tool_choice, parallel=body.parallel_tool_calls)
    form, param = wished_form(body)
    if form is not None and use.required:
        raise InvalidRequest(f"'{param}' cannot be kept where tools must be called.", param=param)
    return await on_chat_worker(_prepare_chat, context, body, use, form, param)


def _prepare_chat(
    context: Context, body: ChatBody, use: ToolUse, form: Form | None, param: str
) -> Prepared:
    tokenizer = context.loaded_tokenizer()
    _ready_names(context, body)
    prompt, rendered = render(context, body, use)
    reasoning = _reasons(context, tokenizer.template)
    thinking = reasoning and rendered.rstrip().endswith(THINK_BEGIN)
    tools = _format(context, tokenizer.template) if use.tools else None
    # Thoughts that the prompt closed do not come again.
    closed = not reasoning or rendered.rstrip().endswith(THINK_END)
    thoughts = None if closed else thinking
    grammar = None
    if form is not None:
        grammar = compiled(context, lambda: source_of(form, thinking=thoughts), param)
    elif tools is not None:
        begin = {ToolFormat.MISTRAL: MISTRAL_BEGIN}.get(tools, LLAMA3_BEGIN)
        ids = tokenizer.special_ids([begin])
        source = source_of_calls(use, tools, ids[0] if ids else None, thinking=thoughts)
        grammar = compiled(context, lambda: source, "tools")
    return Prepared(
        (prompt,),
        "messages",
        grammar,
        _bad_words(tokenizer, body),
        tools=tools,
        reasoning=reasoning,
        thinking=thinking,
    )


def render(context: Context, body: ChatBody, use: ToolUse) -> tuple[Prompt, str]:
    """Token ids and text of a conversation up to where the answer begins."""
    tokenizer = context.loaded_tokenizer()
    messages = [message.for_template() for message in body.messages]
    options = _template_options(body)
    if knows_tools(tokenizer.template):
        if use.tools:
            options["tools"] = [tool.for_template() for tool in use.tools]
    else:
        messages = with_instructions(messages, use.tools)
    most = context.driver.info.max_model_len
    tokenizer.refuse_hopeless(messages, most, "messages")
    rendered = tokenizer.render_chat(messages, options)
    # A template may write more than it was given.
    tokenizer.refuse_hopeless([{"content": rendered}], most, "messages")
    return tokenizer.encode_rendered([rendered])[0], rendered


async def prepare_completion(context: Context, body: CompletionBody) -> Prepared:
    """Prompts to continue, encoded on a worker thread; raises what the client is to be told."""
    context.check_model(body.model)
    form, param = wished_form(body)
    return await asyncio.to_thread(_prepare_completion, context, body, form, param)


def _prepare_completion(
    context: Context, body: CompletionBody, form: Form | None, param: str
) -> Prepared:
    tokenizer, most = context.loaded_tokenizer(), context.driver.info.max_model_len
    _ready_names(context, body)
    prompts = _ids(tokenizer, body, most)
    grammar = None if form is None else compiled(context, lambda: source_of(form), param)
    texts: tuple[str, ...] = ()
    if body.echo:
        texts = tuple(
            given if isinstance(given, str) else tokenizer.decode(given) for given in body.prompt
        )
    return Prepared(tuple(prompts), "prompt", grammar, _bad_words(tokenizer, body), texts)


def _ids(tokenizer: Tokenizer, body: CompletionBody, most: int) -> Sequence[Prompt]:
    if isinstance(body.prompt[0], list):
        return [tuple(ids) for ids in body.prompt]
    return tokenizer.encode(body.prompt, most, special=body.add_special_tokens)


def _bad_words(tokenizer: Tokenizer, body: GenerationBody) -> tuple[Prompt, ...]:
    """Words that must not come as token ids: where a text begins, and behind a space."""
    texts = [text for word in body.bad_words for text in (word, f" {word.lstrip()}")]
    if not texts:
        return ()
    found = tokenizer.encode(texts, _LONGEST_WORD, special=False)
    return tuple(dict.fromkeys(ids for ids in found if ids))


def _ready_names(context: Context, body: GenerationBody) -> None:
    """Make ready what log-probabilities name tokens by: it takes too long for the event loop."""
    if body.wanted_logprobs is not None or body.prompt_logprobs is not None:
        # Without it tokens are named by what the tokenizer makes of each alone.
        with contextlib.suppress(GrammarError):
            context.grammars.native()


def compiled(context: Context, source: Callable[[], str | None], param: str) -> Grammar | None:
    """The grammar, if there is a source; raises InvalidRequest where it cannot be compiled."""
    try:
        text = source()
        return None if text is None else context.grammars.compile(text)
    except (GrammarError, RecursionError) as error:
        reason = error if isinstance(error, GrammarError) else "it is nested too deeply"
        raise InvalidRequest(
            f"{param} cannot be compiled: {reason}.", param=param, code="unsupported_grammar"
        ) from error


def _template_options(body: ChatBody) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        options["reasoning_effort"] = body.reasoning_effort
        options["enable_thinking"] = body.reasoning_effort != "none"
    reserved = _RESERVED & body.chat_template_kwargs.keys()
    if reserved:
        name = min(reserved)
        raise InvalidRequest(
            f"'{name}' is no variable of the template.", param=f"chat_template_kwargs.{name}"
        )
    options |= body.chat_template_kwargs
    if body.continue_final_message:
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    elif not body.add_generation_prompt:
        options["add_generation_prompt"] = False
    return options


def _format(context: Context, template: str) -> ToolFormat:
    wished = context.config.tool_call_parser
    return tool_format(template) if wished == "auto" else ToolFormat(wished)


def _reasons(context: Context, template: str) -> bool:
    wished = context.config.reasoning_parser
    return THINK_END in template if wished == "auto" else wished == "think"
