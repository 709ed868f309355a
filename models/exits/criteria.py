"""When a token may leave: exit criteria, each a class that turns what an exit sees into a score.

A score lies in 0 .. 1 and is compared with a threshold; higher means readier to leave. Whether
leaving also pays in time is the governor's business. A criterion declares beside its score what
the rest of the project must know of it and registers under its name; no other module knows it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.exit_gate import fused_key
from offramp.kernels.linear import linear
from offramp.models.exits.head import ExitHead
from offramp.models.sampling_params import ExitCriterion

# Probabilities so close to 0 or 1 say nothing more; their logits stay finite.
_EDGE = 1e-5
PREDICTOR_TOKENS = 4


class Trail:
    """What rows showed at the exits below, by hidden row; a criterion names the memory it needs."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._num_rows = num_rows
        self._device = device
        self._memory: dict[str, Tensor] = {}

    def of(self, name: str, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory [rows, *sizes] under a name, zeros when first used."""
        if name not in self._memory:
            shape = (self._num_rows, *sizes)
            self._memory[name] = torch.zeros(shape, dtype=dtype, device=self._device)
        return self._memory[name]


class ExitView:
    """n rows at one exit point, as a criterion sees them; gate and logits are computed when used.

    ``hidden`` [n, d] are the rows' states, ``rows`` [n] their places in ``trail``; ``index`` counts
    the ``num_exits`` exit points from below. ``logits_of`` runs the exit's adapter and LM head.
    """

    def __init__(
        self,
        head: ExitHead,
        hidden: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        *,
        eps: float,
        index: int,
        num_exits: int,
        rows: Tensor,
        trail: Trail,
    ) -> None:
        self.head = head
        self.hidden = hidden
        self.index = index
        self.num_exits = num_exits
        self.rows = rows
        self.trail = trail
        self._logits_of = logits_of
        self._eps = eps
        self._logits: Tensor | None = None
        self._have = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)

    @cached_property
    def gate(self) -> Tensor:
        """Gate scores [n]."""
        return self.head.score(self.hidden, self._eps)

    @property
    def every_row(self) -> Tensor:
        """Indices of all rows."""
        return torch.arange(len(self.hidden), device=self.hidden.device)

    def logits(self, at: Tensor) -> Tensor:
        """The exit's logits [len(at), vocab] of the rows with indices ``at``."""
        missing = at[~self._have[at]]
        if len(missing):
            made = self._logits_of(self.hidden[missing])
            if self._logits is None:
                self._logits = made.new_zeros(len(self.hidden), made.shape[1])
            self._logits[missing] = made
            self._have[missing] = True
        assert self._logits is not None
        return self._logits[at]

    @property
    def num_logits(self) -> int:
        """Rows whose logits were made."""
        return int(self._have.sum())


class Criterion(ABC):
    """A rule by which tokens leave."""

    compares_exits: ClassVar[bool] = False
    """Whether it compares with the exits below, so that it must see every exit."""
    decides_for_answer: ClassVar[bool] = False
    """Whether the prompt's last row chooses one depth for the whole answer."""
    calibrated: ClassVar[bool] = True
    """Whether the score estimates P(right), so that one price of errors sets all thresholds."""

    @abstractmethod
    def score(self, view: ExitView) -> Tensor:
        """Scores [n], 0 (stay) to 1 (leave)."""


CRITERIA: dict[ExitCriterion, Criterion] = {}
"""Every criterion under its name."""


def _register(name: ExitCriterion) -> Callable[[type[Criterion]], type[Criterion]]:
    def add(kind: type[Criterion]) -> type[Criterion]:
        CRITERIA[name] = kind()
        return kind

    return add


@_register(ExitCriterion.GATE)
class Gate(Criterion):
    """The learned gate alone (ADEPT, arXiv 2601.03700: a policy on the hidden state)."""

    def score(self, view: ExitView) -> Tensor:
        """See Criterion."""
        return view.gate


@_register(ExitCriterion.TWO_KEY)
class TwoKey(Criterion):
    """Gate first, then the logits: the LM head runs only for rows whose gate fires.

    The second key weighs gate, top probability and top-2 gap into one estimate of
    P(exit's token == full depth's token); an exit without those weights takes the gap (CALM,
    arXiv 2207.07061; FREE, arXiv 2310.05424).
    """

    def score(self, view: ExitView) -> Tensor:
        """See Criterion."""
        scores = torch.zeros_like(view.gate)
        fired = (view.gate >= view.head.floor).nonzero().squeeze(-1)
        if len(fired):
            probs = view.logits(fired).softmax(dim=-1)
            scores[fired] = second_key(view.head.fuse, view.gate[fired], probs)
        return scores


@_register(ExitCriterion.MAX_PROB)
class MaxProb(Criterion):
    """Highest softmax probability (CALM, arXiv 2207.07061; EE-LLM, arXiv 2312.04916)."""

    def score(self, view: ExitView) -> Tensor:
        """See Criterion."""
        return _probs(view).amax(dim=-1)


PROFILED = ExitCriterion.MAX_PROB
"""It runs the exit's LM head for every row, so a cost profile sees the whole price of a check."""


@_register(ExitCriterion.TOP2_GAP)
class Top2Gap(Criterion):
    """Difference of the two highest probabilities (CALM, 2207.07061; FREE, 2310.05424)."""

    def score(self, view: ExitView) -> Tensor:
        """See Criterion."""
        best = _probs(view).topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]


@_register(ExitCriterion.ENTROPY)
class Entropy(Criterion):
    """One minus the entropy as a share of the highest possible (DeeBERT, arXiv 2004.12993)."""

    def score(self, view: ExitView) -> Tensor:
        """See Criterion."""
        probs = _probs(view)
        return (1 - _entropy(probs) / math.log(probs.shape[-1])).clamp(0, 1)


@_register(ExitCriterion.ENTROPY_DROP)
class EntropyDrop(Criterion):
    """How little the entropy still falls from exit to exit (BEExformer, arXiv 2412.05225).

    The score is one minus the fractional reduction since the exit below; a rise counts as no
    reduction. The first exit has nothing to compare with, so no token leaves there.
    """

    compares_exits = True
    calibrated = False

    def score(self, view: ExitView) -> Tensor:
        """See Criterion."""
        memory = view.trail.of("entropy")
        now, earlier = _entropy(_probs(view)), memory[view.rows]
        memory[view.rows] = now
        if view.index == 0:
            return torch.zeros_like(now)
        return 1 - ((earlier - now) / earlier.clamp_min(_EDGE)).clamp(0, 1)


@_register(ExitCriterion.SATURATION)
class Saturation(Criterion):
    """Cosine of the states at this exit and the one below (CALM, 2207.07061; MuE, 2211.11152)."""

    compares_exits = True
    calibrated = False

    def score(self, view: ExitView) -> Tensor:
        """See Criterion."""
        now = view.hidden.float()
        memory = view.trail.of("hidden", now.shape[1])
        earlier = memory[view.rows]
        memory[view.rows] = now
        if view.index == 0:
            return torch.zeros(len(now), device=now.device)
        return F.cosine_similarity(now, earlier, dim=-1).clamp(0, 1)


@_register(ExitCriterion.PATIENCE)
class Patience(Criterion):
    """Exits in a row with the same best token (PABEE, arXiv 2006.04152).

    The score is the number of exits directly below that agree with this one, as a share of the
    most there can be: with k exits a threshold of t / (k - 1) is a patience of t.
    """

    compares_exits = True
    calibrated = False

    def score(self, view: ExitView) -> Tensor:
        """See Criterion."""
        tokens, streaks = view.trail.of("token", dtype=torch.long), view.trail.of("streak")
        token = view.logits(view.every_row).argmax(dim=-1)
        same = token == tokens[view.rows]
        streak = torch.where(same, streaks[view.rows] + 1, 0.0)
        if view.index == 0:
            streak = torch.zeros_like(streak)
        tokens[view.rows], streaks[view.rows] = token, streak
        return streak / max(1, view.num_exits - 1)


@_register(ExitCriterion.Q_EXIT)
class QExit(Criterion):
    """Cumulative exit posterior (PALBERT's Q-exit, arXiv 2204.03276).

    With the gate as halting probability l_i, the score is 1 - prod (1 - l_j) over the exits up to
    this one; a token leaves where it passes the quantile q.
    """

    compares_exits = True
    calibrated = False

    def score(self, view: ExitView) -> Tensor:
        """See Criterion."""
        memory = view.trail.of("survival")
        below = memory[view.rows] if view.index else torch.ones_like(view.gate)
        survival = below * (1 - view.gate)
        memory[view.rows] = survival
        return 1 - survival


@_register(ExitCriterion.PREDICTOR)
class Predictor(Criterion):
    """A small network on a few candidate tokens' logits (SpecEE, arXiv 2504.08850).

    The features of the candidates, the exit's own best few over its reduced vocabulary, are their
    logits, their probabilities among themselves, and how those changed since the exit below.
    """

    compares_exits = True
    calibrated = False

    def score(self, view: ExitView) -> Tensor:
        """See Criterion; at an exit without a trained predictor no token leaves."""
        head, every_row = view.head, view.every_row
        logits = view.logits(every_row)
        memory = view.trail.of("logits", logits.shape[1])
        earlier = memory[view.rows] if view.index else torch.zeros_like(logits)
        features = predictor_features(logits, earlier)
        memory[view.rows] = logits
        if head.predictor_up is None or head.predictor_down is None:
            return torch.zeros(len(logits), device=logits.device)
        features = features.to(head.predictor_up.dtype)
        inner = F.silu(linear(features, head.predictor_up, head.predictor_up_bias))
        out = linear(inner, head.predictor_down, head.predictor_down_bias)
        return torch.sigmoid(out).squeeze(-1)


@_register(ExitCriterion.FIXED)
class Fixed(Criterion):
    """Every token leaves at the first exit allowed (LayerSkip, arXiv 2404.16710)."""

    calibrated = False

    def score(self, view: ExitView) -> Tensor:
        """See Criterion."""
        return torch.ones(len(view.hidden), device=view.hidden.device)


@_register(ExitCriterion.PROMPT_DEPTH)
class PromptDepth(Gate):
    """One depth for the whole answer, from the gates on the prompt (FiRST, arXiv 2410.12513)."""

    decides_for_answer = True
    calibrated = False


def second_key(fuse: Tensor | None, gate: Tensor, probs: Tensor) -> Tensor:
    """Estimate [n] of P(exit's token == full depth's) from ``gate`` [n] and ``probs`` [n, vocab].

    ``fuse`` [4] weighs the logits of gate, top probability and top-2 gap, and a constant; without
    it the gap itself is the score.
    """
    best = probs.topk(2, dim=-1).values
    return fused_key(fuse, gate, best[:, 0], best[:, 0] - best[:, 1])


def predictor_features(logits: Tensor, earlier: Tensor) -> Tensor:
    """Features [n, 12] of the best tokens of ``logits`` [n, vocab], ``earlier`` an exit below."""
    best, tokens = logits.topk(PREDICTOR_TOKENS, dim=-1)
    probs = best.softmax(dim=-1)
    change = probs - earlier.gather(1, tokens).softmax(dim=-1)
    return torch.cat((best, probs, change), dim=1)


def _probs(view: ExitView) -> Tensor:
    return view.logits(view.every_row).softmax(dim=-1)


def _entropy(probs: Tensor) -> Tensor:
    return -(probs * probs.clamp_min(1e-12).log()).sum(dim=-1)
