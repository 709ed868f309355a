"""What a request used and how deep its tokens went, for responses and the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.server.api.generation import Choice


def usage(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """OpenAI's ``usage``; a prompt counts once however many of the ``n`` choices share it."""
    firsts = choices[::n]
    prompt = sum(len(choice.request.prompt) for choice in firsts)
    completion = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {
            "reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)
        },
        "prompt_tokens_details": {
            "cached_tokens": sum(choice.stats.cached_tokens for choice in firsts)
        },
    }


def metrics(choices: Sequence[Choice], num_layers: int) -> dict[str, Any]:
    """Timings as vLLM names them, counted from when the engine was asked, and ``early_exit``."""
    submitted = min(choice.submitted_at for choice in choices)
    firsts = [choice.first_token_at for choice in choices if choice.first_token_at is not None]
    first = min(firsts, default=None)
    last = max(choice.last_token_at for choice in choices)
    admitted = [c.stats.admitted_at for c in choices if c.stats.admitted_at is not None]
    tokens = sum(choice.completion_tokens for choice in choices)
    gaps = tokens - len(firsts)
    decode = sum(c.last_token_at - c.first_token_at for c in choices if c.first_token_at)
    return {
        "time_to_first_token_ms": None if first is None else _ms(first - submitted),
        "generation_time_ms": None if first is None else _ms(last - first),
        "queue_time_ms": _ms(min(admitted) - submitted) if admitted else None,
        "mean_itl_ms": _ms(decode / gaps) if gaps > 0 else None,
        "tokens_per_second": round(tokens / (last - submitted), 3) if last > submitted else None,
        "early_exit": early_exit(choices, num_layers),
    }


def early_exit(choices: Sequence[Choice], num_layers: int) -> dict[str, Any]:
    """Depth of all tokens of the choices; layers are counted as run by the engine.

    ``activation_dtype`` is there where layers took inputs of 8 bits.
    """
    histogram = _histogram(choices)
    tokens = histogram.total()
    # The engine may be a token ahead of a stop string; its two counts belong together.
    executed = sum(choice.stats.layers_executed for choice in choices)
    possible = num_layers * sum(choice.stats.generated_tokens for choice in choices)
    depth = sum(layer * count for layer, count in histogram.items())
    coarse = any(choice.stats.coarse for choice in choices)
    return {
        "mode": choices[0].request.exits.mode.value,
        "layers_total": num_layers,
        "mean_exit_layer": round(depth / tokens, 4) if tokens else None,
        "layers_executed": executed,
        "layers_skipped_fraction": round(1 - executed / possible, 4) if possible else 0.0,
        "exit_histogram": {str(layer): histogram[layer] for layer in sorted(histogram)},
        "stayed": sum(choice.stats.stayed for choice in choices),
        "passes": sum(choice.stats.passes for choice in choices),
        "drafted_tokens": sum(choice.stats.drafted for choice in choices),
        "accepted_tokens": sum(choice.stats.accepted for choice in choices),
        "drafts": _drafts(choices),
        "prompt_layers_skipped": sum(choice.stats.prompt_layers_skipped for choice in choices),
        **({"activation_dtype": "int8"} if coarse else {}),
    }


def summary(request_id: str, choices: Sequence[Choice]) -> str:
    """The log line of a request; no text of it."""
    histogram = _histogram(choices)
    tokens = histogram.total()
    depth = sum(layer * count for layer, count in histogram.items())
    unfinished = "error" if any(choice.failed for choice in choices) else "abort"
    reasons = Counter(choice.finish_reason or unfinished for choice in choices)
    first = min((c.first_token_at for c in choices if c.first_token_at), default=None)
    submitted = min(choice.submitted_at for choice in choices)
    return (
        f"{request_id} finished={','.join(sorted(reasons))} choices={len(choices)} "
        f"prompt_tokens={len(choices[0].request.prompt)} completion_tokens={tokens} "
        f"mean_exit_layer={depth / tokens if tokens else 0:.2f} "
        f"ttft_ms={_ms(first - submitted) if first else '-'}"
    )


def _drafts(choices: Sequence[Choice]) -> dict[str, dict[str, int]]:
    """Drafted and accepted tokens by who guessed them."""
    found: dict[str, Counter[str]] = {}
    for choice in choices:
        for source, (drafted, accepted) in choice.stats.drafts.items():
            found.setdefault(source.value, Counter()).update(drafted=drafted, accepted=accepted)
    return {source: dict(counts) for source, counts in found.items()}


def _histogram(choices: Sequence[Choice]) -> Counter[int]:
    return sum((choice.exit_counts for choice in choices), start=Counter())


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 3)
