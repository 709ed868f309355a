"""Random choice on the device: the reference against plain formulas, the kernel against it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.kernels.active_rows import ActiveRows
from offramp.kernels.backend import INTERPRETED, jit, rehearsal, tl, triton
from offramp.kernels.device_noise import gumbel as device_gumbel
from offramp.kernels.device_noise import random_words as device_words
from offramp.kernels.device_noise import words_of
from offramp.kernels.noise import TokenNoise, gumbel, random_words
from offramp.kernels.sampling import (
    SamplingTable,
    TokenDraw,
    draw_tokens,
    sample_rows,
)
from tests.kernels.compiler import SHARED_BYTES, TARGETS, Compiler
from tests.kernels.conftest import DEVICE

pytestmark = pytest.mark.usefixtures("on_device")
interpreted = pytest.mark.skipif(triton is None or not INTERPRETED, reason="no interpreter")
either = pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=interpreted)])
LOGITS = [1.2, -0.3, 0.0, 2.1, 1.1, -2.0, 0.4, float("-inf"), 1.9, 1.1, -0.0]
NEAR, NEAR_KEYS = 1e-5, 1e-4
"""Masses so close to a boundary, and keys to one another, may be rounded to the other side."""
SEEDS = [0, 1, -1, -5, 12345, 2**31, 2**32 + 7, -(2**40), 2**63 - 1, 2**63, 2**64 - 1]


def table(seqs: int, **values: Any) -> SamplingTable:
    """A table with the same, or each its own, values; temperature 1 unless told."""
    made = SamplingTable.greedy(seqs, DEVICE)
    for name, value in ({"temperature": 1.0} | values).items():
        getattr(made, name).copy_(torch.as_tensor(value))
    return made


def listed(rows: Sequence[int], count: int | None = None) -> ActiveRows:
    number = len(rows) if count is None else count
    return ActiveRows(
        torch.tensor(rows, dtype=torch.int32), torch.tensor([number], dtype=torch.int32)
    )


def sampled(
    logits: Tensor,
    seqs: ActiveRows,
    parameters: SamplingTable,
    index: Tensor,
    ids: Tensor | None = None,
    *,
    kernel: bool,
) -> list[int]:
    """Tokens where there were minus ones."""
    tokens = torch.full((len(logits),), -1)
    if kernel:
        with rehearsal():
            sample_rows(logits, seqs, parameters, index, tokens, ids)
    else:
        sample_rows(logits, seqs, parameters, index, tokens, ids)
    return tokens.tolist()


def distribution(
    logits: Sequence[float],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> dict[int, float]:
    """Probability of each token that can come, from the definitions of the filters."""
    best = max(logits)
    weights = {t: math.exp((value - best) / temperature) for t, value in enumerate(logits)}
    last = sorted(logits, reverse=True)[:top_k][-1] if top_k else -math.inf
    kept = [token for token in weights if logits[token] >= last]
    total = sum(weights[token] for token in kept)
    if top_p < 1:
        above = {t: sum(weights[u] for u in kept if logits[u] > logits[t]) for t in kept}
        kept = [token for token in kept if above[token] < top_p * total or not above[token]]
    kept = [token for token in kept if weights[token] >= min_p and weights[token] > 0]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_k": 4},
        {"top_k": 10},
        {"top_k": 100},
        {"top_p": 0.8},
        {"top_p": 0.55},
        {"top_k": 7, "top_p": 0.7},
        {"min_p": 0.25},
        {"temperature": 1.7, "top_k": 7, "top_p": 0.95, "min_p": 0.3},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"top_p": 0.0},
        {"min_p": 1.0},
    ],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(changes: dict[str, float]) -> None:
    """Chi-square over many draws; the bound is passed by chance once in about 10,000 runs.

    The kernel gets a few of the same draws.
    """
    expected = distribution(LOGITS, **changes)  # type: ignore[arg-type]
    draws = 3000
    logits = torch.tensor(LOGITS).repeat(draws, 1)
    parameters, index = table(draws, seed=11, **changes), torch.arange(draws)
    tokens = sampled(logits, listed(range(draws)), parameters, index, kernel=False)
    assert set(tokens) <= expected.keys()
    chi = sum(
        (tokens.count(token) - draws * share) ** 2 / (draws * share)
        for token, share in expected.items()
    )
    freedom = len(expected) - 1
    assert chi <= freedom + 4 * math.sqrt(2 * freedom) + 8 * (freedom > 0) + 1e-6
    if INTERPRETED and triton is not None:
        few = listed(range(draws), 8)
        assert sampled(logits, few, parameters, index, kernel=True)[:8] == tokens[:8]


@pytest.mark.parametrize(
    ("seed", "index", "counter", "words"),
    [
        (0, 0, 0, (0x6B200159, 0x99BA4EFE)),
        (-1, -1, 0xFFFFFFFF, (0x1CB996FC, 0xBB002BE7)),
        (0x0370734413198A2E, 0x85A308D3, 0x243F6A88, (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_generator_is_the_one_that_was_published(
    seed: int, index: int, counter: int, words: tuple[int, int]
) -> None:
    """Known answers of the Random123 library."""
    found = random_words(seed, index, torch.tensor([counter]))
    assert tuple(int(each) for each in found) == words


def test_noise_is_gumbels() -> None:
    """Moments of two million numbers, by index, by token and by seed."""
    ids = torch.arange(4096)
    noise = torch.stack([gumbel(seed, index, ids) for seed in range(16) for index in range(32)])
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.005)
    assert float(noise.std()) == pytest.approx(math.pi / 6**0.5, abs=0.005)
    share = (noise[:, :-1] * noise[:, 1:]).mean() - noise.mean() ** 2
    assert float(share) == pytest.approx(0, abs=0.01)
    rows = (noise[:-1] * noise[1:]).mean() - noise.mean() ** 2
    assert float(rows) == pytest.approx(0, abs=0.01)


def test_seeds_keep_the_noise_they_always_had() -> None:
    """An answer made again with its seed is the same answer in every version."""
    ids = torch.tensor([0, 17, 49151])
    found = [gumbel(seed, index, ids).tolist() for seed, index in [(0, 0), (7, 3), (-1, 12)]]
    expected = [
        [0.612359, -0.336438, 0.826244],
        [0.822046, 0.253313, 0.598655],
        [-0.549455, 0.285652, 3.286927],
    ]
    for own, known in zip(found, expected, strict=True):
        assert own == pytest.approx(known, abs=1e-5)


def _wrapped(seeds: Sequence[int]) -> Tensor:
    return torch.tensor([(seed + 2**63) % 2**64 - 2**63 for seed in seeds])


@jit
def _some_words(
    seeds: tl.tensor, indices: tl.tensor, first: tl.tensor, second: tl.tensor, any_of: tl.tensor
) -> None:
    at = tl.program_id(0)
    seed, index, places = tl.load(seeds + at), tl.load(indices + at), tl.arange(0, 32)
    a, b = device_words(seed, index, places + 5)
    tl.store(first + at * 32 + places, a.to(tl.int64))
    tl.store(second + at * 32 + places, b.to(tl.int64))
    tl.store(any_of + at * 32 + places, words_of(seed, index, places * 97).to(tl.int64))


@interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_the_kernels_words_are_the_references_bit_for_bit(dtype: torch.dtype) -> None:
    cases = [(seed, index) for seed in SEEDS for index in (0, 1, 2, 1000, 2**31 - 1)]
    indices = torch.tensor([index for _, index in cases], dtype=dtype)
    out = torch.empty(3, len(cases), 32, dtype=torch.int64)
    _some_words[(len(cases),)](_wrapped([seed for seed, _ in cases]), indices, *out)
    ids = 97 * torch.arange(32)
    for case, (seed, index) in enumerate(cases):
        assert [each.tolist() for each in random_words(seed, index, 5 + torch.arange(32))] == [
            out[0, case].tolist(),
            out[1, case].tolist(),
        ]
        first, second = random_words(seed, index, ids // 32 * 16 + ids % 16)
        expected = torch.where(ids // 16 % 2 == 0, first, second)
        assert out[2, case].tolist() == expected.tolist()


@jit
def _some_noise(words: tl.tensor, out: tl.tensor) -> None:
    at = tl.program_id(0) * 32 + tl.arange(0, 32)
    tl.store(out + at, device_gumbel(tl.load(words + at).to(tl.uint32)))


@interpreted
def test_the_kernels_noise_is_the_references() -> None:
    words = torch.cat(
        (torch.randint(2**32, (5000,)), 2 ** torch.arange(32), 2**32 - 2 ** torch.arange(32))
    )
    words = words[: len(words) // 32 * 32]
    out = torch.empty(len(words))
    _some_noise[(len(words) // 32,)](words, out)
    uniform = (((words >> 1) + 0.5) / 2**31).clamp_max(1 - 2**-24).double()
    torch.testing.assert_close(out.double(), -(-(-uniform).log1p()).log(), rtol=0, atol=1e-5)


def is_near(logits: Tensor, parameters: SamplingTable, seq: int, index: int) -> bool:
    """Whether one of a row's choices may be rounded to the other side."""
    values = logits.double()
    weights = ((values - values.max()) / float(parameters.temperature[seq])).exp()
    top_k, top_p = int(parameters.top_k[seq]), float(parameters.top_p[seq])
    min_p = float(parameters.min_p[seq])
    ranked, order = values.sort(descending=True)
    last = ranked[min(top_k, len(values)) - 1] if top_k else -math.inf
    weights = torch.where(values >= last, weights, 0.0)
    mass = weights[order].cumsum(0) / weights.sum()
    found = []
    if top_p < 1:
        found.append(float((mass - top_p).abs().min()))
        mass_above = torch.cat((torch.zeros(1), mass[:-1]))
        weights[order[mass_above >= top_p]] = 0.0
    if min_p:
        found.append(float((weights / min_p - 1).abs().min()))
        weights = torch.where(weights >= min_p, weights, 0.0)
    kept = (weights > 0).nonzero().squeeze(-1)
    keys = logits[kept].double() / parameters.temperature[seq]
    keys += gumbel(int(parameters.seed[seq]), index, kept)
    best = keys.topk(min(2, len(keys))).values
    return min(found, default=1.0) < NEAR or float(best[0] - best[-1]) < NEAR_KEYS * (len(kept) > 1)


def choices(rng: random.Random, seqs: int) -> SamplingTable:
    """Filters on and off in every combination."""
    draws = range(seqs)
    return table(
        seqs,
        temperature=[rng.choice([0.0, 0.3, 0.8, 1.0, 1.5]) for _ in draws],
        top_k=[rng.choice([0, 0, 1, 5, 40, 5000]) for _ in draws],
        top_p=[rng.choice([1.0, 1.0, 0.3, 0.9, 0.99]) for _ in draws],
        min_p=[rng.choice([0.0, 0.0, 0.02, 0.3]) for _ in draws],
        seed=[rng.getrandbits(64) - 2**63 for _ in draws],
    )


@interpreted
@pytest.mark.parametrize(
    ("rows", "vocab"), [(1, 1000), (61, 7), (41, 1000), (23, 8192), (23, 20011), (1, 49152)]
)
def test_the_kernel_is_the_reference(rows: int, vocab: int) -> None:
    rng = random.Random(rows + vocab)
    parameters = choices(rng, rows + 5)
    parameters.temperature[0] = 0.9
    seqs = [0, *rng.sample(range(1, rows + 5), rows - 1)]
    index = torch.tensor([rng.randrange(4000) for _ in range(rows + 5)])
    logits = torch.randn(rows, vocab) * torch.linspace(6, 3, rows)[:, None]
    expected = sampled(logits, listed(seqs), parameters, index, kernel=False)
    got = sampled(logits, listed(seqs), parameters, index, kernel=True)
    compared = 0
    for row, seq in enumerate(seqs):
        random_row = float(parameters.temperature[seq]) > 0
        if random_row and is_near(logits[row], parameters, seq, int(index[seq])):
            continue
        compared += 1
        assert got[row] == expected[row]
        assert (got[row] >= 0) == random_row
    assert compared >= 0.8 * rows


@interpreted
@pytest.mark.parametrize("top_k", [2, 3, 17, 18, 2600])
def test_exactly_the_best_come_through(top_k: int) -> None:
    """Values that differ in their last bit, ties at the threshold, and equals of both signs."""
    vocab, draws = 9001, 8
    row = torch.randn(vocab) - 6
    row[torch.randperm(vocab)[:2500]] = NEAR * torch.randint(0, 3, (2500,))
    row[[8, 8903]] = 0.5
    row[[4001, 77]] = torch.nextafter(torch.tensor(0.5), torch.tensor(torch.inf)).item()
    row[:9000:50] = -0.0
    logits = row.repeat(draws, 1)
    parameters, index = table(draws, temperature=9.0, top_k=top_k, seed=3), torch.arange(draws)
    expected = sampled(logits, listed(range(draws)), parameters, index, kernel=False)
    got = sampled(logits, listed(range(draws)), parameters, index, kernel=True)
    last = row.sort(descending=True).values[top_k - 1]
    assert min(row[got].tolist()) >= last
    near = [is_near(row, parameters, i, i) for i in range(draws)]
    assert [t for t, n in zip(got, near, strict=True) if not n] == [
        t for t, n in zip(expected, near, strict=True) if not n
    ]
    assert sum(near) <= 3


@either
@pytest.mark.parametrize("vocab", [10, 40000])
@pytest.mark.parametrize("changes", [{}, {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.9}], ids=str)
def test_equal_tokens_stay_together(changes: dict[str, float], vocab: int, *, kernel: bool) -> None:
    """No filter parts equals, so that noise alone says which comes, of one tile or of five."""
    best = [int(gumbel(5, index, torch.arange(vocab)).argmax()) for index in range(8)]
    parameters = table(8, seed=5, **changes)
    logits = torch.full((8, vocab), -3.25)
    tokens = sampled(logits, listed(range(8)), parameters, torch.arange(8), kernel=kernel)
    assert tokens == best


@either
@pytest.mark.parametrize("changes", [{}, {"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_what_is_impossible_never_comes(changes: dict[str, float], *, kernel: bool) -> None:
    """One possible token in the last of three tiles; top_k asks for more than there are."""
    logits = torch.full((3, 17000), float("-inf"))
    logits[0, 16999] = logits[1, 0] = logits[2, 8192] = -1e4
    tokens = sampled(
        logits, listed(range(3)), table(3, seed=1, **changes), torch.arange(3), kernel=kernel
    )
    assert tokens == [16999, 0, 8192]


@either
@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-40])
@pytest.mark.parametrize("changes", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_tiny_temperatures_are_greedy(
    temperature: float, changes: dict[str, float], *, kernel: bool
) -> None:
    """Dividing by them overflows unless it is done with care."""
    logits = torch.tensor([LOGITS]) * 20
    parameters = table(1, temperature=temperature, **changes)
    assert sampled(logits, listed([0]), parameters, torch.tensor([5]), kernel=kernel) == [3]


@either
@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_rows_behind_the_count_and_greedy_ones_are_left_alone(count: int, *, kernel: bool) -> None:
    logits = torch.full((5, 300), float("nan"))
    logits[:count] = torch.randn(count, 300)
    # Sequences behind the count are no sequences.
    seqs = ActiveRows(torch.full((5,), 2**30, dtype=torch.int32), torch.tensor([count]).int())
    seqs.rows[:count] = torch.tensor([3, 0, 2, 1, 4])[:count]
    greedy = {0, 4}
    parameters = table(5, temperature=[0.0 if seq in greedy else 1.0 for seq in range(5)])
    tokens = sampled(logits, seqs, parameters, torch.arange(5), kernel=kernel)
    drawn = [row < count and int(seqs.rows[row]) not in greedy for row in range(5)]
    assert [token != -1 for token in tokens] == drawn


@either
def test_the_draw_is_the_slots_own(*, kernel: bool) -> None:
    """A sequence gets the same token in whichever row it stands, with index of either type."""
    logits = 0.1 * torch.randn(5000).repeat(4, 1)
    parameters = table(4, temperature=2.0, seed=[7, -7, 7, 2**40])
    index = torch.tensor([3, 3, 4, 3])
    ahead = sampled(logits, listed([0, 1, 2, 3]), parameters, index, kernel=kernel)
    back = sampled(logits, listed([3, 2, 1, 0]), parameters, index.int(), kernel=kernel)
    assert ahead == back[::-1]
    assert len(set(ahead)) == 4


@interpreted
def test_rows_may_lie_apart() -> None:
    wide = torch.full((4, 900), float("nan"))
    logits = wide[:, :700]
    logits.copy_(torch.randn(4, 700) * 5)
    case = (listed(range(4)), table(4, top_p=0.9), torch.arange(4))
    assert sampled(logits, *case, kernel=True) == sampled(logits, *case, kernel=False)


@either
@pytest.mark.parametrize("changes", [{}, {"top_k": 40}], ids=str)
def test_noise_is_that_of_the_token_wherever_it_stands(
    changes: dict[str, float], *, kernel: bool
) -> None:
    """Of a part of the vocabulary comes what comes of the whole, if the rest is impossible."""
    ids = torch.randperm(3000)[:900].sort().values
    logits = torch.full((6, 3000), float("-inf"))
    logits[:, ids] = torch.randn(6, 900)
    case = listed(range(6)), table(6, seed=9, **changes), torch.arange(6)
    whole = sampled(logits, *case, kernel=kernel)
    part = sampled(logits[:, ids].contiguous(), *case, ids, kernel=kernel)
    assert ids[part].tolist() == whole
    assert len(set(whole)) > 1


@interpreted
@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_rows_of_a_step_are_drawn_by_the_kernel_all_at_once(*, part: bool) -> None:
    logits = 3 * torch.randn(5, 600)
    ids = torch.randperm(5000)[:600].sort().values if part else None
    filters = [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1)]
    draws = [
        TokenDraw(row, TokenNoise(temperature, 2**63 + row, 3), *each)
        for row in (4, 0, 2, 2, 3)
        for temperature in (0.7, 1e-60)
        for each in filters
    ]
    expected = draw_tokens(logits, draws, ids, native=False)
    with rehearsal():
        found = draw_tokens(logits, draws, ids, native=False)
    assert found == expected
    assert all(0 <= token < 600 for token in found)


def test_a_new_table_is_greedy() -> None:
    logits, fresh = torch.randn(3, 50), SamplingTable.greedy(3, DEVICE)
    assert sampled(logits, listed([0, 1, 2]), fresh, torch.zeros(3), kernel=False) == [-1] * 3


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("index", ["i32", "i64"])
@pytest.mark.parametrize("divisible", [(), ("vocab", "logits_row")], ids=["odd", "even"])
@pytest.mark.parametrize(("tile", "warps"), [(32, 1), (1024, 2), (8192, 16)])
@pytest.mark.parametrize("has_ids", [False, True], ids=["whole", "part"])
def test_sampling_compiles(
    compile_ahead: Compiler,
    target: int,
    has_ids: bool,  # noqa: FBT001
    index: str,
    tile: int,
    warps: int,
    divisible: tuple[str, ...],
) -> None:
    types = {"logits": "*fp32", "seqs": "*i32", "count": "*i32", "temperatures": "*fp32"}
    types |= {"top_ks": "*i32", "top_ps": "*fp32", "min_ps": "*fp32", "seeds": "*i64"}
    types |= {"index": f"*{index}", "tokens": "*i64", "ids": "*i64"}
    types |= {"vocab": "i32", "logits_row": "i32"}
    sizes: dict[str, Any] = {"tile": tile, "coldest": 1e-30, "has_ids": has_ids}
    made = compile_ahead(
        "sampling", "_sample", target, types, warps=warps, divisible=divisible, **sizes
    )
    assert made.shared_bytes <= SHARED_BYTES[target]
    assert made.spills == 0
