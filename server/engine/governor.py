"""Whether exits, checks, drafts, waiting and late K,V are worth their time, by measured cost.

Both decoders decide by the same rules, each with the costs of its own steps; the thresholds in
force are shared.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, cast

from offramp.models.costs import CostModel
from offramp.models.sampling_params import NEVER
from offramp.server.engine.batch_delay import BatchDelay, Holds
from offramp.server.engine.drafts import AcceptanceRates, HeadAcceptance
from offramp.server.engine.thresholds import ExitThresholds

# The share of tokens that leave is estimated slowly: renewed faster, chance would close exits.
_SHARE_RENEWAL = 0.01
# Checks delay every token they concern, so what they are likely to save has to exceed their price
# by more than the estimates are off: at 1.5 times the price, exits still lost 7 % at one stream.
_MARGIN = 2.0
# A decision against exits is tried out anyway once in so many times: costs are only learnt from
# steps that run, and a rule fed by stale costs could otherwise never exit again (DREX's trap). Each
# try that changes nothing makes the next one rarer, since a try costs a step what exits would.
_PROBE_FIRST, _PROBE_RAREST = 32, 1024
# The same for rows of drafts. And where drafts gain less than this share of a pass (of guesses: for
# each sequence), it is not worth that sequences which were in step fall out of it: their prompts
# and ends then come one by one.
_DRAFT_MARGIN = 1.1
_DRAFT_GAIN = 0.05
MAX_NGRAM_DRAFTS = 8
MAX_HEAD_DRAFTS = 5
# With more rows the head's entries are not kept up while its drafts do not pay, so there is nothing
# to try.
_TRIED_ROWS = 2
# Decisions stand for so many steps: costs and shares drift slowly, and weighing them takes 2 % of a
# step of one row.
_STEPS_KEPT = 16


T = TypeVar("T")


@dataclass(slots=True)
class _Probes:
    """When a decision that was refused is tried out anyway."""

    refused: int = 0
    every: int = _PROBE_FIRST

    def allow(self, *, pays: bool) -> bool:
        """Whether it pays, or is due to be tried."""
        if pays:
            self.refused, self.every = 0, _PROBE_FIRST
            return True
        self.refused += 1
        if self.refused < self.every:
            return False
        self.refused, self.every = 0, min(2 * self.every, _PROBE_RAREST)
        return True


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """What the draft head is asked for in a step.

    ``most`` guesses a sequence, 0 where drafts do not pay; none behind guesses that are all right
    with less probability than ``bound``. A j-th guess is worth verifying where those up to it are
    all right with a probability of ``worth[j]``. That is expected to spare the share ``spared`` of
    a token's time.
    """

    most: int
    bound: float
    worth: tuple[float, ...]
    spared: float = 0.0


NO_DRAFTS = HeadPlan(0, 1.0, ())
# Verified whatever it is, so that the cost of its row is learnt.
_TRY = HeadPlan(1, 1.0, (-1.0,))


# Of sampled answers at first (temperature 0.8), and how much a guess moves it.
_SAMPLED_LUCK, _LUCK_RENEWAL = 0.7, 0.005


class ExitGovernor:
    """The choices that trade time between sequences, for one decoder.

    ``costs`` are learnt by the decoder; ``max_hold`` (seconds) bounds how long a sequence may wait
    at a segment for others. With a ``delay``, waiting and exits are chosen by simulated throughput.
    With ``every_exit`` tokens leave wherever their score allows it, whether or not that pays.
    """

    def __init__(
        self,
        costs: CostModel,
        thresholds: ExitThresholds,
        max_hold: float,
        delay: BatchDelay | None = None,
        *,
        every_exit: bool = False,
        head_chances: Sequence[tuple[float, float]] = (),
    ) -> None:
        self.costs = costs
        self.thresholds = thresholds
        self.delay = delay
        self._max_hold = max_hold
        self._every_exit = every_exit
        # Counted apart: decisions that alternate would take each other's turns.
        self._probes: defaultdict[str, _Probes] = defaultdict(_Probes)
        self._kept: dict[tuple[str, int, int], tuple[int, Any]] = {}
        num_segments = len(costs.segments)
        # Share of checked tokens that may leave, by segment; learnt from every check.
        self._fires = [0.3] * num_segments
        # Share of drafts made there that full depth confirmed (lossless).
        self._confirmed = [0.6] * num_segments
        self.acceptance = AcceptanceRates()
        """How n-gram drafts of all requests fared."""
        self.head_acceptance = HeadAcceptance.of(head_chances)
        self.sampled_luck = _SAMPLED_LUCK
        """How often guesses are right in sampled answers, times as often as in greedy ones."""

    def observe_checks(self, segment: int, checked: int, fired: int) -> None:
        """``fired`` of ``checked`` tokens reached their threshold after ``segment``."""
        if checked:
            share = self._fires[segment]
            renewal = 1 - (1 - _SHARE_RENEWAL) ** checked
            self._fires[segment] = share + renewal * (fired / checked - share)

    def observe_draft(self, segment: int, *, right: bool) -> None:
        """Full depth verified a draft made after ``segment``."""
        self._confirmed[segment] += _SHARE_RENEWAL * (right - self._confirmed[segment])

    def checks_pay(self, segment: int, rows: int) -> bool:
        """Whether checking ``rows`` tokens after ``segment`` is likely to save time at all."""
        if self._every_exit:
            return True
        if self.delay is not None:
            return self._probes[f"check {segment}"].allow(pays=self.delay.exits_pay)
        pays = self._standing("check", segment, rows, self._checks_save)
        return self._probes[f"check {segment}"].allow(pays=pays)

    def exits_save(self, rows: int, beyond: float = 0.0) -> bool:
        """Whether some exit is likely to spare ``rows`` tokens this share of their time.

        What checks cost is taken off.
        """
        if self._every_exit:
            return True
        return self._standing("exits", 0, max(1, rows), self._exits_spare) >= beyond

    def _exits_spare(self, _: int, rows: int) -> float:
        """The largest share of a token's time that an exit spares, less than 0 if none does."""
        exits = range(len(self.costs.segments) - 1)
        gain = max((self._gain_of_checks(i, rows) for i in exits), default=-math.inf)
        return gain / (self.costs.full_pass(rows) or 1.0)

    def _checks_save(self, segment: int, rows: int) -> bool:
        return self._gain_of_checks(segment, rows) >= 0

    def _gain_of_checks(self, segment: int, rows: int) -> float:
        """Seconds that checks of ``rows`` tokens after ``segment`` gain, with a margin."""
        costs, share = self.costs, self._fires[segment]
        all_leave = share**rows
        leaving = share * rows
        saved = all_leave * self._saved(segment, rows, 0)
        saved += (1 - all_leave) * self._saved(segment, leaving, rows - leaving)
        paid = (1 - (1 - share) ** rows) * self._payment(segment, max(1.0, leaving))
        return saved - _MARGIN * (paid + costs.checks[segment].at(rows))

    def exits_pay(self, segment: int, leaving: int, staying: int) -> bool:
        """Whether ``leaving`` sequences gain time by leaving after ``segment``.

        They save the layers and the head above at the price of their K,V, made later. Where that
        does not pay, all stay; no sequence is ever made to leave.
        """
        if self._every_exit:
            return True
        saved = self._saved(segment, leaving, staying)
        return self._probes["exit"].allow(pays=saved >= self._payment(segment, leaving))

    def recompute_pays(self, segment: int, running: int, owed: int) -> bool:
        """Whether ``owed`` rows join ``running`` ones from ``segment`` up for less than a fill."""
        extra = self.costs.above(segment, running + owed) - self.costs.above(segment, running)
        return extra <= self.costs.fill.at(owed)

    def draft_bound(self, segment: int, rows: int) -> float:
        """P(right) from which a draft after ``segment`` pays (lossless), with ``rows`` in the step.

        NEVER where checks cost more than the drafts they lead to are likely to gain.
        """
        gain, loss, pays = self._standing("draft", segment, rows, self._draft_gains)
        allowed = gain > 0 and self._probes["draft"].allow(pays=pays)
        return loss / (gain + loss) if allowed else NEVER

    def _draft_gains(self, segment: int, rows: int) -> tuple[float, float, bool]:
        gain, loss = self._draft(segment, rows)
        right = self._confirmed[segment]
        expected = self._fires[segment] * (right * gain - (1 - right) * loss)
        return gain, loss, expected > self.costs.checks[segment].at(rows) / rows

    def _standing(
        self, name: str, segment: int, rows: int, weigh: Callable[[int, int], T], *, asked: int = 1
    ) -> T:
        """What ``weigh`` said of ``segment`` and ``rows``, for steps that ask ``asked`` times."""
        left, found = self._kept.get((name, segment, rows), (0, None))
        if not left:
            left, found = _STEPS_KEPT * asked, weigh(segment, rows)
        self._kept[name, segment, rows] = left - 1, found
        return cast("T", found)

    def ngram_length(self, rates: AcceptanceRates, size: int, rows: int) -> int:
        """How many n-gram drafts to verify along with a sequence's next token.

        They follow a match of ``size`` tokens, and ``rates`` are the sequence's own. One more row
        pays while the chance that all drafts up to it are right, times the time of a token, exceeds
        what the row adds to a pass of ``rows``; the first has to gain a share of the pass beside.
        """
        token, extra = self._costs_of_rows(rows)
        chance, length = 1.0, 0
        while length < MAX_NGRAM_DRAFTS:
            chance *= rates.of(size + length)
            if chance * token <= extra[length]:
                break
            length += 1
        return length

    def ngrams_pay(self, rates: AcceptanceRates, rows: int) -> bool:
        """Whether any match could be worth verifying, so that it is worth a search."""
        token, extra = self._costs_of_rows(rows)
        return max(rates.rates) * token > extra[0]

    def _costs_of_rows(self, rows: int) -> tuple[float, list[float]]:
        """Seconds a token takes in a pass of ``rows``, and what each further row has to gain."""
        # Each of the sequences asks.
        return self._standing("n-gram", 0, rows, self._weigh_rows, asked=rows)

    def _weigh_rows(self, _: int, rows: int) -> tuple[float, list[float]]:
        passes = [self.costs.full_pass(rows + more) for more in range(MAX_NGRAM_DRAFTS + 1)]
        extra = [_DRAFT_MARGIN * (more - less) for less, more in pairwise(passes)]
        extra[0] += _DRAFT_GAIN * passes[0]
        return passes[0] / rows, extra

    def observe_sampled(self, wanted: float, *, right: bool) -> None:
        """A guess of a sampled answer was verified, of a kind of which ``wanted`` are right."""
        self.sampled_luck += _LUCK_RENEWAL * (right - wanted * self.sampled_luck)

    def head_plan(self, rows: int, luck: float = 1.0) -> HeadPlan:
        """What to ask of the draft head where ``rows`` sequences run.

        Their guesses are right ``luck`` times as often as greedy ones.
        """
        plan = self._head_plan(rows, luck)
        if rows > _TRIED_ROWS:
            return plan
        allowed = self._probes["head"].allow(pays=plan.most > 0)
        return _TRY if allowed and not plan.most else plan

    def guesses_spare(self, rows: int, *, sampled: bool) -> float:
        """The share of a token's time that the draft head's guesses for ``rows`` sequences spare.

        As far as measured costs and acceptance tell; 0 where there is no draft head.
        """
        if not self.costs.first_guess.known:
            return 0.0
        return self._head_plan(rows, self.sampled_luck if sampled else 1.0).spared

    def _head_plan(self, rows: int, luck: float) -> HeadPlan:
        # A step asks what guesses spare, and then for them.
        return self._standing("head", round(10 * luck), max(1, rows), self._weigh_head, asked=2)

    def _weigh_head(self, tenths: int, rows: int) -> HeadPlan:
        luck = tenths / 10
        # All sequences draft, so their rows add up.
        token = self.costs.full_pass(rows)
        extra = [
            _DRAFT_MARGIN * (self.costs.full_pass(rows * (1 + more)) - token) / more
            for more in range(1, MAX_HEAD_DRAFTS + 1)
        ]
        first, further = self.costs.first_guess.at(rows), self.costs.next_guess.at(rows)
        # What a guess gains if those before it are right, and how likely that is.
        gains = [self.head_acceptance.gain(token, row, luck) for row in extra]
        likely = luck * self.head_acceptance.mean
        more = [max(0.0, gain * likely**index - further) for index, gain in enumerate(gains)]
        # The more sequences there are, the more fall out of step.
        saved = gains[0] + sum(more[1:]) - first
        if saved <= rows * _DRAFT_GAIN * token:
            return NO_DRAFTS
        bound = further / gains[1] if gains[1] else 1.0
        right = sum(likely ** (index + 1) for index, gain in enumerate(more) if gain)
        spared = saved / (token * (1 + right))
        return HeadPlan(MAX_HEAD_DRAFTS, bound, tuple(row / token for row in extra), spared)

    def worth_verifying(self, plan: HeadPlan, chances: Sequence[float], luck: float) -> int:
        """How many of a sequence's guesses, with the head's ``chances``, are worth verifying."""
        right, count = 1.0, 0
        for chance, worth in zip(chances, plan.worth, strict=False):
            right *= min(1.0, luck * self.head_acceptance.rate(chance))
            if right <= worth:
                break
            count += 1
        return count

    def hold_share(self, segment: int, waiting: int, ready: int) -> float:
        """The share of the sequences ready at the first segment that must wait at ``segment``.

        Fewer are held back. Compared in sequence-seconds: running deep now delays the ready ones by
        all segments above; holding delays those that wait by a head and a first segment, and splits
        the batch, which costs both steps' fixed part once more (DREX's threshold, arXiv
        2512.15705).
        """
        head, first = self.costs.head, self.costs.segments[0]
        fixed = head.fixed + first.fixed
        delay = head.at(ready) + first.at(ready) + fixed
        gain = self.costs.above(segment, waiting) - fixed
        return max(0.0, gain) / delay if delay else 0.0

    def holds(self, segment: int, waiting: int, ready: int, age: float) -> bool:
        """Whether ``waiting`` sequences are held at ``segment`` while ``ready`` others go first."""
        if not ready or age >= self._max_hold:
            return False
        return waiting < ready * self.hold_share(segment, waiting, ready)

    def device_holds(self, rows: int) -> Holds:
        """The same rule where a device applies it: for each segment share and passes to wait.

        The shares are those of ``rows`` rows at once.
        """
        segments = range(1, len(self.costs.segments))
        patience = device_patience(self.costs, rows, self._max_hold)
        shares = [(self.hold_share(segment, rows, rows), patience) for segment in segments]
        return [(0.0, 0.0), *shares]

    def observe_depths(self, depths: Sequence[int], live: int) -> Holds | None:
        """Tokens took ``depths`` layers; what rows wait for from now on, where that changed."""
        if self.delay is None:
            return None
        for depth in depths:
            self.delay.observe(depth)
        return self.delay.choose(live) if live and self.delay.due() else None

    def _draft(self, segment: int, rows: int) -> tuple[float, float]:
        """Seconds that a right draft after ``segment`` gains and a wrong one loses.

        A right one spares a pass above of its own: its row joins the next one's. A wrong one wastes
        the next token's pass below. What a pass costs whatever its rows is only spared if the whole
        batch leaves.
        """
        costs = self.costs
        alone = self._fires[segment] ** (rows - 1)
        top = costs.above(segment + 1, 1) + costs.head.at(1)
        joining = costs.above(segment + 1, 2) - costs.above(segment + 1, 1) + costs.head.more(1)
        below = costs.below(segment, rows) - costs.below(segment, rows - 1)
        return alone * top - joining, alone * costs.below(segment, 1) + (1 - alone) * below

    def _saved(self, segment: int, leaving: float, staying: float) -> float:
        costs = self.costs
        saved = costs.above(segment + 1, leaving + staying) - costs.above(segment + 1, staying)
        return saved + costs.head.at(leaving + staying) - costs.head.at(staying)

    def _payment(self, segment: int, leaving: float) -> float:
        """K,V of ``leaving`` rows: a projection, or the rows' share of a later pass if cheaper."""
        costs = self.costs
        along = costs.above(segment + 1, 1 + leaving) - costs.above(segment + 1, 1)
        return min(costs.fill.at(leaving), along) if costs.fill.known else along


def device_patience(costs: CostModel, rows: int, max_hold: float) -> float:
    """Passes of ``rows`` rows that take ``max_hold`` seconds."""
    seconds = costs.full_pass(rows)
    return max_hold / seconds if seconds else 0.0
