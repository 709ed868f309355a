"""Lossless mode on a real (tiny) model: guesses change the work, never the answer."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.models.exits.training.data import Answer, collect
from offramp.models.runner import Runner
from offramp.models.sampling_params import (
    DraftSource,
    ExitCriterion,
    ExitMode,
    ExitSettings,
    SamplingParams,
    TokenSource,
)
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.engine.engine import Engine
from offramp.server.engine.offline import Finished, run_all
from offramp.server.engine.request import FinishReason, GenerationRequest

from .test_engine_machine import host_of

GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
PROMPTS = [
    (5, 6, 7),
    tuple(range(20, 60)),
    (9, 10, 9, 10, 9, 10, 9),
    (300, 40, 41, 40, 41, 300, 40, 41),
    (77,) * 12,
    (1,),
]


@pytest.fixture(scope="module")
def engine(tiny_dir: Path) -> Engine:
    """Exits that are often wrong, always taken, and lookups wherever the text repeats itself."""
    config = EngineConfig(
        device="cpu", max_num_seqs=8, exits="shared:2,3", max_exit_debt=5, max_model_len=200
    )
    made = build_engine(config, tiny_dir, model_name="tiny", check_invariants=True)
    governor = host_of(made).governor
    governor.draft_bound = lambda segment, rows: 0.2  # type: ignore[method-assign]
    governor.ngram_length = lambda rates, size, rows: 4  # type: ignore[method-assign]
    return made


_names = itertools.count()


def answers(
    engine: Engine,
    mode: ExitMode,
    sampling: Sequence[SamplingParams],
    concurrency: int = 4,
    prompts: Sequence[tuple[int, ...]] = PROMPTS,
    **settings: Any,
) -> list[Finished]:
    exits = ExitSettings(mode, **settings)
    requests = [
        GenerationRequest(str(next(_names)), prompt, sampling[i % len(sampling)], exits)
        for i, prompt in enumerate(prompts)
    ]
    return run_all(engine, requests, concurrency=concurrency)


def tokens(done: Sequence[Finished]) -> list[list[int]]:
    return [item.token_ids for item in done]


SAMPLED = SamplingParams(max_tokens=24, temperature=1.0, seed=3)


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        replace(GREEDY, presence_penalty=1.5, frequency_penalty=0.7),
        replace(GREEDY, repetition_penalty=1.8),
        replace(GREEDY, logit_bias=((40, 30.0), (41, 29.0))),
        replace(GREEDY, min_tokens=10, stop_token_ids=frozenset(range(100, 320))),
        SAMPLED,
        replace(SAMPLED, temperature=0.4, top_p=0.9, seed=11),
        replace(SAMPLED, top_k=5, min_p=0.01, presence_penalty=0.5, seed=12),
    ],
    ids=["greedy", "penalties", "repetition", "bias", "min", "sampled", "nucleus", "all"],
)
def test_the_answer_is_that_of_full_depth(
    engine: Engine, sampling: SamplingParams, concurrency: int
) -> None:
    off = answers(engine, ExitMode.OFF, [sampling], concurrency)
    lossless = answers(engine, ExitMode.LOSSLESS, [sampling], concurrency)
    assert tokens(lossless) == tokens(off)
    assert [item.reason for item in lossless] == [item.reason for item in off]
    assert {layer for item in lossless for layer in item.exit_layers} == {4}


def test_guesses_are_made_right_and_wrong(engine: Engine) -> None:
    """So that the equalities above have something to go wrong with."""
    stats = [item.stats for item in answers(engine, ExitMode.LOSSLESS, [GREEDY])]
    accepted = sum(item.accepted for item in stats if item)
    rejected = sum(item.rejected for item in stats if item)
    drafted = sum(item.drafted for item in stats if item)
    assert accepted > 10
    assert rejected > 10
    assert drafted >= accepted + rejected


def test_steps_tell_of_runs_of_guesses_and_places_of_right_ones(engine: Engine) -> None:
    for index, prompt in enumerate(PROMPTS):
        exits = ExitSettings(ExitMode.LOSSLESS)
        engine.add(GenerationRequest(f"{index}-{next(_names)}", prompt, GREEDY, exits), 0.0)
    steps = []
    while engine.has_work:
        steps.append(engine.step().stats)
    runs = sum(step.drafts for step in steps if step)
    by_place = sum((Counter(step.accepted_at) for step in steps if step), Counter())
    assert by_place.total() == sum(sum(step.accepted.values()) for step in steps if step)
    # What is right in a later place is right in all before it.
    counts = [by_place[place] for place in range(max(by_place) + 1)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] <= runs <= sum(sum(step.drafted.values()) for step in steps if step)


@pytest.mark.parametrize(
    "criterion", [ExitCriterion.PATIENCE, ExitCriterion.PROMPT_DEPTH, ExitCriterion.FIXED]
)
def test_any_criterion_may_guess(engine: Engine, criterion: ExitCriterion) -> None:
    off = answers(engine, ExitMode.OFF, [GREEDY])
    thresholds = (0.0, 0.0)
    found = answers(engine, ExitMode.LOSSLESS, [GREEDY], criterion=criterion, thresholds=thresholds)
    assert tokens(found) == tokens(off)


def test_company_of_other_modes_changes_nothing(engine: Engine) -> None:
    alone = tokens(answers(engine, ExitMode.OFF, [GREEDY, SAMPLED], 1))
    requests = []
    for index, prompt in enumerate(PROMPTS):
        sampling = (GREEDY, SAMPLED)[index % 2]
        for mode in ExitMode:
            exits = ExitSettings(mode, ExitCriterion.FIXED, thresholds=(1.0, 1.0))
            name = f"{mode}-{next(_names)}"
            requests.append(GenerationRequest(name, prompt, sampling, exits))
    done = run_all(engine, requests, concurrency=8)
    for mode in (ExitMode.OFF, ExitMode.LOSSLESS):
        mine = [item for item in done if item.request.exits.mode is mode]
        assert tokens(mine) == alone


def test_a_stop_token_among_the_guesses_ends_the_answer_there(engine: Engine) -> None:
    free = answers(engine, ExitMode.OFF, [GREEDY])
    for index, item in enumerate(free):
        stop = item.token_ids[7]
        ending = replace(GREEDY, stop_token_ids=frozenset({stop}))
        found = answers(engine, ExitMode.LOSSLESS, [ending], 1, [PROMPTS[index]])[0]
        first = item.token_ids.index(stop)
        assert found.token_ids == item.token_ids[: first + 1]
        assert found.reason is FinishReason.STOP
        assert found.stats is not None
        assert found.stats.generated_tokens == first + 1


def test_the_context_and_max_tokens_hold_exactly(engine: Engine) -> None:
    for count in (1, 2, 3, 5):
        short = replace(GREEDY, max_tokens=count)
        found = answers(engine, ExitMode.LOSSLESS, [short])
        assert [len(item.token_ids) for item in found] == [count] * len(PROMPTS)
    long = replace(GREEDY, max_tokens=500)
    found = answers(engine, ExitMode.LOSSLESS, [long], 2, PROMPTS[2:4])
    assert tokens(found) == tokens(answers(engine, ExitMode.OFF, [long], 2, PROMPTS[2:4]))
    assert [len(item.token_ids) for item in found] == [200 - 7, 200 - 8]


def test_sampled_answers_follow_the_models_own_distribution(engine: Engine) -> None:
    """All three tokens of many answers against exact probabilities (chi-square)."""
    runner = host_of(engine).runner
    assert isinstance(runner, Runner)
    sampling = SamplingParams(max_tokens=3, temperature=0.7, top_k=2)
    prompt, count = PROMPTS[2], 400
    seeds = [replace(sampling, seed=seed) for seed in range(count)]
    done = answers(engine, ExitMode.LOSSLESS, seeds, 8, [prompt] * count)
    seen = Counter(tuple(item.token_ids) for item in done)
    assert sum(item.stats.accepted for item in done if item.stats) > 10

    def choices(context: tuple[int, ...]) -> list[tuple[int, float]]:
        top = collect(runner.model, [Answer(context, (0,))]).top[0].float()
        values, ids = runner.model.logits(top.unsqueeze(0))[0].topk(2)
        probs = (values / 0.7).softmax(dim=-1)
        return list(zip(ids.tolist(), probs.tolist(), strict=True))

    expected: dict[tuple[int, ...], float] = {}
    with torch.inference_mode():
        for a, p in choices(prompt):
            for b, q in choices((*prompt, a)):
                for c, r in choices((*prompt, a, b)):
                    expected[a, b, c] = p * q * r
    assert set(seen) <= set(expected)
    statistic = sum(
        (seen[key] - count * share) ** 2 / (count * share) for key, share in expected.items()
    )
    # 99.9 % quantile of chi-square with 7 degrees of freedom.
    assert statistic < 24.3


def test_each_token_says_where_it_came_from(engine: Engine) -> None:
    """Verified guesses are told by who made them, as often as they are counted."""
    done = answers(engine, ExitMode.LOSSLESS, [GREEDY])
    assert all(len(item.sources) == len(item.token_ids) for item in done)
    sources = Counter(source for item in done for source in item.sources)
    assert sources[TokenSource.EXIT] > 10
    assert sources[TokenSource.MODEL] > 10
    for source in DraftSource:
        accepted = sum(item.stats.drafts.get(source, (0, 0))[1] for item in done if item.stats)
        # A token that ends the answer drops what was accepted behind it.
        assert accepted - len(done) <= sources[TokenSource(source)] <= accepted
