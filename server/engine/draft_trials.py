"""Whether guessing gains time, by steps with guesses and steps without them.

The cost model weighs each guess, but cannot see what guessing does to the steps around it: the
draft head's weights push the stack's out of a cache, and sequences fall out of step. So a few steps
in a row are now and then run the other way, and the faster way is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean, median

# Steps in a row that run one way; the first of them still feel the other one.
_RUN, _SKIPPED = 32, 12
# One run in so many goes the other way: every other one while that looks faster, or is not known;
# else as many as cost this share of all time, within bounds.
_OTHER_OFTEN, _OTHER_RARELY, _OTHER_RAREST = 2, 16, 64
_SPENT = 0.01
# A new sample moves a mean by at least this share. How many tokens a step makes depends on the
# text, so it takes many of them; what steps take drifts with the machine.
_TOKENS_RENEWAL, _RATIO_RENEWAL = 1 / 1024, 1 / 8
# From so many sequences on, of greedy and of sampled answers, guesses have to show that they gain
# before they are made, unless by the costs of steps they spare this share of a token's time.
_MANY = {False: 2, True: 1}
_SURE = 0.25
# A mind is changed where the other way is better by more than so many standard errors of the means.
_CERTAINTY = 2.0
_LEAST_RATIOS = 4
# A step that takes so many times the median met something else.
_OUTLIER = 3.0


@dataclass(slots=True)
class _Mean:
    renewal: float
    value: float = 0.0
    variance: float = 0.0
    samples: int = 0

    def add(self, sample: float) -> None:
        self.samples += 1
        share, off = max(self.renewal, 1 / self.samples), sample - self.value
        self.value += share * off
        self.variance = (1 - share) * (self.variance + share * off**2)

    @property
    def error(self) -> float:
        """Its standard error; a moving mean of renewal r is one of 2 / r samples."""
        counted = min(self.samples, 2 / self.renewal)
        return math.sqrt(self.variance / (counted - 1)) if counted > 1 else math.inf


@dataclass(slots=True)
class _Trial:
    """Both ways for one number of running sequences, and which one runs now.

    At first guesses are made where by the costs of steps they spare a large enough share
    ``spared`` of a token's time. They are ``near`` where this run or the next one guesses.
    ``ratio`` is the logarithm of the seconds of a step without guesses over those of one with them,
    of runs one after the other, between which the machine has hardly changed.
    """

    running: int
    sampled: bool = False
    spared: float = 0.0
    guessing: bool = field(init=False)
    guesses_pay: bool = field(init=False)
    near: bool = field(init=False)
    tokens: _Mean = field(default_factory=lambda: _Mean(_TOKENS_RENEWAL))
    ratio: _Mean = field(default_factory=lambda: _Mean(_RATIO_RENEWAL))
    steps: int = 0
    runs: int = 0
    _seconds: list[float] = field(default_factory=list)
    _before: tuple[bool, float] | None = None

    def __post_init__(self) -> None:
        likely = self.running < _MANY[self.sampled] or self.spared >= _SURE
        self.guessing = self.guesses_pay = self.near = likely

    def add(self, seconds: float | None, tokens: int) -> None:
        """A step ended, which made ``tokens``; the time of some is not known."""
        self.steps += 1
        if self.guessing:
            self.tokens.add(tokens)
        if seconds is not None and self.steps > _SKIPPED:
            self._seconds.append(seconds)
        if self.steps == _RUN:
            self._end_run()
            self._next_run()

    def _end_run(self) -> None:
        taken, self._seconds, self.steps = self._seconds, [], 0
        if not taken:
            self._before = None
            return
        most = _OUTLIER * median(taken)
        mean = fmean(each for each in taken if each <= most)
        before, self._before = self._before, (self.guessing, mean)
        if before is not None and before[0] is not self.guessing:
            ratio = math.log(mean / before[1])
            self.ratio.add(-ratio if self.guessing else ratio)

    def _next_run(self) -> None:
        pay = self._weigh()
        if pay is not self.guesses_pay:
            self.guesses_pay, self.runs = pay, 0
        self.runs += 1
        every = self._every()
        other = self.runs >= every
        if other:
            self.runs = 0
        self.guessing = pay is not other
        self.near = pay or other or self.runs + 1 >= every

    def _gain(self) -> float:
        """The logarithm of the time of a token without guesses over that with them."""
        return math.log(self.tokens.value / self.running) + self.ratio.value

    def _weigh(self) -> bool:
        """Whether guesses pay, as far as is known."""
        if self.ratio.samples < _LEAST_RATIOS:
            return self.guesses_pay
        error = math.hypot(self.ratio.error, self.tokens.error / self.tokens.value)
        return self._gain() + _CERTAINTY * (error if self.guesses_pay else -error) >= 0

    def _every(self) -> int:
        """Of so many runs, one goes the other way."""
        if not self.ratio.samples:
            return _OTHER_OFTEN
        lost = math.expm1(self._gain() if self.guesses_pay else -self._gain())
        if lost < 0:
            return _OTHER_OFTEN
        return min(max(_OTHER_RARELY, round(lost / _SPENT)), _OTHER_RAREST)


class DraftTrials:
    """Chooses for each step whether its sequences are guessed for."""

    def __init__(self) -> None:
        self._trials: dict[tuple[int, bool], _Trial] = {}
        self._running = _Trial(0)
        self._begun: float | None = None
        self._tokens: int | None = None

    def begin(
        self, running: int, now: float, *, sampled: bool = False, spared: float = 0.0
    ) -> bool:
        """A step of ``running`` sequences begins at ``now`` (seconds); whether it may guess.

        Where most answers are ``sampled`` guesses are right less often, so those are weighed apart.
        By the costs of steps guesses spare the share ``spared`` of a token's time, which counts
        until trials say more. That ends the step before, with all that the engine did in between.
        """
        if self._tokens is not None:
            seconds = None if self._begun is None else now - self._begun
            self._running.add(seconds, self._tokens)
        trial = self._trials.get((running, sampled))
        if trial is None:
            trial = self._trials[running, sampled] = _Trial(running, sampled, spared)
        self._running, self._begun, self._tokens = trial, now, None
        return trial.guessing

    @property
    def near(self) -> bool:
        """Whether steps like the one that began may soon guess, if they do not now."""
        return self._running.near

    def interrupt(self) -> None:
        """What comes next is no part of the step."""
        self._begun = None

    def end(self, tokens: int) -> None:
        """The step, in which all sequences could have been guessed for, made ``tokens``."""
        self._tokens = tokens
