"""What the span of a request says: GenAI's semantic conventions, vLLM's names, and depth.

Names that OpenTelemetry has since changed are given in both forms, as vLLM's readers know the old.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from offramp.server.api import usage

if TYPE_CHECKING:
    from offramp.server.api.deciding import Decided
    from offramp.server.api.generation import Choice


def generation(choices: Sequence[Choice], n: int, model: str, num_layers: int) -> dict[str, Any]:
    """Of an answer that was generated, however it ended."""
    sampling = choices[0].request.sampling
    used = usage.usage(choices, n)
    reasons = [choice.finish_reason or "abort" for choice in choices]
    return {
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.choice.count": n,
        "gen_ai.request.n": n,
        "gen_ai.response.model": model,
        "gen_ai.response.finish_reasons": reasons,
        "gen_ai.usage.num_sequences": len(choices),
        "gen_ai.usage.output_tokens": used["completion_tokens"],
        "gen_ai.usage.completion_tokens": used["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": used["prompt_tokens_details"]["cached_tokens"],
        **_prompt(used["prompt_tokens"]),
        **_latency(choices),
        **_depth(choices, num_layers),
    }


def decided(answer: Decided, model: str, num_layers: int) -> dict[str, Any]:
    """Of questions that were answered."""
    layers = [each.layer for each in answer.answers]
    return {
        "gen_ai.response.model": model,
        "gen_ai.latency.e2e": answer.seconds,
        "gen_ai.usage.cache_read.input_tokens": answer.stats.cached_tokens,
        **_prompt(answer.stats.prompt_tokens),
        "offramp.early_exit.mode": answer.mode.value,
        "offramp.early_exit.mean_exit_layer": sum(layers) / len(layers),
        "offramp.early_exit.layers_total": num_layers,
        "offramp.decisions.questions": len(layers),
    }


def embedded(tokens: int, model: str, seconds: float) -> dict[str, Any]:
    """Of inputs that were embedded."""
    return {"gen_ai.response.model": model, "gen_ai.latency.e2e": seconds, **_prompt(tokens)}


def _prompt(tokens: int) -> dict[str, int]:
    return {"gen_ai.usage.input_tokens": tokens, "gen_ai.usage.prompt_tokens": tokens}


def _latency(choices: Sequence[Choice]) -> dict[str, float]:
    """Seconds since the engine was asked; those of parts that did not come to pass are left out."""
    submitted = min(choice.submitted_at for choice in choices)
    found = {"gen_ai.latency.e2e": time.monotonic() - submitted}
    admitted = [c.stats.admitted_at for c in choices if c.stats.admitted_at is not None]
    firsts = [c.first_token_at for c in choices if c.first_token_at is not None]
    if admitted:
        found["gen_ai.latency.time_in_queue"] = min(admitted) - submitted
    if firsts:
        first, last = min(firsts), max(choice.last_token_at for choice in choices)
        found["gen_ai.latency.time_to_first_token"] = first - submitted
        found["gen_ai.latency.time_in_model_decode"] = last - first
        if admitted:
            found["gen_ai.latency.time_in_model_prefill"] = first - min(admitted)
            found["gen_ai.latency.time_in_model_inference"] = last - min(admitted)
    return found


def _depth(choices: Sequence[Choice], num_layers: int) -> dict[str, Any]:
    found = usage.early_exit(choices, num_layers)
    names = ("mode", "mean_exit_layer", "layers_total", "layers_executed", "stayed", "passes")
    return {
        **{f"offramp.early_exit.{name}": found[name] for name in names},
        "offramp.early_exit.drafted_tokens": found["drafted_tokens"],
        "offramp.early_exit.accepted_tokens": found["accepted_tokens"],
        "offramp.early_exit.prompt_layers_skipped": found["prompt_layers_skipped"],
    }
