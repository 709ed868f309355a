"""Every option of the server, each declared once.

Flags, environment names, help text and docs/options.md are derived from these fields (options.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from offramp.models.config import Weights
from offramp.models.sampling_params import DEFAULT_CRITERION, ExitCriterion
from offramp.models.step import Pooling
from offramp.server.keys import ApiKeyError, check_key

GIB = 1024**3
MIB = 1024**2


def _option(
    section: str, default: object, description: str, *, word: str | None = None, **bounds: Any
) -> Any:
    """A field with the extra facts the command line needs.

    ``word`` is what users write, if not the field's name.
    """
    extra: dict[str, Any] = {"section": section, **({"word": word} if word else {})}
    return Field(default=default, description=description, json_schema_extra=extra, **bounds)


class _Options(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


class EngineConfig(_Options):
    """What the engine is built from; sizes in tokens unless the description says otherwise."""

    model: str = _option(
        "Model", "smollm2-135m", "Embedded model name, local folder, GGUF file or hub id."
    )
    revision: str | None = _option("Model", None, "Branch, tag or commit of a hub model.")
    device: Literal["auto", "cpu", "cuda"] = _option("Model", "auto", "Where the model runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "Model", "auto", "Number format of weights and K,V."
    )
    kernels: Literal["auto", "native", "torch"] = _option(
        "Model",
        "auto",
        "Kernels on a CPU: native (C, from the wheel or compiled at the first start), torch's "
        "operators, or auto (native where they can be had). Those of a GPU are Triton's.",
    )
    weights: Weights = _option(
        "Model",
        Weights.AUTO,
        "Form of weights on a CPU: fp32 (exact), fp16, bf16, int8 or int4 (finer ones are rounded "
        "to it), or auto: for each matrix the smallest that loses nothing, else fp16.",
    )
    activation_dtype: Literal["auto", "int8", "int16"] = _option(
        "Model",
        "auto",
        "Inputs of the layers' products with weights of 4 and 8 bits: int16 keeps the tokens of "
        "fp32; int8 changes one in a hundred, and is faster where a step has many rows. auto is "
        "int16, and int8 for adaptive requests whose quality allows it, where that is faster.",
    )
    max_model_len: int | None = _option(
        "Model",
        None,
        "Longest prompt plus answer, in tokens; the model's own limit if unset.",
        ge=2,
    )
    generation_config: Literal["auto", "none"] = _option(
        "Model",
        "auto",
        "Where sampling parameters that a request leaves open come from: the model's "
        "generation_config.json, or OpenAI's defaults (none).",
    )
    seed: int = _option("Model", 0, "Seed of random weights and of requests without one.", ge=0)
    max_num_seqs: int = _option("Scheduling", 64, "Sequences in the engine at once.", ge=1)
    max_num_batched_tokens: int = _option(
        "Scheduling",
        512,
        "Token rows in one step. Beside rows of answers there are at most 16 of prompts for each, "
        "or 64.",
        ge=1,
    )
    threads: int = _option("Scheduling", 0, "CPU threads of the engine; 0 takes all cores.", ge=0)
    step_timeout: float = _option(
        "Scheduling",
        300.0,
        "Seconds a step of the engine may take; one that takes longer hangs: the engine is killed "
        "and built anew, or on a thread the server ends.",
        gt=0,
    )
    engine_restarts: int = _option(
        "Scheduling", 3, "Times that an engine which fails is built anew.", ge=0
    )
    kv_cache_dtype: Literal["auto", "float32", "float16", "int16"] = _option(
        "Cache",
        "auto",
        "Number format of K and V: auto is int16, 16-bit integers with scales, beside weights of "
        "4 and 8 bits, else that of --dtype. On a CPU int16 and float16 halve their memory and "
        "round them, float16 more; both need the C kernels.",
    )
    block_size: int = _option("Cache", 16, "Tokens in a KV block.", ge=1, le=1024)
    kv_cache_memory: float | None = _option(
        "Cache",
        None,
        "Memory for K and V, in GiB; on a CPU 1, on a GPU what --gpu-memory-utilization leaves, if "
        "unset.",
        gt=0,
    )
    gpu_memory_utilization: float = _option(
        "Cache",
        0.9,
        "Share of the GPU's memory that weights, K,V and the rest may take.",
        gt=0,
        le=1,
    )
    enable_prefix_caching: bool = _option("Cache", True, "Reuse K,V of equal prompt beginnings.")
    exits: str = _option(
        "Early exit",
        "auto",
        'Exit file (a tuned backbone\'s deltas lie beside it), "auto" (the shipped one that fits), '
        '"none", or "shared:8,12" for a model whose own head reads those layers (LayerSkip).',
    )
    draft_head: str = _option(
        "Early exit",
        "auto",
        'Draft head for lossless requests: a file, "auto" (the shipped one that fits; on a GPU '
        'none) or "none".',
    )
    decision_heads: str = _option(
        "Early exit",
        "auto",
        "Heads that answer trained decisions early: a file, "
        '"auto" (the shipped one that fits) or "none".',
    )
    exit_quality: float | None = _option(
        "Early exit",
        None,
        "Agreement with full depth promised to requests that name none; 0.98, or the best the exit "
        "file reaches, if unset.",
        ge=0.5,
        le=1,
    )
    quality_floor: float | None = _option(
        "Early exit",
        None,
        "Agreement that overload or a deadline may trade down to; unset: nothing is traded.",
        ge=0.5,
        le=1,
    )
    exit_online_quality: float | None = _option(
        "Early exit",
        None,
        "Learn thresholds while serving so that leaving tokens agree with full depth this often; "
        "for exits that were not calibrated.",
        ge=0.5,
        lt=1,
    )
    exit_audit_rate: float = _option(
        "Early exit",
        0.02,
        "Share of answers with early exits, or inputs of 8 bits, read again at full depth.",
        ge=0,
        le=1,
    )
    exit_prefill_threshold: float | None = _option(
        "Early exit",
        None,
        "Gate score at which prompt tokens may leave where a request allows it; the exit file's "
        "own if unset.",
        ge=0,
        le=1,
    )
    max_exit_debt: int = _option("Early exit", 16, "Tokens a request may owe K,V for.", ge=0)
    exit_hold: Literal["latency", "throughput"] = _option(
        "Early exit",
        "latency",
        "What sequences wait at exit points for: on a GPU, throughput lets deep tokens wait for "
        "others wherever that makes more tokens a second, at the cost of their own latency.",
    )
    exit_max_hold_ms: float = _option(
        "Early exit", 50.0, "Longest wait of a sequence at an exit point, in ms.", ge=0
    )


class ServerConfig(_Options):
    """What the HTTP side is built from."""

    host: str = _option("HTTP", "127.0.0.1", "Address to listen on.")
    port: int = _option("HTTP", 8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    api_key: tuple[str, ...] = _option("HTTP", (), "Keys clients must send; none means open.")
    api_key_file: Path | None = _option(
        "HTTP",
        None,
        "File of more keys, one a line, # begins a comment; read again when it changes.",
    )
    ssl_certfile: str | None = _option(
        "HTTP", None, "Certificate (PEM, with its chain) to serve HTTPS with."
    )
    ssl_keyfile: str | None = _option(
        "HTTP", None, "Private key of the certificate (PEM), if that is not in the same file."
    )
    served_model_name: tuple[str, ...] = _option(
        "HTTP", (), "Names clients may use; the first is reported. The model's own if unset."
    )
    engine_worker: Literal["process", "thread"] = _option(
        "Scheduling",
        "process",
        "Where the engine runs: in a process of its own, which can be killed when it hangs and "
        "takes nothing with it when it crashes, or on a thread of the server.",
        word="engine",
    )
    require_model: bool = _option(
        "HTTP", False, "Refuse requests that name no model, as OpenAI does."
    )
    max_num_queued_reqs: int = _option(
        "HTTP", 256, "Requests waiting beyond the running ones before 429.", ge=0
    )
    max_num_queued_tokens: int | None = _option(
        "HTTP",
        None,
        "Tokens of prompts that may wait for their first answer before 429; unset: any number.",
        ge=1,
    )
    max_requests_per_key: int | None = _option(
        "HTTP",
        None,
        "Requests to the model that one key may have running and waiting before 429; unset: any "
        "number.",
        ge=1,
    )
    request_timeout: float | None = _option(
        "HTTP",
        None,
        "Seconds an answer may take, waiting included, before 504; a request's own timeout may be "
        "shorter; unset: any time.",
        gt=0,
    )
    max_body_size: float = _option("HTTP", 8.0, "Largest request body, in MiB.", gt=0)
    shutdown_timeout: float = _option(
        "HTTP", 30.0, "Seconds running requests may take to end after SIGTERM.", ge=0
    )
    sse_keep_alive_interval: float = _option(
        "HTTP", 15.0, "Seconds of silence in a stream before a comment is sent.", gt=0
    )
    allowed_origins: tuple[str, ...] = _option(
        "HTTP", (), 'Origins of web pages that may call the server from a browser; "*" is any.'
    )
    playground: bool = _option("HTTP", True, "Serve the playground, a page to try the model, at /.")
    special_tokens_in_messages: bool = _option(
        "HTTP",
        False,
        "Let the names of special tokens in messages be special tokens; they are text otherwise.",
    )
    embedding_pooling: Pooling = _option(
        "Model",
        Pooling.MEAN,
        "What embeddings are made of where a request does not say: the mean of all states, or the "
        "last token's.",
    )
    tool_call_parser: Literal["auto", "hermes", "llama3_json", "mistral"] = _option(
        "HTTP",
        "auto",
        "How the model writes calls of tools; auto goes by its chat template.",
    )
    reasoning_parser: Literal["auto", "think", "none"] = _option(
        "HTTP",
        "auto",
        "Whether answers may begin with thoughts between <think> tags, which are then reported "
        "apart; auto goes by the chat template.",
    )
    early_exit: Literal["auto", "off", "adaptive", "lossless"] = _option(
        "Early exit",
        "auto",
        "Mode of requests that name none; auto is lossless with a draft head, adaptive without or "
        "where another option asks for a quality or threshold.",
    )
    exit_criterion: ExitCriterion = _option(
        "Early exit", DEFAULT_CRITERION, "Rule by which tokens may leave."
    )
    exit_threshold: float | None = _option(
        "Early exit", None, "Score to leave at; that of --exit-quality if unset.", ge=0, le=1
    )
    exit_when: Literal["pays", "always"] = _option(
        "Early exit",
        "pays",
        "Tokens leave where that saves time by measured cost, or always where their score says so.",
    )
    exit_min_layer: int = _option("Early exit", 0, "First layer tokens may leave after.", ge=0)
    kv_fill: Literal["auto", "project", "copy", "recompute"] = _option(
        "Early exit", "project", "How K,V of skipped layers are made."
    )
    otlp_traces_endpoint: str | None = _option(
        "Logging",
        None,
        "Address of an OpenTelemetry collector (OTLP over HTTP, with its path: /v1/traces) that "
        "gets a span of each request; needs the extra otel.",
    )
    log_stats_interval: float = _option(
        "Logging", 10.0, "Seconds between throughput lines while busy.", gt=0
    )
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug"] = _option(
        "Logging", "warning", "Level of the HTTP server's own log."
    )
    engine: EngineConfig = EngineConfig()

    @field_validator("api_key")
    @classmethod
    def _check_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        """Keys that could not be sent would lock everybody out, and none at all let all in."""
        for key in keys:
            try:
                check_key(key)
            except ApiKeyError as error:
                raise PydanticCustomError("api_key", "{reason}", {"reason": str(error)}) from error
        return keys

    @property
    def max_body_bytes(self) -> int:
        """Largest request body in bytes."""
        return int(self.max_body_size * MIB)

    def model_names(self, own: Iterable[str]) -> tuple[str, ...]:
        """Names clients may use, the reported one first; ``own`` are the model's."""
        return self.served_model_name or tuple(dict.fromkeys(own))
