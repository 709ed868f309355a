"""Runs of prompts through an engine: what they said, judged at full depth, and what they cost.

Quality and speed are always reported together. Answers are judged by the full-depth model, each in
the context of its own text. Costs are compared fairly on a machine whose speed drifts: each run
made certain steps (kind, segment, rows), and a step costs the median time of equal steps over all
runs, so two runs differ by the steps they made and not by when they made them.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch

from offramp.models.exits.training.data import Answer, batches, lay_out
from offramp.models.transformer import Transformer
from offramp.server.engine.offline import Finished
from offramp.server.engine.request import StepStats

# Rows whose logits exist at a time: 50 MB each 256 rows at a vocabulary of 50,000.
_ROWS = 256


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of each answer: its tokens, those that differ from full depth, the sum of their log p."""

    tokens: tuple[int, ...]
    wrong: tuple[int, ...]
    log_probs: tuple[float, ...]

    @property
    def losses(self) -> list[float]:
        """Share of each answer's tokens that differ from the full-depth model's choice."""
        return [wrong / tokens for wrong, tokens in zip(self.wrong, self.tokens, strict=True)]

    @property
    def agreement(self) -> float:
        """Share of all tokens that are the full-depth model's choice."""
        return 1 - sum(self.wrong) / sum(self.tokens)

    @property
    def mean_agreement(self) -> float:
        """Mean over answers of the share of their tokens that agree."""
        return 1 - sum(self.losses) / len(self.tokens)

    @property
    def perplexity(self) -> float:
        """Of the tokens under the full model: exp of their mean negative log probability."""
        return math.exp(-sum(self.log_probs) / sum(self.tokens))


@torch.inference_mode()
def judge(model: Transformer, answers: Sequence[Answer]) -> Judgement:
    """Judge answers of at least one token each, with exact K,V (teacher-forced at full depth).

    Memory: the K,V of about a thousand tokens and the logits of 256 rows.
    """
    wrong = [0] * len(answers)
    log_probs = [0.0] * len(answers)
    order = sorted(range(len(answers)), key=lambda i: len(answers[i].prompt))
    for batch in batches(answers, order):
        layout = lay_out(model, [(index, answers[index]) for index in batch])
        hidden = layout.hidden
        for segment in model.segments:
            hidden = segment(hidden, layout.at, layout.cache)
        emitted = torch.tensor([token for index in batch for token in answers[index].answer])
        rows = zip(layout.rows.split(_ROWS), emitted.split(_ROWS), strict=True)
        owners = layout.owner.split(_ROWS)
        for (place, tokens), owner in zip(rows, owners, strict=True):
            logits = model.logits(model.normed(hidden[place]))
            said = tokens.to(logits.device)
            differs = (logits.argmax(-1) != said).tolist()
            log_p = logits.log_softmax(-1).gather(1, said[:, None]).squeeze(1).tolist()
            for index, miss, value in zip(owner.tolist(), differs, log_p, strict=True):
                wrong[index] += miss
                log_probs[index] += value
    return Judgement(tuple(len(item.answer) for item in answers), tuple(wrong), tuple(log_probs))


Kind = tuple[str, int, int, int, int]
"""Kind of a step, first and last segment, prompt rows (up to a power of two) and answer rows."""


@dataclass(slots=True)
class StepLog:
    """Seconds of the steps of one run, the engine's own time included."""

    seconds: dict[Kind, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, stats: StepStats) -> None:
        """Note one step."""
        # Prompts cut into chunks give every row count; exact ones would hardly meet again.
        prompt = 1 << (stats.prefill_rows - 1).bit_length() if stats.prefill_rows else 0
        kind = (stats.kind, stats.first_segment, stats.segment, prompt, stats.decode_rows)
        self.seconds[kind].append(stats.seconds + stats.host_seconds)


def priced(runs: Sequence[StepLog]) -> list[float]:
    """Seconds of each run at the common price of its steps."""
    pooled: dict[Kind, list[float]] = defaultdict(list)
    for log in runs:
        for kind, seconds in log.seconds.items():
            pooled[kind] += seconds
    prices = {kind: statistics.median(seconds) for kind, seconds in pooled.items()}
    return [
        sum(prices[kind] * len(seconds) for kind, seconds in log.seconds.items()) for log in runs
    ]


@dataclass(frozen=True, slots=True)
class Run:
    """Answers to prompts under one setting, in the order of the prompts, and their judgement."""

    finished: tuple[Finished, ...]
    judgement: Judgement
    steps: StepLog

    @property
    def layers_executed(self) -> int:
        """Layers really run for the answers, summed over tokens."""
        return sum(item.stats.layers_executed for item in self.finished if item.stats is not None)

    @property
    def mean_depth(self) -> float:
        """Layers really run for a token, on average."""
        return self.layers_executed / sum(self.judgement.tokens)


@dataclass(frozen=True, slots=True)
class Figures:
    """One run in numbers.

    ``agreement`` over all tokens, ``answer_agreement`` the mean over answers; ``perplexity`` of the
    emitted tokens under the full model; ``length`` in tokens; ``repetition`` the share of an
    answer's 4-grams that were there before, ``distinct_2`` the share of its 2-grams that differ,
    means over answers. ``mean_depth`` and ``layers_skipped`` (share) count layers really run for
    the answers, ``prompt_skipped`` is the share of the prompts' layers that were not;
    ``exit_histogram`` tokens by the layer they left at. Times in milliseconds.
    """

    answers: int
    tokens: int
    agreement: float
    answer_agreement: float
    perplexity: float
    length: float
    repetition: float
    distinct_2: float
    mean_depth: float
    layers_skipped: float
    prompt_skipped: float
    exit_histogram: dict[str, int]
    tokens_per_s: float
    ttft_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    e2e_p50_ms: float
    e2e_p99_ms: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded to what they can mean."""
        return {
            name: round(value, 5) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def speed(finished: Sequence[Finished]) -> float:
    """Tokens per second of wall time."""
    begun = min(item.submitted_at for item in finished)
    tokens = sum(len(item.token_ids) for item in finished)
    return tokens / (max(item.times[-1] for item in finished) - begun)


def figures(run: Run, num_layers: int) -> Figures:
    """The numbers of one run of a stack of ``num_layers``."""
    finished, judgement = run.finished, run.judgement
    tokens = sum(judgement.tokens)
    skipped = sum(item.stats.prompt_layers_skipped for item in finished if item.stats is not None)
    gaps = [b - a for item in finished for a, b in pairwise(item.times)]
    whole = [item.times[-1] - item.submitted_at for item in finished]
    left = Counter(layer for item in finished for layer in item.exit_layers)
    return Figures(
        answers=len(finished),
        tokens=tokens,
        agreement=judgement.agreement,
        answer_agreement=judgement.mean_agreement,
        perplexity=judgement.perplexity,
        length=tokens / len(finished),
        repetition=statistics.fmean(repetition(item.token_ids) for item in finished),
        distinct_2=statistics.fmean(distinct(item.token_ids, 2) for item in finished),
        mean_depth=run.mean_depth,
        layers_skipped=1 - run.layers_executed / (tokens * num_layers),
        prompt_skipped=skipped / (num_layers * sum(len(item.request.prompt) for item in finished)),
        exit_histogram={str(layer): left[layer] for layer in sorted(left)},
        tokens_per_s=speed(finished),
        ttft_ms=1000 * statistics.median(item.times[0] - item.submitted_at for item in finished),
        itl_p50_ms=1000 * percentile(gaps, 0.5),
        itl_p99_ms=1000 * percentile(gaps, 0.99),
        e2e_p50_ms=1000 * percentile(whole, 0.5),
        e2e_p99_ms=1000 * percentile(whole, 0.99),
    )


def repetition(tokens: Sequence[int]) -> float:
    """Share of the 4-grams of an answer that it has said before; 0 if it is too short for any."""
    return 1 - distinct(tokens, 4)


def distinct(tokens: Sequence[int], size: int) -> float:
    """Share of an answer's ``size``-grams that are different ones; 1 if it has none."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie; 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
