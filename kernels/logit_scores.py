"""What exits and the greedy sampler want to know of logits, in one pass and without a softmax.

Every lane keeps its own running maximum, runner-up and sums, rescaled as the maximum rises (online
softmax, Milakov and Gimelshein 2018, arXiv 1805.02867). A row's vocabulary is cut into parts, so
that a single row keeps a GPU busy; a second kernel puts the parts together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.backend import jit, next_power_of_2, tl, uses_triton

_TILE = 1024
"""Tokens a program looks at in one go."""
_ENOUGH_PROGRAMS = 2048
"""Programs that fill a large GPU although most rows may lie behind the count."""


@dataclass(frozen=True, slots=True)
class LogitScores:
    """One value a row, in tensors the caller owns.

    ``token`` int64 [n] is the best one, the lowest id among equals; ``top`` [n] its probability,
    ``gap`` [n] how far the second best lies below, ``entropy`` [n] in nats, all fp32.
    """

    token: Tensor
    top: Tensor
    gap: Tensor
    entropy: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device | str) -> LogitScores:
        """Room for ``rows`` rows; what is in it means nothing yet."""
        token = torch.empty(rows, dtype=torch.int64, device=device)
        top, gap, entropy = (
            torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3)
        )
        return cls(token, top, gap, entropy)


def score_logits_reference(logits: Tensor, count: Tensor, out: LogitScores) -> None:
    """See `score_logits`; waits for the device to learn the count."""
    rows = int(count)
    values = logits[:rows].float()
    probs = values.softmax(dim=-1)
    best = probs.topk(2, dim=-1).values
    out.token[:rows] = values.argmax(dim=-1)
    out.top[:rows] = best[:, 0]
    out.gap[:rows] = best[:, 0] - best[:, 1]
    out.entropy[:rows] = torch.special.entr(probs).sum(dim=-1)


def score_logits(logits: Tensor, count: Tensor, out: LogitScores) -> None:
    """Score the first ``count`` (int32 [1], on the device) rows of ``logits`` [n, vocab].

    Logits are fp32, bf16 or fp16 in dense rows, at least two a row, one of them finite and none
    +inf or NaN; -inf is a token that cannot come. Rows of ``out`` [n] behind the count stay as
    they are. See `LogitScores` for what is computed; sums are fp32.
    """
    if not uses_triton(logits.device):
        score_logits_reference(logits, count, out)
        return
    rows, vocab = logits.shape
    parts = _parts(rows, vocab)
    tokens = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    sums = torch.empty(4, rows, parts, dtype=torch.float32, device=logits.device)
    _score[(rows, parts)](
        logits,
        count,
        tokens,
        *sums,
        vocab,
        logits.stride(0),
        parts=parts,
        tile=min(_TILE, next_power_of_2(vocab)),
    )
    _join[(rows,)](
        count, tokens, *sums, out.token, out.top, out.gap, out.entropy, parts=parts, num_warps=1
    )


def _parts(rows: int, vocab: int) -> int:
    """Parts of a vocabulary, a power of two; from what is known when a graph is captured."""
    wanted = min(_ENOUGH_PROGRAMS // max(rows, 1), vocab // _TILE)
    return 1 << max(0, wanted.bit_length() - 1)


@jit
def _score(
    logits: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    tops: tl.tensor,
    seconds: tl.tensor,
    weights: tl.tensor,
    moments: tl.tensor,
    vocab: tl.tensor,
    logits_row: tl.tensor,
    parts: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """One part of one row.

    With d the distances below the top, the weight is sum exp(-d) and the moment sum -d exp(-d).
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if row >= tl.load(count):
        return
    size = tl.cdiv(tl.cdiv(vocab, parts), tile) * tile
    first = part * size
    lane = tl.arange(0, tile)
    token = first + lane
    # The lowest finite number: with -inf a distance could be inf - inf.
    top = tl.full([tile], -3.4028234663852886e38, tl.float32)
    second = top
    weight = tl.zeros([tile], tl.float32)
    moment = tl.zeros([tile], tl.float32)
    for start in range(first, tl.minimum(first + size, vocab), tile):
        here = start + lane
        at = logits + row * logits_row + here
        value = tl.load(at, mask=here < vocab, other=float("-inf")).to(tl.float32)
        rises = value > top
        distance, fade = _fade(tl.abs(value - top))
        moment = tl.where(rises, (moment - distance * weight) * fade, moment - distance * fade)
        weight = tl.where(rises, weight * fade + 1.0, weight + fade)
        second = tl.maximum(second, tl.minimum(top, value))
        token = tl.where(rises, here, token)
        top = tl.maximum(top, value)
    token, top, second, weight, moment = _reduce(token, top, second, weight, moment)
    out_at = row * parts + part
    tl.store(tokens + out_at, token)
    tl.store(tops + out_at, top)
    tl.store(seconds + out_at, second)
    tl.store(weights + out_at, weight)
    tl.store(moments + out_at, moment)


@jit
def _join(
    count: tl.tensor,
    tokens: tl.tensor,
    tops: tl.tensor,
    seconds: tl.tensor,
    weights: tl.tensor,
    moments: tl.tensor,
    best: tl.tensor,
    top_probability: tl.tensor,
    gap: tl.tensor,
    entropy: tl.tensor,
    parts: tl.constexpr,
) -> None:
    """Put the parts of one row together."""
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(count):
        return
    out_at = row * parts + tl.arange(0, parts)
    token, top, second, weight, moment = _reduce(
        tl.load(tokens + out_at),
        tl.load(tops + out_at),
        tl.load(seconds + out_at),
        tl.load(weights + out_at),
        tl.load(moments + out_at),
    )
    fade = _fade(top - second)[1]
    tl.store(best + row, token.to(tl.int64))
    tl.store(top_probability + row, 1.0 / weight)
    tl.store(gap + row, (1.0 - fade) / weight)
    tl.store(entropy + row, tl.log(weight) - moment / weight)


@jit
def _reduce(
    token: tl.tensor, top: tl.tensor, second: tl.tensor, weight: tl.tensor, moment: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Lanes, or parts, made one; each saw other tokens."""
    best = tl.max(top, axis=0)
    winner = tl.min(tl.where(top == best, token, 0x7FFFFFFF), axis=0)
    # The runner-up is the best of another lane, or the second of the winner's own.
    runner_up = tl.max(tl.where(token == winner, second, top), axis=0)
    distance, fade = _fade(best - top)
    moment = tl.sum((moment - distance * weight) * fade, axis=0)
    return winner, best, runner_up, tl.sum(weight * fade, axis=0), moment


@jit
def _fade(distance: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The distance below a maximum and what it makes of a weight.

    Beyond 200, where exp is 0 in fp32 anyway, the distance is cut: infinity times 0 would be NaN.
    """
    distance = tl.minimum(distance, 200.0)
    return distance, tl.exp(-distance)
