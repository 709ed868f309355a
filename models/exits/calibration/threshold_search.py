"""Thresholds of all exits from one number, and what a threshold vector would do.

A token that leaves at exit e saves the share (L - e) / L of the stack and is wrong with probability
1 - p, p being the exit's score. With mu as the price of a wrong token in whole stacks, leaving pays
where (1 - p) * mu < (L - e) / L, the ratio of cost and quality in ADEPT's utility (arXiv
2601.03700). So one mu gives every exit its threshold, and calibration searches a line, not a box.

A token that leaves also harms later ones, which read K,V that were filled: h of them, measured for
each exit. That harm is priced like a wrong token: (1 - p + h) * mu < (L - e) / L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.models.sampling_params import NEVER

_MU_LOW, _MU_HIGH, _MU_STEPS = 0.05, 1e6, 240
_UNIFORM_STEPS = 240


@dataclass(frozen=True, slots=True)
class Scored:
    """n answer positions as the exits see them, teacher-forced with exact K,V.

    ``scores`` [k, n] of one criterion and ``right`` [k, n], whether the exit's token is the
    full-depth one, at the ``exit_layers`` (k, ascending) of a stack of ``num_layers``. ``harm``
    (k) is how many later tokens disagree for each one that leaves there; empty for none.
    """

    scores: Tensor
    right: Tensor
    exit_layers: tuple[int, ...]
    num_layers: int
    harm: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        expected = (len(self.exit_layers), self.scores.shape[-1])
        if self.scores.shape != expected or self.right.shape != expected:
            raise ValueError(f"scores and correctness of {expected} are needed")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Thresholds with the ``risk`` expected of them and the share of layers ``skipped``.

    The risk is teacher-forced, with the harm of filled K,V added where it was measured.
    """

    thresholds: tuple[float, ...]
    risk: float
    skipped: float


def thresholds_at(
    mu: float, exit_layers: Sequence[int], num_layers: int, harm: Sequence[float] = ()
) -> tuple[float, ...]:
    """Thresholds 1 - (L - e) / (L * mu) + h, clamped to 0 .. 1.01; higher as mu grows.

    Raises ValueError for a mu that is not positive.
    """
    if not mu > 0:
        raise ValueError("mu is positive")
    harms = harm or (0.0,) * len(exit_layers)
    raw = [
        1 - (num_layers - layer) / (num_layers * mu) + own
        for layer, own in zip(exit_layers, harms, strict=True)
    ]
    return tuple(min(max(value, 0.0), NEVER) for value in raw)


def teacher_forced(scored: Scored, thresholds: Sequence[float]) -> tuple[float, float]:
    """Share of tokens that disagree and share of layers skipped, each out of 1.

    Tokens leave at the first exit whose score reaches its threshold. K,V are exact; the harm of
    filled ones is added as far as ``scored`` knows it.
    """
    count = scored.scores.shape[1]
    inside = torch.ones(count, dtype=torch.bool, device=scored.scores.device)
    wrong, skipped = 0.0, 0
    harms = scored.harm or (0.0,) * len(scored.exit_layers)
    for index, threshold in enumerate(thresholds):
        leaves = inside & (scored.scores[index] >= threshold)
        inside &= ~leaves
        wrong += int((leaves & ~scored.right[index]).sum()) + harms[index] * int(leaves.sum())
        skipped += int(leaves.sum()) * (scored.num_layers - scored.exit_layers[index])
    return wrong / max(count, 1), skipped / max(count * scored.num_layers, 1)


def candidates(
    scored: Scored, count: int = 9, low: float = 0.002, high: float = 0.08
) -> list[Candidate]:
    """About ``count`` points of the path, from careful to aggressive.

    Their teacher-forced risk is spread evenly in its logarithm over ``low`` to ``high``, as far as
    the path reaches; points that skip nothing are left out.
    """
    layers, depth = scored.exit_layers, scored.num_layers
    ratio = (_MU_LOW / _MU_HIGH) ** (1 / (_MU_STEPS - 1))
    mus = [_MU_HIGH * ratio**step for step in range(_MU_STEPS)]
    line = [thresholds_at(mu, layers, depth, scored.harm) for mu in mus]
    return _spread(scored, line, count, low, high)


def uniform_candidates(
    scored: Scored, count: int = 9, low: float = 0.002, high: float = 0.08
) -> list[Candidate]:
    """As `candidates`, with one threshold for all exits: for scores that are no probabilities."""
    values = scored.scores.flatten().float()
    if not len(values):
        return []
    ranked = values.sort().values
    places = torch.linspace(len(ranked) - 1, 0, _UNIFORM_STEPS).round().long()
    levels = ranked[places].unique().flip(0).tolist()
    line = [(min(max(level, 0.0), 1.0),) * len(scored.exit_layers) for level in levels]
    return _spread(scored, line, count, low, high)


def stepwise_candidates(scored: Scored) -> list[Candidate]:
    """One candidate per exit, the topmost first: everyone leaves there at the latest.

    For criteria whose score knows no degrees (fixed depth).
    """
    count = len(scored.exit_layers)
    line = [(NEVER,) * index + (0.0,) * (count - index) for index in reversed(range(count))]
    return [Candidate(each, *teacher_forced(scored, each)) for each in line]


def _spread(
    scored: Scored, line: Sequence[tuple[float, ...]], count: int, low: float, high: float
) -> list[Candidate]:
    """For each of ``count`` risks the last point before ``line`` (careful first) exceeds it."""
    targets = [low * (high / low) ** (step / max(count - 1, 1)) for step in range(count)]
    best: list[Candidate | None] = [None] * count
    reached = 0.0
    for thresholds in line:
        found = Candidate(thresholds, *teacher_forced(scored, thresholds))
        reached = max(reached, found.risk)
        if reached > targets[-1]:
            break
        for index, target in enumerate(targets):
            if reached <= target and found.skipped > 0:
                best[index] = found
    return list(dict.fromkeys(each for each in best if each is not None))
