"""What answers have to equal: transformers' own generate, and the full-depth model's choices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from offramp.models.exits.states import Answer, collect
from offramp.models.transformer import Transformer
from offramp.server.bench.load import Trace


@dataclass(frozen=True, slots=True)
class Reference:
    """Greedy answers of transformers, one prompt at a time, and how fast it gave them."""

    answers: list[list[int]]
    tokens_per_s: float


def transformers_answers(
    folder: Path, prompts: Sequence[tuple[int, ...]], max_tokens: int
) -> Reference:
    """Greedy answers of at most ``max_tokens`` tokens, fp32, batch 1, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers: list[list[int]] = []
    seconds = 0.0
    with torch.inference_mode():
        for index, prompt in enumerate([prompts[0], *prompts]):
            ids = torch.tensor([prompt])
            begun = time.perf_counter()
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            # The first run warms up and is not counted.
            if index:
                seconds += time.perf_counter() - begun
                answers.append(out[0, len(prompt) :].tolist())
    return Reference(answers, sum(map(len, answers)) / seconds)


def agreement(model: Transformer, traces: Sequence[Trace]) -> float:
    """Share of emitted tokens that are the full-depth model's choice in the same context.

    The context is the trace's own text; its K,V are exact. All tokens count, exited or not.
    """
    answers = [Answer(trace.prompt, tuple(trace.token_ids)) for trace in traces]
    states = collect(model, answers)
    order = states.answer_of.argsort(stable=True)
    emitted = torch.tensor([token for answer in answers for token in answer.answer])
    return float((states.labels[order] == emitted).double().mean())
