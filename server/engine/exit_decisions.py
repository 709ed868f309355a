"""Exit checks of the sequences in a step, and which of them leave after it."""

from __future__ import annotations

from bisect import bisect_left
from collections import abc

from offramp.models.exits.criteria import CRITERIA
from offramp.models.sampling_params import NEVER, KVFill
from offramp.models.step import ExitCheck, SequenceRows, StepResult
from offramp.server.engine.drafting import draft_room
from offramp.server.engine.governor import ExitGovernor
from offramp.server.engine.head_rows import head_row
from offramp.server.engine.kv_debt import DebtLedger
from offramp.server.engine.request import EngineInfo
from offramp.server.engine.sequence import Sequence

PAID_LATER = frozenset({KVFill.AUTO, KVFill.RECOMPUTE})
"""Fills that may run owed rows together with a later pass of their sequence."""


class ExitDecisions:
    """What the host decides at exit points, for the host decoder."""

    def __init__(self, info: EngineInfo, governor: ExitGovernor, ledger: DebtLedger) -> None:
        self._info = info
        self._governor = governor
        self._ledger = ledger
        self._worth = True
        self._draft_bound = NEVER

    def weigh(self, segment: int, sequences: abc.Sequence[Sequence]) -> None:
        """Decide whether checks of ``sequences`` after ``segment`` pay, for the next step."""
        if segment == len(self._info.exit_layers):
            return
        if any(each.lossless for each in sequences):
            self._draft_bound = self._governor.draft_bound(segment, len(sequences))
        if any(each.exits_on and not each.lossless for each in sequences):
            self._worth = self._governor.checks_pay(segment, len(sequences))

    def check(self, sequence: Sequence, segment: int, now: float) -> ExitCheck | None:
        """The check of a sequence's last row after ``segment``; None where it has to go on.

        Only a decode token alone in its chunk may leave. A prompt's last token never does.
        """
        exits, makes_token = sequence.request.exits, sequence.makes_token
        if not sequence.exits_on or segment >= len(self._info.exit_layers) or not makes_token:
            return None
        criterion = CRITERIA[exits.criterion]
        if criterion.decides_for_answer:
            threshold = self._answer_threshold(sequence, segment, now)
        elif sequence.num_generated == 0 or len(sequence.chunk) > 1:
            return None
        else:
            threshold = self._threshold(sequence, segment, now)
        if threshold > 1 and not criterion.compares_exits:
            return None
        head = head_row(sequence, sequence.chunk[-1], sequence.chunk_rows[-1])
        return ExitCheck(exits.criterion, threshold, head)

    def prompt_threshold(self, sequence: Sequence, segment: int) -> float | None:
        """Gate score at which prompt rows leave after ``segment``; None where they may not."""
        exits = sequence.request.exits
        if not sequence.exits_on or segment >= len(self._info.exit_layers):
            return None
        if self._info.exit_layers[segment] < exits.min_layer or not self.prompt_rows(sequence):
            return None
        return exits.prefill_threshold

    @staticmethod
    def prompt_rows(sequence: Sequence) -> int:
        """Leading rows of the chunk that hold prompt tokens, the prompt's last one left out."""
        if sequence.request.exits.prefill_threshold is None:
            return 0
        return bisect_left(sequence.chunk, sequence.num_prompt - 1)

    def leaving(
        self,
        segment: int,
        sequences: abc.Sequence[Sequence],
        work: abc.Sequence[SequenceRows],
        result: StepResult,
    ) -> list[bool]:
        """Which sequences leave after ``segment``: the score allows it, and it pays or is asked."""
        checked = sum(item.check is not None for item in work)
        if not any(result.leave):
            self._governor.observe_checks(segment, checked, 0)
            return [False] * len(sequences)
        fired = [
            leave and not _notes_depth(sequence, segment)
            for leave, sequence in zip(result.leave, sequences, strict=True)
        ]
        self._governor.observe_checks(segment, checked, sum(fired))
        leaving = sum(
            fire and not sequence.lossless for fire, sequence in zip(fired, sequences, strict=True)
        )
        staying = len(sequences) - leaving
        pays = bool(leaving) and self._governor.exits_pay(segment, leaving, staying)
        return [
            fire
            and (
                self._may_draft(sequence, token)
                if sequence.lossless
                else pays or sequence.request.exits.always
            )
            for fire, sequence, token in zip(fired, sequences, result.token_ids, strict=True)
        ]

    def _closed(self, sequence: Sequence) -> bool:
        """Whether no score would let the sequence leave, as things were weighed for this step."""
        if sequence.lossless:
            return self._draft_bound > 1
        return not (self._worth or sequence.request.exits.always)

    def _threshold(self, sequence: Sequence, segment: int, now: float) -> float:
        exits = sequence.request.exits
        if self._closed(sequence) or self._info.exit_layers[segment] < exits.min_layer:
            return NEVER
        if self._must_pay(sequence):
            return NEVER
        if sequence.lossless:
            wished = 0.0 if exits.thresholds is None else exits.thresholds[segment]
            return max(self._draft_bound, wished)
        return self._in_force(sequence, segment, now)

    def _answer_threshold(self, sequence: Sequence, segment: int, now: float) -> float:
        """Of a criterion that decides by the prompt's last row; later tokens follow its choice."""
        if sequence.num_generated == 0:
            allowed = self._info.exit_layers[segment] >= sequence.request.exits.min_layer
            return self._in_force(sequence, segment, now) if allowed else NEVER
        alone = len(sequence.chunk) == 1
        follows = sequence.depth == segment and alone and not self._must_pay(sequence)
        return 0.0 if follows else NEVER

    def _in_force(self, sequence: Sequence, segment: int, now: float) -> float:
        thresholds = self._governor.thresholds
        return thresholds.of(sequence.request.exits, late=sequence.is_late(now))[segment]

    def _must_pay(self, sequence: Sequence) -> bool:
        """Whether the sequence may owe no more, so that only a full pass can pay."""
        most = self._info.max_exit_debt
        owed = len(self._ledger.owed(sequence.id))
        return not most or (sequence.fill in PAID_LATER and owed >= most)

    def _may_draft(self, sequence: Sequence, token: int) -> bool:
        """A draft that would end the answer is verified instead of built upon.

        So is one that its grammar does not allow: behind the end of a form nothing may be asked.
        """
        if sequence.grammar is not None:
            drafts = [*sequence.tokens[sequence.verified :], token]
            if sequence.grammar.allowed(drafts) < len(drafts):
                return False
        stops = token in sequence.request.sampling.stop_token_ids
        return not stops and draft_room(sequence, self._info) > 0


def _notes_depth(sequence: Sequence, segment: int) -> bool:
    """Note the exit as the whole answer's depth, where the prompt decides that; True if it does."""
    decides = CRITERIA[sequence.request.exits.criterion].decides_for_answer
    if not decides or sequence.num_generated:
        return False
    sequence.depth = segment if sequence.depth is None else sequence.depth
    return True
