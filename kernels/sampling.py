"""Random choice of tokens on the device, each sequence by its own parameters.

A random token is the one of the largest key, its logit over the temperature plus Gumbel noise.
Nothing is sorted: top_k and top_p come down to one value that logits must reach, which is found by
bisection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from offramp.kernels.active_rows import ActiveRows
from offramp.kernels.backend import jit, next_power_of_2, tl, uses_triton
from offramp.kernels.device_noise import gumbel, random_words, words_of
from offramp.kernels.native import library
from offramp.kernels.native_structures import Choice
from offramp.kernels.noise import COLDEST, TokenNoise, signed

_TILE = 8192
"""Tokens a program looks at in one go: a row has one program, which has to read fast."""
_TILE_PER_WARP = 512
"""Tokens of a tile that one warp takes."""
_SET = 32
"""Tokens whose noise comes from the same random words, halves of the first and of the second."""
_SHORTLIST = 512
"""A nucleus almost always lies among the best few hundred tokens; finding those is 20 times cheaper
than sorting a whole vocabulary, and the rare row that needs more gets it."""
_RANGE = 25.5
"""Noise is between -2.9 and 22.2."""


@dataclass(frozen=True, slots=True)
class SamplingTable:
    """How each sequence's tokens are chosen, tensors [sequences].

    ``temperature`` (fp32; 0: greedy), ``top_k`` (int32; 0: off), ``top_p`` (fp32; 1: off),
    ``min_p`` (fp32; 0: off) and ``seed`` (int64, taken modulo 2^64).
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor

    @classmethod
    def greedy(cls, seqs: int, device: torch.device | str) -> SamplingTable:
        """Every sequence greedy, every filter off."""
        return cls(
            torch.zeros(seqs, dtype=torch.float32, device=device),
            torch.zeros(seqs, dtype=torch.int32, device=device),
            torch.ones(seqs, dtype=torch.float32, device=device),
            torch.zeros(seqs, dtype=torch.float32, device=device),
            torch.zeros(seqs, dtype=torch.int64, device=device),
        )


class TokenDraw(NamedTuple):
    """How the token of a row is drawn: see `sample_rows`."""

    row: int
    noise: TokenNoise
    top_k: int
    top_p: float
    min_p: float


def draw_tokens(
    logits: Tensor, draws: Sequence[TokenDraw], ids: Tensor | None = None, *, native: bool
) -> list[int]:
    """Places of tokens of ``logits`` [n, vocab] (fp32), one for each of ``draws``.

    ``ids`` (int64 [vocab]) are the token ids if the places are not. ``native``: by the C kernels,
    which round to fp32, where there are any; they know no ids.
    """
    if not draws:
        return []
    if uses_triton(logits.device):
        return _draw_rows(logits, draws, ids)
    found = library() if native and ids is None else None
    if found is None:
        return [
            draw_token(logits[row], noise, top_k, top_p, min_p, ids)
            for row, noise, top_k, top_p, min_p in draws
        ]
    choices = [
        Choice(noise.native(), top_p, min_p, top_k, row)
        for row, noise, top_k, top_p, min_p in draws
    ]
    return found.sample(logits, choices)


def _draw_rows(logits: Tensor, draws: Sequence[TokenDraw], ids: Tensor | None) -> list[int]:
    """By `sample_rows`, all at once."""
    device, count = logits.device, len(draws)
    rows = logits[torch.tensor([draw.row for draw in draws], device=device)]
    every = torch.arange(count, dtype=torch.int32, device=device)
    temperatures = [max(draw.noise.temperature, COLDEST) for draw in draws]
    table = SamplingTable(
        torch.tensor(temperatures, dtype=torch.float32, device=device),
        torch.tensor([draw.top_k for draw in draws], dtype=torch.int32, device=device),
        torch.tensor([draw.top_p for draw in draws], dtype=torch.float32, device=device),
        torch.tensor([draw.min_p for draw in draws], dtype=torch.float32, device=device),
        torch.tensor([signed(draw.noise.seed, 64) for draw in draws], device=device),
    )
    index = torch.tensor([draw.noise.index for draw in draws], device=device)
    tokens = torch.zeros(count, dtype=torch.int64, device=device)
    sample_rows(rows, ActiveRows(every, every[-1:] + 1), table, index, tokens, ids)
    found: list[int] = tokens.tolist()
    return found


def draw_token(
    logits: Tensor,
    noise: TokenNoise,
    top_k: int,
    top_p: float,
    min_p: float,
    ids: Tensor | None = None,
) -> int:
    """Place of the token of one row of ``logits`` [vocab], its filters as in `sample_rows`.

    ``ids`` (int64 [vocab]) are the token ids if the places are not.
    """
    temperature = max(noise.temperature, COLDEST)
    least = least_logit(logits, temperature, top_k, top_p, min_p)
    # Noise cannot make up for more than its own range.
    least = max(least, float(logits.max()) - temperature * _RANGE)
    places = (logits >= least).nonzero().squeeze(-1)
    if not len(places):
        return int(logits.argmax())
    keys = noise.keys(logits[places], places if ids is None else ids[places])
    return int(places[keys.argmax()])


def least_logit(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> float:
    """What those of ``logits`` [vocab] reach that the filters keep."""
    least, best = -math.inf, float(logits.max())
    if 0 < top_k < len(logits):
        least = float(logits.topk(top_k).values[-1])
    if top_p < 1:
        kept = logits[logits >= least]
        # The best weight is 1, so that a tiny temperature makes the others 0, never NaN.
        weights = ((kept.double() - best) / temperature).exp()
        least = max(least, _least_of_nucleus(kept, weights, temperature, top_p))
    if min_p > 0:
        least = max(least, best + temperature * math.log(min(min_p, 1.0)))
    return least


def _least_of_nucleus(logits: Tensor, weights: Tensor, temperature: float, top_p: float) -> float:
    """The logit of the last token that is needed for ``top_p`` of the mass, best first."""
    target = weights.sum() * top_p
    for count in (min(_SHORTLIST, len(weights)), len(weights)):
        ranked = logits.topk(count).values
        mass = ((ranked.double() - ranked[0]) / temperature).exp().cumsum(dim=0)
        if mass[-1] >= target:
            return float(ranked[torch.searchsorted(mass, target)])
    return float(ranked[-1])


def sample_rows_reference(
    logits: Tensor,
    seqs: ActiveRows,
    table: SamplingTable,
    index: Tensor,
    tokens: Tensor,
    ids: Tensor | None = None,
) -> None:
    """See `sample_rows`; one row after another."""
    for row, seq in enumerate(seqs.chosen.tolist()):
        if float(table.temperature[seq]) > 0:
            seed, temperature = int(table.seed[seq]), float(table.temperature[seq])
            tokens[row] = draw_token(
                logits[row],
                TokenNoise(temperature, seed, int(index[seq])),
                int(table.top_k[seq]),
                float(table.top_p[seq]),
                float(table.min_p[seq]),
                ids,
            )


def sample_rows(
    logits: Tensor,
    seqs: ActiveRows,
    table: SamplingTable,
    index: Tensor,
    tokens: Tensor,
    ids: Tensor | None = None,
) -> None:
    """Draw ``tokens`` (int64 [n]) for those rows of ``logits`` (fp32 [n, vocab]) that are random.

    Row j, dense and with a finite logit, belongs to sequence ``seqs.rows[j]``; rows behind the
    count and those whose sequence has temperature 0 keep the token that is there. ``index`` (int32
    or int64 [sequences]) counts the answer's tokens; with the seed and the token ids, which are the
    places in a row or those of ``ids`` (int64 [vocab]), it picks the noise (see `gumbel`).
    ``tokens`` are places. The filters work one after another on what the one before left: top_k
    keeps the k best and what equals the last of them, top_p (Holtzman et al. 2020, arXiv
    1904.09751) every token for which the mass above it is below top_p, min_p (arXiv 2407.01082)
    those at least min_p times as likely as the best. The best always stays.

    The launch gives every row one program; rows that are not random return at once. It reads the
    vocabulary twice; top_k and top_p add one time for each step of their bisection, top_p one more.
    """
    if not uses_triton(logits.device):
        sample_rows_reference(logits, seqs, table, index, tokens, ids)
        return
    rows, vocab = logits.shape
    tile = min(_TILE, max(_SET, next_power_of_2(vocab)))
    _sample[(rows,)](
        logits,
        seqs.rows,
        seqs.count,
        table.temperature,
        table.top_k,
        table.top_p,
        table.min_p,
        table.seed,
        index,
        tokens,
        # A pointer that is not followed without ids.
        tokens if ids is None else ids,
        vocab,
        logits.stride(0),
        coldest=COLDEST,
        has_ids=ids is not None,
        tile=tile,
        num_warps=max(1, tile // _TILE_PER_WARP),
    )


@jit
def _sample(
    logits: tl.tensor,
    seqs: tl.tensor,
    count: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    min_ps: tl.tensor,
    seeds: tl.tensor,
    index: tl.tensor,
    tokens: tl.tensor,
    ids: tl.tensor,
    vocab: tl.tensor,
    logits_row: tl.tensor,
    coldest: tl.constexpr,
    has_ids: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(count):
        return
    seq = tl.load(seqs + row)
    temperature = tl.load(temperatures + seq)
    if temperature <= 0.0:
        return
    temperature = tl.maximum(temperature, coldest)
    line = logits + row * logits_row
    best = _best(line, vocab, tile=tile)
    least = best - float("inf")
    top_k = tl.load(top_ks + seq)
    if top_k > 0:
        least = _bisect(line, vocab, best, temperature, least, top_k, counting=True, tile=tile)
    top_p = tl.load(top_ps + seq)
    if top_p < 1.0:
        mass = _measure(line, vocab, least, best, temperature, counting=False, tile=tile)[1]
        target = mass * top_p
        least = _bisect(line, vocab, best, temperature, least, target, counting=False, tile=tile)
    min_p = tl.load(min_ps + seq)
    if min_p > 0.0:
        least = tl.maximum(least, tl.minimum(best, best + temperature * tl.log(min_p)))
    seed, place = tl.load(seeds + seq), tl.load(index + seq)
    token = _noisiest(line, ids, vocab, least, temperature, seed, place, has_ids=has_ids, tile=tile)
    # Without a finite logit there is nothing to draw.
    tl.store(tokens + row, token.to(tl.int64), mask=token >= 0)


@jit
def _tile_of(line: tl.tensor, vocab: tl.tensor, start: tl.tensor, tile: tl.constexpr) -> tl.tensor:
    """Logits [tile] of a row from token ``start``; -inf behind the vocabulary."""
    here = start + tl.arange(0, tile)
    return tl.load(line + here, mask=here < vocab, other=float("-inf")).to(tl.float32)


@jit
def _weights(
    value: tl.tensor, least: tl.tensor, best: tl.tensor, temperature: tl.tensor
) -> tl.tensor:
    """Weights of logits, 1 for the best and 0 for those below ``least``."""
    return tl.where(value >= least, tl.exp((value - best) / temperature), 0.0)


@jit
def _best(line: tl.tensor, vocab: tl.tensor, tile: tl.constexpr) -> tl.tensor:
    """The highest logit."""
    top = tl.full([tile], float("-inf"), tl.float32)
    for start in range(0, vocab, tile):
        top = tl.maximum(top, _tile_of(line, vocab, start, tile=tile))
    return tl.max(top, axis=0)


@jit
def _measure(
    line: tl.tensor,
    vocab: tl.tensor,
    least: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    counting: tl.constexpr,
    tile: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """How many logits reach ``least``, and their weight unless it is only about ``counting``."""
    number = tl.zeros([tile], tl.int32)
    mass = tl.zeros([tile], tl.float32)
    for start in range(0, vocab, tile):
        value = _tile_of(line, vocab, start, tile=tile)
        number += (value >= least).to(tl.int32)
        if not counting:
            mass += _weights(value, least, best, temperature)
    return tl.sum(number, axis=0), tl.sum(mass, axis=0)


@jit
def _bisect(
    line: tl.tensor,
    vocab: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    least: tl.tensor,
    target: tl.tensor,
    counting: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """The highest value whose tokens, all that reach it, come to ``target``; at least ``least``.

    The values lie between two places in the order of all fp32 numbers, fewer than 2^32, so at most
    32 halvings leave one. It ends earlier, with a value that splits the tokens alike, when only one
    token is between a set that comes to the target (of ``reached`` tokens) and one that does not
    (of ``missed``). Rounded sums of nested sets are in order too, as each addition is monotone.
    """
    low = _place(least).to(tl.int64)
    high = _place(best).to(tl.int64) + 1
    reached = vocab
    # Fewer than k tokens are never enough.
    missed = target - 1 if counting else vocab * 0
    while (high - low > 1) & (reached - missed > 1):
        middle = (low + high) >> 1
        number, mass = _measure(
            line, vocab, _value(middle), best, temperature, counting=counting, tile=tile
        )
        enough = number >= target if counting else mass >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        reached = tl.where(enough, number, reached)
        missed = tl.where(enough, missed, tl.maximum(missed, number))
    return _value(low)


@jit
def _place(value: tl.tensor) -> tl.tensor:
    """Where an fp32 number stands in the order of all, int32: negative ones are stored reversed."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _value(place: tl.tensor) -> tl.tensor:
    """The fp32 number at a place; see `_place`, which undoes itself."""
    bits = place.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _noisiest(
    line: tl.tensor,
    ids: tl.tensor,
    vocab: tl.tensor,
    least: tl.tensor,
    temperature: tl.tensor,
    seed: tl.tensor,
    index: tl.tensor,
    has_ids: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """The place of the largest key of logits that reach ``least``; -1 if there is none."""
    half = tl.arange(0, tile // 2)
    top = tl.full([tile // 2], float("-inf"), tl.float32)
    place = tl.full([tile // 2], 0x7FFFFFFF, tl.int32)
    step: tl.constexpr = tile // 2 if has_ids else tile
    for start in range(0, vocab, step):
        if has_ids:
            at = start + half
            words = words_of(seed, index, tl.load(ids + at, mask=at < vocab, other=0))
        else:
            at = start + half // 16 * 32 + half % 16
            words, second = random_words(seed, index, start // 2 + half)
        key = _keys(line, vocab, at, least, temperature, words)
        place = tl.where(key > top, at, place)
        top = tl.maximum(key, top)
        if not has_ids:
            key = _keys(line, vocab, at + 16, least, temperature, second)
            place = tl.where(key > top, at + 16, place)
            top = tl.maximum(key, top)
    best = tl.max(top, axis=0)
    found = tl.min(tl.where(top == best, place, 0x7FFFFFFF), axis=0)
    return tl.where(best > float("-inf"), found, -1)


@jit
def _keys(
    line: tl.tensor,
    vocab: tl.tensor,
    at: tl.tensor,
    least: tl.tensor,
    temperature: tl.tensor,
    words: tl.tensor,
) -> tl.tensor:
    """Keys of the logits ``at`` some places; -inf for those below ``least``."""
    value = tl.load(line + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(value >= least, value / temperature + gumbel(words), float("-inf"))
