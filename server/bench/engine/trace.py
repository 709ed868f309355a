"""At which depth tokens leave: a distribution over exit points, and every token's own draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.models.sampling_params import NEVER
from offramp.server.bench.engine.errors import EngineBenchError

_HALVINGS = 200


@dataclass(frozen=True, slots=True)
class ExitTrace:
    """Shares of tokens by the layers they take.

    ``depths`` are the exit layers, ascending, and last all layers of the stack; ``shares``, one
    each, sum to 1. ``rule`` says where the shares come from.
    """

    depths: tuple[int, ...]
    shares: tuple[float, ...]
    rule: str

    @property
    def mean_depth(self) -> float:
        """Layers a token takes on average."""
        return sum(d * s for d, s in zip(self.depths, self.shares, strict=True))

    def draw(self, tokens: int, slots: int, seed: int) -> Tensor:
        """For each token of each slot the index of its depth, int64 [tokens, slots].

        Every slot's draws are spread evenly over the distribution and then shuffled, so that few
        tokens have the right mean too.
        """
        generator = torch.Generator().manual_seed(seed)
        start = torch.rand(1, slots, generator=generator, dtype=torch.float64)
        at = (torch.arange(tokens).unsqueeze(1) + start) / tokens
        bounds = torch.tensor(self.shares, dtype=torch.float64).cumsum(0)[:-1]
        even = torch.bucketize(at, bounds, right=True)
        order = torch.rand(tokens, slots, generator=generator).argsort(dim=0)
        return even.gather(0, order)


def thresholds(draws: Tensor, exits: int) -> Tensor:
    """Scores fp32 [tokens, slots, exits] that make tokens leave as in ``draws`` [tokens, slots].

    0 where the token leaves, whatever the gate says; NEVER at all other exits.
    """
    return torch.where(draws.unsqueeze(-1) == torch.arange(exits), 0.0, NEVER)


def read_trace(text: str, exits: Sequence[int], num_layers: int) -> ExitTrace:
    """The trace that ``text`` names: a mean depth share (0.6) or layer:share pairs (8:0.4,32:0.6).

    Raises EngineBenchError.
    """
    depths = (*exits, num_layers)
    if ":" in text:
        return _listed(text, depths)
    share = _number(text, text)
    mean = share * num_layers
    if not depths[0] <= mean <= num_layers:
        raise EngineBenchError(
            f"--exit-trace {text}: a mean of {mean:g} of {num_layers} layers is out of reach; "
            f"with a first exit after layer {depths[0]} the share is "
            f"{depths[0] / num_layers:.3f} to 1"
        )
    rule = f"maximum entropy with a mean of {share:g} of the layers"
    return ExitTrace(depths, maximum_entropy(depths, mean), rule)


def maximum_entropy(depths: Sequence[int], mean: float) -> tuple[float, ...]:
    """The shares of ``depths`` (ascending) that have this mean and favour nothing else.

    They are proportional to exp(rate * depth) (Jaynes 1957); the rate is found by bisection. At
    either end of the range all tokens take that depth.
    """
    if mean <= depths[0] or mean >= depths[-1]:
        return tuple(float(depth == min(max(mean, depths[0]), depths[-1])) for depth in depths)
    low, high = -100.0, 100.0
    for _ in range(_HALVINGS):
        rate = (low + high) / 2
        shares = _tilted(depths, rate)
        if sum(d * s for d, s in zip(depths, shares, strict=True)) < mean:
            low = rate
        else:
            high = rate
    return _tilted(depths, (low + high) / 2)


def _tilted(depths: Sequence[int], rate: float) -> tuple[float, ...]:
    heaviest = depths[-1] if rate > 0 else depths[0]
    weights = [math.exp(rate * (depth - heaviest)) for depth in depths]
    return tuple(weight / sum(weights) for weight in weights)


def _listed(text: str, depths: tuple[int, ...]) -> ExitTrace:
    shares = dict.fromkeys(depths, 0.0)
    seen: set[int] = set()
    for pair in text.split(","):
        layer_text, _, share_text = pair.partition(":")
        layer, share = _number(layer_text, text), _number(share_text, text)
        if layer not in shares:
            raise EngineBenchError(
                f"--exit-trace {text}: {layer_text} is neither an exit layer nor the whole stack; "
                f"there are {', '.join(map(str, depths))}"
            )
        if share < 0 or int(layer) in seen:
            raise EngineBenchError(f"--exit-trace {text}: {pair} is negative or a second time")
        seen.add(int(layer))
        shares[int(layer)] = share
    total = sum(shares.values())
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise EngineBenchError(f"--exit-trace {text}: shares sum to {total:g}, not to 1")
    return ExitTrace(depths, tuple(shares[depth] / total for depth in depths), "as listed")


def _number(part: str, text: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise EngineBenchError(
            f"--exit-trace {text}: write a mean share of the depth (0.6) or layer:share pairs "
            "(8:0.4,16:0.2,32:0.4)"
        )
    return value
