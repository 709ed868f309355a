"""Request bodies of the OpenAI routes, with vLLM's extra sampling fields and early exit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from offramp.models.sampling_params import ExitCriterion, ExitMode
from offramp.server.api.answer_forms import Choices, ResponseFormat, StructuredOutputs
from offramp.server.api.fields import (
    INT64_MAX,
    INT64_MIN,
    MAX_MESSAGES,
    MAX_STOP_LENGTH,
    NOT_FOR_CHAT,
    NOT_FOR_COMPLETIONS,
    UNSUPPORTED,
    Content,
    Count,
    LogitBias,
    Prompts,
    RequestModel,
    StopStrings,
    Text,
    TokenId,
    refuse_unsupported,
)
from offramp.server.api.tool_bodies import MAX_TOOLS, ToolCall, ToolChoice, Tools
from offramp.server.errors import InvalidRequest

logger = logging.getLogger("offramp.api")

MAX_CHOICES: Final = 128
MAX_STOP_TOKENS: Final = 128
# What logits are divided by must not take them out of fp32: a step with NaN fails all its requests.
MIN_REPETITION_PENALTY: Final = 0.01
# Best tokens beside a log-probability; OpenAI's bound for chats.
MAX_LOGPROBS: Final = 20
MAX_TEMPLATE_OPTIONS: Final = 32
MAX_ALLOWED_TOKENS: Final = 16_384
MAX_BAD_WORDS: Final = 64
MAX_PRIORITY: Final = 2**31
MAX_SALT: Final = 256
# A day; longer wishes are mistakes of unit.
MAX_DEADLINE_MS: Final = 86_400_000
DEFAULT_COMPLETION_TOKENS: Final = 16
# Part of OpenAI's API, without effect here and harmless to leave out.
_NO_EFFECT: Final = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "verbosity",
        "moderation",
        *("function_call", "top_logprobs", "tool_choice", "continue_final_message"),
        *("modalities", "suffix", "echo", "best_of"),
    }
)
# Warned about once each; bounded, because clients choose the names.
_warned: set[str] = set()
_MAX_WARNED: Final = 100
_MAX_NAME: Final = 64


class StreamOptions(RequestModel):
    """When usage is sent in a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class EarlyExit(RequestModel):
    """Early-exit wishes of a request (``early_exit``)."""

    model_config = ConfigDict(extra="forbid")

    mode: Annotated[ExitMode, Field(strict=False)] | None = None
    criterion: Annotated[ExitCriterion, Field(strict=False)] | None = None
    quality: float | None = Field(default=None, ge=0.5, le=1)
    threshold: float | None = Field(default=None, ge=0, le=1)
    min_layer: int | None = Field(default=None, ge=0, le=INT64_MAX)
    when: Literal["pays", "always"] | None = None
    kv_fill: Literal["auto", "project", "copy", "recompute"] | None = None
    prefill: bool | None = None
    deadline_ms: float | None = Field(default=None, gt=0, le=MAX_DEADLINE_MS)

    @property
    def wishes_exits(self) -> bool:
        """Whether anything is said about how tokens should leave early."""
        return any(
            getattr(self, name) is not None
            for name in type(self).model_fields
            if name not in ("mode", "prefill")
        ) or bool(self.prefill)


def mode_alone(value: Any) -> Any:
    """A mode alone stands for wishes that name it."""
    return {"mode": value} if isinstance(value, str) else value


class SamplingBody(RequestModel):
    """Fields that all routes which generate have under the same names; ranges are OpenAI's."""

    model_config = ConfigDict(extra="allow")

    model: Text | None = None
    stream: bool = False
    top_p: float = Field(default=1.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=INT64_MIN, le=INT64_MAX)
    logit_bias: LogitBias = Field(default_factory=dict)
    top_k: int = Field(default=0, ge=-1, le=INT64_MAX)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=MIN_REPETITION_PENALTY, le=100)
    min_tokens: int = Field(default=0, ge=0, le=INT64_MAX)
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_STOP_TOKENS)
    allowed_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_ALLOWED_TOKENS)
    bad_words: list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]] = Field(
        default_factory=list, max_length=MAX_BAD_WORDS
    )
    priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    timeout: float | None = Field(default=None, gt=0, le=MAX_DEADLINE_MS / 1000)
    cache_salt: Text = Field(default="", max_length=MAX_SALT)
    early_exit: Annotated[EarlyExit, BeforeValidator(mode_alone)] = Field(default_factory=EarlyExit)


class GenerationBody(SamplingBody):
    """Fields the chat and the completions route share."""

    # Length of an answer when the client names none; None is what the context leaves.
    default_tokens: ClassVar[int | None] = None
    # Known parameters that mean nothing on this route.
    not_used: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    max_tokens: Count | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: StopStrings = Field(default_factory=list)
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False
    return_exit_layers: bool = False
    return_token_sources: bool = False
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    json_schema: dict[str, Any] | None = None
    grammar: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_but_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            present = {name: value for name, value in data.items() if value is not None}
            # An echo of n is the one best_of that changes nothing.
            if "best_of" in present and present["best_of"] == present.get("n", 1):
                del present["best_of"]
            refuse_unsupported(present, cls.not_used)
        return data

    @model_validator(mode="after")
    def _fields_agree(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "'stream_options' is only allowed with 'stream': true.", param="stream_options"
            )
        for name in self.model_extra or ():
            warn_once(name)
        return self

    @property
    def asked_tokens(self) -> int | None:
        """Tokens the client asked for at most, None if it left that open."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Best tokens wanted beside each token's log-probability; None if that is not wanted."""
        return None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream carries usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class Message(RequestModel):
    """One turn of a conversation; parts of text are joined by line breaks."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Content | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)
    tool_call_id: Text | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_functions(cls, data: Any) -> Any:
        if isinstance(data, dict) and (data.get("role") == "function" or data.get("function_call")):
            raise PydanticCustomError(UNSUPPORTED, "functions are not supported, tools are")
        return data

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "content is required")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only the assistant calls tools")
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("missing", "tool_call_id is required")
        return self

    def for_template(self) -> dict[str, Any]:
        """What chat templates understand."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.content or ""}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        thoughts = self.reasoning_content or self.reasoning
        if thoughts and self.role == "assistant":
            message["reasoning_content"] = thoughts
        return message


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatBody(GenerationBody):
    """Body of POST /v1/chat/completions."""

    not_used: ClassVar[Mapping[str, tuple[object, ...]]] = NOT_FOR_CHAT

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Text | None = None
    chat_template_kwargs: dict[Text, Any] = Field(
        default_factory=dict, max_length=MAX_TEMPLATE_OPTIONS
    )
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _sensible(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                "'top_logprobs' is only allowed with 'logprobs': true.", param="top_logprobs"
            )
        if self.continue_final_message:
            if "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt:
                raise InvalidRequest(
                    "'continue_final_message' and 'add_generation_prompt' exclude each other.",
                    param="continue_final_message",
                )
            if self.messages[-1].role != "assistant" or not self.messages[-1].content:
                raise InvalidRequest(
                    "'continue_final_message' needs a text of the assistant at the end.",
                    param="continue_final_message",
                )
        return self

    @property
    def asked_tokens(self) -> int | None:
        """``max_completion_tokens``, or the deprecated ``max_tokens``."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """See GenerationBody."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """Body of POST /v1/completions; prompts are texts or lists of token ids."""

    not_used: ClassVar[Mapping[str, tuple[object, ...]]] = NOT_FOR_COMPLETIONS
    default_tokens: ClassVar[int | None] = DEFAULT_COMPLETION_TOKENS

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=INT64_MAX)] | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _possible(self) -> CompletionBody:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise InvalidRequest(
                f"prompts times 'n' must be at most {MAX_CHOICES}.", param="prompt"
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("'max_tokens': 0 is only allowed with 'echo'.", param="max_tokens")
        return self

    @property
    def asked_tokens(self) -> int | None:
        """One token where none is wanted: it is made with the prompt, and left out."""
        return None if self.max_tokens is None else max(self.max_tokens, 1)

    @property
    def wanted_logprobs(self) -> int | None:
        """See GenerationBody."""
        return self.logprobs


def warn_once(name: str) -> None:
    """Log that a request's field has no effect here."""
    shown = name[:_MAX_NAME]
    if shown in _NO_EFFECT or shown in _warned or len(_warned) >= _MAX_WARNED:
        return
    _warned.add(shown)
    logger.warning("ignoring unknown request field %r (said once per field)", shown)
