"""Request bodies of the OpenAI routes, with vLLM's extra sampling fields and early exit."""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from offramp.models.sampling_params import ExitCriterion, ExitMode
from offramp.server.api.fields import (
    INT64_MAX,
    INT64_MIN,
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
from offramp.server.errors import InvalidRequest

logger = logging.getLogger("offramp.api")

MAX_CHOICES: Final = 128
MAX_STOP_TOKENS: Final = 128
# What logits are divided by must not take them out of fp32: a step with NaN fails all its requests.
MIN_REPETITION_PENALTY: Final = 0.01
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
        "parallel_tool_calls",
        "reasoning_effort",
        "verbosity",
        "moderation",
        *("logprobs", "top_logprobs", "tool_choice", "function_call", "response_format"),
        *("modalities", "suffix", "echo", "best_of", "bad_words", "priority"),
        "continue_final_message",
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


class GenerationBody(RequestModel):
    """Fields the chat and the completions route share; ranges are OpenAI's."""

    model_config = ConfigDict(extra="allow")
    # Length of an answer when the client names none; None is what the context leaves.
    default_tokens: ClassVar[int | None] = None

    model: Text | None = None
    max_tokens: Count | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: StopStrings = Field(default_factory=list)
    seed: int | None = Field(default=None, ge=INT64_MIN, le=INT64_MAX)
    logit_bias: LogitBias = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int = Field(default=0, ge=-1, le=INT64_MAX)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=MIN_REPETITION_PENALTY, le=100)
    min_tokens: int = Field(default=0, ge=0, le=INT64_MAX)
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_STOP_TOKENS)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False
    return_exit_layers: bool = False
    early_exit: Annotated[EarlyExit, BeforeValidator(mode_alone)] = Field(default_factory=EarlyExit)

    @model_validator(mode="before")
    @classmethod
    def _known_but_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            present = {name: value for name, value in data.items() if value is not None}
            # An echo of n is the one best_of that changes nothing.
            if "best_of" in present and present["best_of"] == present.get("n", 1):
                del present["best_of"]
            refuse_unsupported(present)
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
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream carries usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class Message(RequestModel):
    """One turn of a conversation; parts of text are joined by line breaks."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, data: Any) -> Any:
        if isinstance(data, dict):
            uses_tools = data.get("role") in ("tool", "function")
            if uses_tools or data.get("tool_calls") or data.get("function_call"):
                raise PydanticCustomError(UNSUPPORTED, "tool calls are not supported")
        return data

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "content is required")
        return self

    def for_template(self) -> dict[str, str]:
        """What chat templates understand."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content or ""}


class ChatBody(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Count | None = None

    @property
    def asked_tokens(self) -> int | None:
        """``max_completion_tokens``, or the deprecated ``max_tokens``."""
        return self.max_completion_tokens or self.max_tokens


class CompletionBody(GenerationBody):
    """Body of POST /v1/completions; prompts are texts or lists of token ids."""

    default_tokens: ClassVar[int | None] = DEFAULT_COMPLETION_TOKENS

    prompt: Prompts

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionBody:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise InvalidRequest(
                f"prompts times 'n' must be at most {MAX_CHOICES}.", param="prompt"
            )
        return self


def warn_once(name: str) -> None:
    """Log that a request's field has no effect here."""
    shown = name[:_MAX_NAME]
    if shown in _NO_EFFECT or shown in _warned or len(_warned) >= _MAX_WARNED:
        return
    _warned.add(shown)
    logger.warning("ignoring unknown request field %r (said once per field)", shown)
