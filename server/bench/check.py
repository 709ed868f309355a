"""Whether Offramp's answers are right, before anybody asks how fast they came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp.models.transformer import Transformer
from offramp.server.bench.errors import Refused
from offramp.server.bench.load import Target, Trace
from offramp.server.bench.reference import Reference, agreement

# Weights of fewer bits choose other tokens where two are about as likely.
LEAST_AGREEMENT = 0.98


@dataclass(frozen=True, slots=True)
class Check:
    """What was shown of mode off: ``agreement`` with full depth in fp32 over its tokens."""

    rule: str
    agreement: float


def check(
    target: Target,
    prompts: Sequence[tuple[int, ...]],
    reference: Reference,
    judge: Transformer,
    *,
    company: int,
    max_tokens: int,
    exact: bool,
) -> Check:
    """Check answers given alone and in the ``company`` of others; raises Refused.

    ``exact`` asks for the reference's own tokens, else most of them must be the judge's choice.
    """
    runs = [
        target.run(prompts, mode="off", concurrency=concurrency, max_tokens=max_tokens)
        for concurrency in (1, company)
    ]
    found = agreement(judge, [trace for run in runs for trace in run]) or 0.0
    if exact:
        wrong = _differences(runs, reference)
        if wrong:
            raise Refused(
                f"mode off differs from transformers on {wrong} of {len(prompts)} prompts"
            )
        return Check("mode off gives transformers' tokens", round(found, 4))
    rule = f"at least {LEAST_AGREEMENT} of mode off's tokens are full depth's in fp32"
    if found < LEAST_AGREEMENT:
        raise Refused(f"{rule}: it is {found:.4f}")
    return Check(rule, round(found, 4))


def _differences(runs: Sequence[Sequence[Trace]], reference: Reference) -> int:
    """Prompts answered otherwise in any of the runs."""
    return sum(
        any(run[i].token_ids != answer for run in runs)
        for i, answer in enumerate(reference.answers)
    )
