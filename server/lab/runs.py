"""Run prompts through an engine and judge what came out: quality beside speed, never one alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from offramp.models.exits.training.data import Answer
from offramp.models.sampling_params import ExitSettings, SamplingParams
from offramp.models.transformer import Transformer
from offramp.server.engine.bulk import Finished, run_all
from offramp.server.engine.driver import EngineProtocol
from offramp.server.engine.request import EngineOutput, GenerationRequest
from offramp.server.lab.errors import LabError
from offramp.server.lab.judge import Judgement, judge
from offramp.server.lab.prices import StepLog

_NGRAM = 4


@dataclass(frozen=True, slots=True)
class Load:
    """How prompts are run: ``concurrency`` answers in flight, each of at most ``max_tokens``."""

    max_tokens: int
    concurrency: int


@dataclass(frozen=True, slots=True)
class Run:
    """Answers to prompts under one setting, in the order of the prompts, and their judgement."""

    finished: tuple[Finished, ...]
    judgement: Judgement
    steps: StepLog


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


def run(
    engine: EngineProtocol,
    judging: Transformer,
    prompts: Sequence[tuple[int, ...]],
    exits: ExitSettings,
    load: Load,
) -> Run:
    """Greedy answers to ``prompts`` under ``exits``, judged by the full-depth model.

    Raises LabError when an answer ends without a token.
    """
    steps = StepLog()
    finished = answer(engine, prompts, exits, load, steps)
    answers = [Answer(item.request.prompt, tuple(item.token_ids)) for item in finished]
    return Run(tuple(finished), judge(judging, answers), steps)


def answer(
    engine: EngineProtocol,
    prompts: Sequence[tuple[int, ...]],
    exits: ExitSettings,
    load: Load,
    steps: StepLog,
) -> list[Finished]:
    """As `run`, without a judgement; ``steps`` notes what the engine did."""
    sampling = SamplingParams(
        max_tokens=load.max_tokens,
        temperature=0.0,
        stop_token_ids=frozenset(engine.info.eos_token_ids),
    )

    def observe(output: EngineOutput) -> None:
        if output.stats is not None:
            steps.add(output.stats)

    requests = (
        GenerationRequest(str(index), prompt, sampling, exits)
        for index, prompt in enumerate(prompts)
    )
    finished = run_all(engine, requests, concurrency=load.concurrency, observe=observe)
    for item in finished:
        if not item.token_ids or item.stats is None:
            raise LabError(f"an answer ended without a token: {item.reason}")
    return finished


def speed(finished: Sequence[Finished]) -> float:
    """Tokens per second of wall time."""
    begun = min(item.submitted_at for item in finished)
    tokens = sum(len(item.token_ids) for item in finished)
    return tokens / (max(item.times[-1] for item in finished) - begun)


def figures(run: Run, num_layers: int) -> Figures:
    """The numbers of one run of a stack of ``num_layers``."""
    finished, judgement = run.finished, run.judgement
    tokens = sum(judgement.tokens)
    layers = sum(item.stats.layers_executed for item in finished if item.stats is not None)
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
        mean_depth=layers / tokens,
        layers_skipped=1 - layers / (tokens * num_layers),
        prompt_skipped=_prompt_skipped(finished, num_layers),
        exit_histogram={str(layer): left[layer] for layer in sorted(left)},
        tokens_per_s=speed(finished),
        ttft_ms=1000 * statistics.median(item.times[0] - item.submitted_at for item in finished),
        itl_p50_ms=1000 * percentile(gaps, 0.5),
        itl_p99_ms=1000 * percentile(gaps, 0.99),
        e2e_p50_ms=1000 * percentile(whole, 0.5),
        e2e_p99_ms=1000 * percentile(whole, 0.99),
    )


def _prompt_skipped(finished: Sequence[Finished], num_layers: int) -> float:
    skipped = sum(item.stats.prompt_layers_skipped for item in finished if item.stats is not None)
    return skipped / (num_layers * sum(len(item.request.prompt) for item in finished))


def repetition(tokens: Sequence[int]) -> float:
    """Share of the 4-grams of an answer that it has said before; 0 if it is too short for any."""
    return 1 - distinct(tokens, _NGRAM)


def distinct(tokens: Sequence[int], size: int) -> float:
    """Share of an answer's ``size``-grams that are different ones; 1 if it has none."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie; 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
