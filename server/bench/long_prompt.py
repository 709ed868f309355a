"""Time to the first token of one long prompt, new and then seen before."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from offramp.server.bench.load import Target
from offramp.server.bench.ratios import spread
from offramp.server.bench.sides import Side
from offramp.server.text.tokenizer import Tokenizer

# The first token, and one more so that it is not the last.
MAX_TOKENS = 2
_UNBOUNDED = 10**9


def long_prompt(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, number: int
) -> tuple[int, ...]:
    """``length`` tokens made of the texts; every ``number`` begins in another way."""
    text = f"Part {number}. " + "\n".join(texts)
    (ids,) = tokenizer.encode([text], _UNBOUNDED)
    return (ids * (length // len(ids) + 1))[:length]


def measure_long(
    sides: Sequence[Side],
    prompts: Sequence[tuple[int, ...]],
    *,
    mode: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Median milliseconds of each side, and their ratios if there are two.

    The first prompt warms up. ``seen`` is None for a side that keeps nothing of a prompt.
    """
    new: dict[str, list[float]] = {side.name: [] for side in sides}
    seen: dict[str, list[float]] = {side.name: [] for side in sides}
    for number, prompt in enumerate(prompts):
        say(f"long prompt, round {number}")
        for side in sides if number % 2 else reversed(sides):
            fresh = _ttft_ms(side.target, prompt, mode)
            again = None if side.again is None else _ttft_ms(side.again, prompt, mode)
            if number:
                new[side.name].append(fresh)
                seen[side.name] += [] if again is None else [again]
    cases = {"new": new, "seen": seen}
    return {
        "tokens": len(prompts[0]),
        **{f"{case}_ttft_ms": _medians(found) for case, found in cases.items()},
        "ratios": {case: _ratio(list(found.values())) for case, found in cases.items()},
    }


def _ttft_ms(target: Target, prompt: tuple[int, ...], mode: str) -> float:
    (trace,) = target.run(
        [prompt], mode=mode, concurrency=1, max_tokens=MAX_TOKENS, ignore_eos=True
    )
    return 1000 * (trace.times[0] - trace.submitted_at)


def _medians(found: dict[str, list[float]]) -> dict[str, float | None]:
    return {
        name: round(statistics.median(times), 3) if times else None for name, times in found.items()
    }


def _ratio(found: list[list[float]]) -> dict[str, float | None] | None:
    return spread(*found) if len(found) == 2 and all(found) else None
