"""Random choice of tokens on the device, each sequence by its own parameters.

Nothing is sorted: top_k and top_p come down to one value that logits must reach, which is found by
bisection; the draw then walks the kept tokens in the order of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from offramp.kernels.active_rows import ActiveRows
from offramp.kernels.backend import jit, next_power_of_2, tl, uses_triton
from offramp.kernels.native import library
from offramp.kernels.native_structures import Choice

_TILE = 8192
"""Tokens a program looks at in one go: a row has one program, which has to read fast."""
_TILE_PER_WARP = 512
"""Tokens of a tile that one warp takes."""
_COLDEST = 1e-30
"""Far below it fp32 has no number for a temperature, and all below it are greedy anyway."""
_SHORTLIST = 512
"""A nucleus almost always lies among the best few hundred tokens; finding those is 20 times cheaper
than sorting a whole vocabulary, and the rare row that needs more gets it."""
_MASK64 = (1 << 64) - 1


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
    """How the token of a row is drawn: see `sample_rows`, and `uniform` for ``draw``."""

    row: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    draw: float


def draw_tokens(logits: Tensor, draws: Sequence[TokenDraw], *, native: bool) -> list[int]:
    """A token of ``logits`` [n, vocab] (fp32) for each of ``draws``.

    ``native``: by the C kernels, which round weights to fp32, where there are any.
    """
    found = library() if native else None
    if found is None:
        return [
            draw_token(logits[row], temperature, top_k, top_p, min_p, draw)
            for row, temperature, top_k, top_p, min_p, draw in draws
        ]
    choices = [
        Choice(draw, temperature, top_p, min_p, top_k, row)
        for row, temperature, top_k, top_p, min_p, draw in draws
    ]
    return found.sample(logits, choices)


def uniform(seed: int, index: int) -> float:
    """The ``index``-th draw in [0, 1) of stream ``seed``: SplitMix64, stateless.

    (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.)
    """
    x = (seed * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return ((x ^ (x >> 31)) >> 11) / float(1 << 53)


def draw_token(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, draw: float
) -> int:
    """Token of one row of ``logits`` [vocab] for ``draw`` in [0, 1); see `sample_rows` for filters.

    The mass of the kept tokens is summed in the order of the vocabulary, so that every sampler here
    gives the same token for the same draw.
    """
    ids, weights = kept_weights(logits, temperature, top_k, top_p, min_p)
    mass = weights.cumsum(dim=0)
    place = int(torch.searchsorted(mass, mass[-1] * draw, right=True))
    # Rounded sums may end just short of the draw: then it is the last token with any weight.
    place = place if place < len(mass) else int(weights.nonzero()[-1])
    return place if ids is None else int(ids[place])


def kept_weights(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor | None, Tensor]:
    """Ids [n] (ascending; None: all) and float64 weights [n] of what the filters keep.

    The best of ``logits`` [vocab] has weight 1.
    """
    ids = None
    if 0 < top_k < len(logits):
        ids = (logits >= logits.topk(top_k).values[-1]).nonzero().squeeze(-1)
        logits = logits[ids]
    temperature = max(temperature, _COLDEST)
    # The best weight is 1, so that a tiny temperature makes the others 0, never NaN.
    weights = ((logits.double() - logits.max()) / temperature).exp()
    least = min(min_p, 1.0)
    if top_p < 1:
        least = max(least, _least_of_nucleus(logits, weights, temperature, top_p))
    if least > 0:
        kept = (weights >= least).nonzero().squeeze(-1)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def _least_of_nucleus(logits: Tensor, weights: Tensor, temperature: float, top_p: float) -> float:
    """The weight of the last token that is needed for ``top_p`` of the mass, best first."""
    target = weights.sum() * top_p
    for count in (min(_SHORTLIST, len(weights)), len(weights)):
        ranked = logits.topk(count).values.double()
        best = ((ranked - ranked[0]) / temperature).exp()
        mass = best.cumsum(dim=0)
        if mass[-1] >= target:
            return float(best[torch.searchsorted(mass, target)])
    return float(best[-1])


def sample_rows_reference(
    logits: Tensor, seqs: ActiveRows, table: SamplingTable, index: Tensor, tokens: Tensor
) -> None:
    """See `sample_rows`; one row after another."""
    for row, seq in enumerate(seqs.chosen.tolist()):
        if float(table.temperature[seq]) > 0:
            tokens[row] = draw_token(
                logits[row],
                float(table.temperature[seq]),
                int(table.top_k[seq]),
                float(table.top_p[seq]),
                float(table.min_p[seq]),
                uniform(int(table.seed[seq]), int(index[seq])),
            )


def sample_rows(
    logits: Tensor, seqs: ActiveRows, table: SamplingTable, index: Tensor, tokens: Tensor
) -> None:
    """Draw ``tokens`` (int64 [n]) for those rows of ``logits`` (fp32 [n, vocab]) that are random.

    Row j, dense and with a finite logit, belongs to sequence ``seqs.rows[j]``; rows behind the
    count and those whose sequence has temperature 0 keep the token that is there. ``index`` (int32
    or int64 [sequences]) counts the answer's tokens and picks the draw. The filters work one after
    another on what the one before left: top_k keeps the k best and what equals the last of them,
    top_p (Holtzman et al. 2020, arXiv 1904.09751) every token for which the mass above it is below
    top_p, min_p (arXiv 2407.01082) those at least min_p times as likely as the best. The best
    always stays.

    The launch gives every row one program; rows that are not random return at once. It reads the
    vocabulary three times; top_k and top_p add one time for each step of their bisection, top_p
    one more.
    """
    if not uses_triton(logits.device):
        sample_rows_reference(logits, seqs, table, index, tokens)
        return
    rows, vocab = logits.shape
    tile = min(_TILE, next_power_of_2(vocab))
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
        vocab,
        logits.stride(0),
        coldest=_COLDEST,
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
    vocab: tl.tensor,
    logits_row: tl.tensor,
    coldest: tl.constexpr,
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
    draw = _uniform(tl.load(seeds + seq), tl.load(index + seq))
    token = _draw(line, vocab, least, best, temperature, draw, tile=tile)
    # Without a finite logit there is nothing to draw.
    tl.store(tokens + row, token.to(tl.int64), mask=token >= 0)


@jit
def _uniform(seed: tl.tensor, index: tl.tensor) -> tl.tensor:
    """See `uniform`; bit for bit, fp64."""
    x = seed.to(tl.uint64) * 0xD1342543DE82EF95 + (index.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    # Numbers of 53 bits and their products with a power of two are exact.
    return ((x ^ (x >> 31)) >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


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
def _draw(
    line: tl.tensor,
    vocab: tl.tensor,
    least: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    draw: tl.tensor,
    tile: tl.constexpr,
) -> tl.tensor:
    """The first token with which the mass exceeds ``draw`` times the whole; -1 if there is none."""
    total = draw * 0.0
    for start in range(0, vocab, tile):
        value = _tile_of(line, vocab, start, tile=tile)
        total += tl.sum(_weights(value, least, best, temperature), axis=0).to(tl.float64)
    goal = total * draw
    before = total * 0.0
    begin = 0
    weights = _weights(_tile_of(line, vocab, begin, tile=tile), least, best, temperature)
    mass = tl.sum(weights, axis=0).to(tl.float64)
    while (before + mass <= goal) & (begin + tile < vocab):
        before += mass
        begin += tile
        weights = _weights(_tile_of(line, vocab, begin, tile=tile), least, best, temperature)
        mass = tl.sum(weights, axis=0).to(tl.float64)
    here = begin + tl.arange(0, tile)
    possible = weights > 0.0
    passed = possible & (tl.cumsum(weights, axis=0) > (goal - before).to(tl.float32))
    first = tl.min(tl.where(passed, here, 0x7FFFFFFF), axis=0)
    # Rounded differently, the running sum may end just short of the goal.
    last = tl.max(tl.where(possible, here, -1), axis=0)
    return tl.minimum(first, last)
