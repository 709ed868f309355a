"""The sampler against distributions worked out in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.kernels import sampling
from offramp.models.sampler import sample, sample_with_logprobs
from offramp.models.sampling_params import SamplingParams
from offramp.models.step import HeadRow

LOGITS = [1.2, -0.3, 0.0, 2.1, 1.1, -2.0, 0.4, 1.9]
PLAIN = SamplingParams(max_tokens=10)


def row(
    params: SamplingParams, index: int = 0, tokens: Sequence[int] = (0,), num_prompt: int = 1
) -> HeadRow:
    return HeadRow(0, params, index, tokens, num_prompt)


def distribution(logits: Sequence[float], params: SamplingParams) -> dict[int, float]:
    """Probability of each token: temperature, then top_k, top_p and min_p, then scaled to 1."""
    weights = {token: math.exp(value / params.temperature) for token, value in enumerate(logits)}
    best = sorted(weights, key=lambda token: -weights[token])
    best = best[: params.top_k or len(best)]
    total = sum(weights[token] for token in best)
    kept: dict[int, float] = {}
    for token in best:
        mass_before = sum(kept.values()) / total
        likely = weights[token] >= params.min_p * weights[best[0]]
        if not kept or (mass_before < params.top_p and likely):
            kept[token] = weights[token]
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


def test_greedy_takes_the_best() -> None:
    greedy = replace(PLAIN, temperature=0.0)
    logits = torch.randn(5, 300)
    assert sample(logits, [row(greedy)] * 5) == logits.argmax(dim=1).tolist()


def test_what_the_largest_are_known_to_be_is_found_again_where_logits_change() -> None:
    greedy = replace(PLAIN, temperature=0.0)
    logits = torch.tensor([LOGITS] * 3)
    barred = replace(greedy, logit_bias=((3, -100.0),))
    rows = [row(greedy), row(barred), row(greedy)]
    # The first is believed, though another would be larger.
    assert sample(logits, rows, [5, 3, 3]) == [5, 7, 3]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"top_p": 0.8},
        {"top_k": 6, "top_p": 0.7},
        {"min_p": 0.25},
        {"temperature": 1.7, "top_k": 7, "top_p": 0.95, "min_p": 0.1},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"top_k": 100},
    ],
    ids=str,
)
@pytest.mark.parametrize("native", [False, True])
def test_tokens_come_as_often_as_they_should(changes: dict[str, float], *, native: bool) -> None:
    """Chi-square over many draws; the bound is passed by chance once in about 10,000 runs."""
    params = replace(PLAIN, seed=11, **changes)  # type: ignore[arg-type]
    expected = distribution(LOGITS, params)
    draws = 4000
    logits = torch.tensor(LOGITS).repeat(draws, 1)
    best = [LOGITS.index(max(LOGITS))] * draws if native else None
    tokens = sample(logits, [row(params, index) for index in range(draws)], best)
    assert set(tokens) <= expected.keys()
    chi = sum(
        (tokens.count(token) - draws * share) ** 2 / (draws * share)
        for token, share in expected.items()
    )
    freedom = len(expected) - 1
    assert chi <= freedom + 4 * math.sqrt(2 * freedom) + 8 * (freedom > 0) + 1e-6


def test_the_draw_depends_on_seed_and_index_alone() -> None:
    """A row in company gets the token it gets alone, wherever it stands."""
    logits = torch.randn(6, 200)
    rows = [row(replace(PLAIN, seed=seed, top_p=0.9), seed % 2 * 3) for seed in range(6)]
    together = sample(logits.clone(), rows)
    alone = [sample(logits[i : i + 1].clone(), [item])[0] for i, item in enumerate(rows)]
    backwards = sample(logits.flip(0).clone(), rows[::-1])
    assert together == alone == backwards[::-1]


def test_of_a_part_of_the_vocabulary_comes_what_comes_of_the_whole() -> None:
    """Exits that tell a part of the tokens apart guess with the noise of full depth."""
    ids = torch.randperm(500)[:90].sort().values
    logits = torch.full((20, 500), -torch.inf)
    logits[:, ids] = torch.randn(20, 90)
    rows = [row(PLAIN, index) for index in range(20)]
    places = sample(logits[:, ids].contiguous(), rows, ids=ids)
    assert ids[places].tolist() == sample(logits, rows)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        ({"temperature": 0.0, "top_p": 0.5}, False),
        ({"top_p": 0.5}, True),
        ({"top_k": 5}, True),
        ({"min_p": 0.1}, True),
        ({"temperature": 0.0, "logprobs": 0}, True),
        ({"logit_bias": ((5, 1.0),)}, True),
    ],
    ids=str,
)
def test_logits_are_needed_where_the_largest_key_is_not_enough(
    changes: dict[str, Any], *, needed: bool
) -> None:
    item = row(replace(PLAIN, seed=3, **changes), 7)
    assert item.needs_logits is needed
    assert (item.noise is None) == (item.sampling.temperature == 0)
    assert item.noise is None or (item.noise.seed, item.noise.index) == (3, 7)


def test_bias_is_added() -> None:
    logits = torch.tensor([LOGITS])
    token = sample(
        logits, [row(replace(PLAIN, temperature=0.0, logit_bias=((5, 100.0), (0, 1.0))))]
    )
    assert token == [5]
    assert logits[0, [0, 5]].tolist() == pytest.approx([LOGITS[0] + 1, LOGITS[5] + 100])


def test_presence_and_frequency_count_the_answer_only() -> None:
    """OpenAI: logit - count * frequency - (count > 0) * presence."""
    params = replace(PLAIN, temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    logits = torch.tensor([LOGITS])
    sample(logits, [row(params, 4, tokens=[3, 3, 1, 7, 7, 7], num_prompt=2)])
    expected = list(LOGITS)
    expected[1] -= 0.5 + 0.25
    expected[7] -= 0.5 + 3 * 0.25
    assert logits[0].tolist() == pytest.approx(expected)


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    """CTRL: positive logits are divided, negative ones multiplied."""
    logits = torch.tensor([LOGITS])
    params = replace(PLAIN, temperature=0.0, repetition_penalty=2.0)
    sample(logits, [row(params, 2, tokens=[3, 1, 5, 5], num_prompt=2)])
    expected = list(LOGITS)
    for token in (3, 1, 5):
        expected[token] *= 0.5 if expected[token] > 0 else 2.0
    assert logits[0].tolist() == pytest.approx(expected)


def test_penalties_of_one_row_leave_the_others() -> None:
    logits = torch.tensor([LOGITS, LOGITS])
    penalised = replace(PLAIN, temperature=0.0, presence_penalty=2.0)
    plain = replace(PLAIN, temperature=0.0)
    answer = [0, 3]
    assert sample(logits, [row(penalised, 1, answer), row(plain, 1, answer)]) == [7, 3]
    assert logits[1].tolist() == pytest.approx(LOGITS)


def test_min_tokens_hold_back_the_stop_ids() -> None:
    params = replace(PLAIN, temperature=0.0, min_tokens=2, stop_token_ids=frozenset({3, 7}))
    found = [sample(torch.tensor([LOGITS]), [row(params, index)])[0] for index in range(4)]
    assert found == [0, 0, 3, 3]


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-40, 1e-60])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    """Dividing by them overflows unless it is done with care."""
    logits = torch.tensor([LOGITS]) * 20
    for params in (PLAIN, replace(PLAIN, top_p=0.9), replace(PLAIN, top_k=3)):
        chosen = replace(params, temperature=temperature)
        assert sample(logits.clone(), [row(chosen, index=5)]) == [3]


@pytest.mark.parametrize(
    "changes",
    [
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1e-9},
        {"top_k": 700, "top_p": 0.99},
        {"top_p": 0.9, "min_p": 0.01},
        {"temperature": 5.0, "top_p": 0.95},
    ],
    ids=str,
)
def test_the_shortlist_gives_what_a_full_sort_gives(
    changes: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peaked and flat vocabularies, those that fit the shortlist and those that do not."""
    params = replace(PLAIN, **changes)  # type: ignore[arg-type]
    # A normal distribution without equal values, whose order would be anybody's choice.
    normal = torch.erfinv(torch.linspace(-0.9999, 0.9999, 5000))[torch.randperm(5000)]
    for spread in (0.1, 1.0, 4.0):
        logits = normal * spread / params.temperature
        filters = params.top_k, params.top_p, params.min_p
        least = sampling.least_logit(logits, 1.0, *filters)
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "_SHORTLIST", len(logits))
            assert sampling.least_logit(logits, 1.0, *filters) == least
        kept = (logits >= least).nonzero().squeeze(-1)
        assert kept.tolist() == sorted(_by_sorting(logits, params))


def _by_sorting(logits: Tensor, params: SamplingParams) -> list[int]:
    """Ids that survive the filters, in float64 over the sorted vocabulary."""
    values, ids = logits.double().sort(descending=True)
    count = params.top_k or len(values)
    probs = values[:count].softmax(dim=0)
    keep = probs >= params.min_p * probs[0]
    if params.top_p < 1.0:
        keep &= probs.cumsum(0) - probs < params.top_p
    return ids[:count][keep].tolist()


def bits(*allowed: int, size: int = 40) -> NDArray[np.int32]:
    """A mask in which only some tokens are allowed."""
    words = np.zeros(-(-size // 32), dtype=np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.view(np.int32)


def test_only_what_a_mask_allows_is_chosen() -> None:
    logits = torch.randn(3, 40)
    greedy = SamplingParams(max_tokens=9, temperature=0.0)
    hot = SamplingParams(max_tokens=9, temperature=5.0, seed=1, logit_bias=((3, 100.0),))
    stops = SamplingParams(
        max_tokens=9, temperature=0.0, min_tokens=5, stop_token_ids=frozenset({31})
    )
    masks = [bits(7, 39), bits(31, 32), bits(31)]
    rows = [
        replace(row(params), mask=mask)
        for params, mask in zip((greedy, hot, stops), masks, strict=True)
    ]
    first, second, third = sample(logits, rows)
    assert first in {7, 39}
    assert second in {31, 32}
    # A grammar that has nothing left ends the answer, however short it is.
    assert third == 31
    both: list[dict[str, Any]] = [{"allowed_token_ids": (1, 2)}, {"bad_words": ((7,), (39,))}]
    for limits in both:
        limited = replace(row(replace(greedy, **limits)), mask=bits(7, 39))
        assert sample(logits.clone(), [limited])[0] in {7, 39}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.97, 1.0])
def test_masks_of_any_kind_forbid_what_they_do_not_name(share: float) -> None:
    """Vocabularies need not fill the last word, whose bits beyond mean nothing."""
    rng, vocab = np.random.default_rng(3), 1003
    greedy = SamplingParams(max_tokens=9, temperature=0.0)
    for _ in range(20):
        allowed = {*np.flatnonzero(rng.random(vocab) < share).tolist(), 5}
        mask = bits(*allowed, *range(vocab, 1024), size=1024)
        logits = torch.from_numpy(rng.standard_normal((1, vocab)).astype(np.float32))
        expected = max(allowed, key=lambda token: float(logits[0, token]))
        assert sample(logits, [replace(row(greedy), mask=mask)]) == [expected]
        assert set(logits[0].isfinite().nonzero().squeeze(-1).tolist()) == allowed


def test_only_allowed_tokens_come_and_no_bad_words() -> None:
    logits = torch.zeros(1, 40)
    logits[0, 5], logits[0, 6], logits[0, 7] = 9.0, 8.0, 7.0
    greedy = SamplingParams(max_tokens=9, temperature=0.0)

    def chosen(*tokens: int, **limits: Any) -> int:
        return sample(logits.clone(), [row(replace(greedy, **limits), tokens=tokens)])[0]

    assert chosen(0, allowed_token_ids=(6, 7)) == 6
    assert chosen(0, bad_words=((5,),)) == 6
    assert chosen(0, 3, 5, bad_words=((3, 5),)) == 5
    assert chosen(0, 5, 3, bad_words=((3, 5),)) == 6
    assert chosen(0, 3, bad_words=((0, 3, 5), (6,))) == 7
    assert chosen(0, bad_words=((5,),), allowed_token_ids=(5, 7)) == 7


def test_log_probabilities_are_those_before_any_change() -> None:
    logits = torch.randn(2, 40)
    before = logits.log_softmax(-1)
    biased = SamplingParams(max_tokens=9, temperature=0.0, logit_bias=((5, 100.0),), logprobs=3)
    plain = SamplingParams(max_tokens=9, temperature=0.0)
    (token, other), (found, none) = sample_with_logprobs(logits.clone(), [row(biased), row(plain)])
    assert token == 5
    assert none is None
    assert found is not None
    assert found.logprob == pytest.approx(float(before[0, 5]))
    assert found.rank == int((before[0] > before[0, 5]).sum()) + 1
    best = before[0].topk(3)
    assert [place for place, _ in found.top] == best.indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(best.values.tolist())
    assert other == int(logits[1].argmax())
    assert sample_with_logprobs(logits.clone(), [row(plain)] * 2)[1] == ()
