"""The live guard: audits of finished answers, and what follows when the promise is broken.

A sampled share of the answers whose tokens left early, or whose inputs had 8 bits instead, is read
again at full depth when the engine has room, which costs a prefill and gives the full-depth model's
choice at every token with exact K,V. Its agreement is the promised quantity itself, K,V error
included (Apparate's continual feedback, arXiv 2312.05385, without running every input to its end).
"""

from __future__ import annotations

import logging
from collections import deque

from offramp.models.exits.calibration import betting_p_value
from offramp.models.sampling_params import ExitMode
from offramp.server.engine.sequence import Sequence
from offramp.server.engine.thresholds import GUARD_OFF, ExitThresholds

logger = logging.getLogger("offramp.guard")

# Answers the verdict looks back on, and the error rate of a wrong alarm for one such window.
_WINDOW = 128
_ALPHA = 0.01
_FEWEST = 8
_MAX_PENDING = 32


class LiveGuard:
    """Chooses answers to audit and watches their agreement against the promise.

    ``rate`` is the share of eligible answers audited (0: none).
    """

    def __init__(self, thresholds: ExitThresholds, rate: float) -> None:
        self.thresholds = thresholds
        self._rate = rate
        self._due = 0.0
        self._excess: deque[float] = deque(maxlen=_WINDOW)
        self.audited = 0
        self.disagreements = 0

    def wants(self, sequence: Sequence, pending: int) -> bool:
        """Whether a finished answer is to be audited; ``pending`` audits wait already."""
        if sequence.request.exits.mode is not ExitMode.ADAPTIVE:
            return False
        if not (sequence.left_early or sequence.exits_closed):
            return False
        # Where a grammar allows other tokens than the model's own choice, nothing can be compared.
        if pending >= _MAX_PENDING or sequence.grammar is not None:
            return False
        # Every 1/rate-th answer: an even sample without a random state.
        self._due += self._rate
        if self._due < 1:
            return False
        self._due -= 1
        return True

    def record(self, sequence: Sequence, disagreements: int) -> None:
        """An audit ended: ``disagreements`` of the answer's tokens are not full depth's."""
        total = len(sequence.tokens) - sequence.num_prompt
        self.audited += total
        self.disagreements += disagreements
        promise = sequence.request.exits.quality or self.thresholds.quality
        if promise is None or self.thresholds.guard_level >= GUARD_OFF:
            return
        self._excess.append(disagreements / total - (1 - promise))
        if len(self._excess) >= _FEWEST and self._broken():
            self._excess.clear()
            self.thresholds.tighten()
            self._log()

    def _broken(self) -> bool:
        """Whether answers disagree with full depth more than promised, beyond chance.

        Excesses over each answer's own promise lie in -1 .. 1; mapped to 0 .. 1 and mirrored, the
        betting test rejects "the mean excess is at most 0".
        """
        mirrored = [(1 - value) / 2 for value in self._excess]
        return betting_p_value(mirrored, 0.5) < _ALPHA

    def _log(self) -> None:
        level = self.thresholds.guard_level
        action = "early exits are off" if level >= GUARD_OFF else "thresholds were tightened"
        if level == 1:
            action += ", inputs have 16 bits"
        logger.warning("answers agree with full depth less than promised; %s (%d)", action, level)
