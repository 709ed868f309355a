"""Whether Offramp's answers are right, which is checked before any time is reported.

They are compared with transformers' own generate, and with what the full-depth model in fp32
chooses in the same context.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from offramp.models.exits.training.data import Answer, collect
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import load_weights
from offramp.models.transformer import Transformer
from offramp.server.bench.common import Refused
from offramp.server.bench.targets import Prompt, Target, Trace, Transformers

# Weights of fewer bits choose other tokens where two are about as likely.
_LEAST_AGREEMENT = 0.98


@dataclass(frozen=True, slots=True)
class Reference:
    """Greedy answers of transformers, one prompt at a time, and how fast it gave them."""

    answers: list[list[int]]
    tokens_per_s: float


def transformers_answers(folder: Path, prompts: Sequence[Prompt], max_tokens: int) -> Reference:
    """Greedy answers of at most ``max_tokens`` tokens, fp32, batch 1, on the CPU."""
    target = Transformers(folder)
    # The first run warms up and is not counted.
    target.run(prompts[:1], mode="off", concurrency=1, max_tokens=max_tokens)
    traces = target.run(prompts, mode="off", concurrency=1, max_tokens=max_tokens)
    answers = [trace.token_ids for trace in traces]
    seconds = sum(trace.times[-1] - trace.submitted_at for trace in traces)
    return Reference(answers, sum(map(len, answers)) / seconds)


def load_judge(folder: Path, max_positions: int) -> Transformer:
    """The full-depth model in fp32, for texts of at most ``max_positions`` tokens."""
    shape = config_from_hf(folder)
    weights = load_weights(folder, shape, dtype=torch.float32)
    return Transformer(shape, weights, (), max_positions)


def agreement(
    model: Transformer, traces: Sequence[Trace], without: Collection[int] = ()
) -> float | None:
    """Share of emitted tokens that are the full-depth model's choice in the same context.

    The context is the trace's own text; its K,V are exact. All tokens count, exited or not, except
    where the choice is one of ``without``: the ends of answers that had to go on. None if
    no token counts.
    """
    answers = [Answer(trace.prompt, tuple(trace.token_ids)) for trace in traces]
    states = collect(model, answers)
    order = states.answer_of.argsort(stable=True)
    emitted = torch.tensor([token for answer in answers for token in answer.answer])
    chosen = states.labels[order]
    counted = ~torch.isin(chosen, torch.tensor(list(without), dtype=chosen.dtype))
    if not counted.any():
        return None
    return float((chosen == emitted)[counted].double().mean())


@dataclass(frozen=True, slots=True)
class Check:
    """What was shown of mode off: ``agreement`` with full depth in fp32 over its tokens."""

    rule: str
    agreement: float


def check(
    target: Target,
    prompts: Sequence[Prompt],
    reference: Reference,
    judge: Transformer,
    *,
    concurrency: int,
    max_tokens: int,
    exact: bool,
) -> Check:
    """Check answers given one at a time and ``concurrency`` at a time; raises Refused.

    With ``exact`` they must be the reference's own tokens, else most must be the judge's choice.
    """
    runs = [
        target.run(prompts, mode="off", concurrency=streams, max_tokens=max_tokens)
        for streams in (1, concurrency)
    ]
    found = agreement(judge, [trace for run in runs for trace in run]) or 0.0
    if exact:
        wrong = sum(
            any(run[i].token_ids != answer for run in runs)
            for i, answer in enumerate(reference.answers)
        )
        if wrong:
            raise Refused(
                f"mode off differs from transformers on {wrong} of {len(prompts)} prompts"
            )
        return Check("mode off gives transformers' tokens", round(found, 4))
    rule = f"at least {_LEAST_AGREEMENT} of mode off's tokens are full depth's in fp32"
    if found < _LEAST_AGREEMENT:
        raise Refused(f"{rule}: it is {found:.4f}")
    return Check(rule, round(found, 4))
