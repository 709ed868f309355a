"""What is asked of a token at an exit point, and what is made of the answer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from offramp.models.exits.criteria import STATEFUL
from offramp.models.sampling_params import NEVER, ExitCriterion, KVFill
from offramp.models.step import ExitCheck, HeadRow, SequenceRows, StepResult
from offramp.server.engine.debt import DebtLedger
from offramp.server.engine.policy import ExitPolicy
from offramp.server.engine.slot import Slot
from offramp.server.engine.targets import ExitTargets


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes that stay fixed while the engine lives.

    ``exit_layers`` are the exit points, ``num_layers`` the stack; ``max_debt`` is how many
    positions one slot may owe.
    """

    num_layers: int
    exit_layers: tuple[int, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_debt: int
    max_model_len: int

    @property
    def num_segments(self) -> int:
        """Segments of the stack."""
        return len(self.exit_layers) + 1

    def layers_of(self, segment: int) -> int:
        """Layers of one segment."""
        bounds = (0, *self.exit_layers, self.num_layers)
        return bounds[segment + 1] - bounds[segment]


class Asking:
    """Exit checks of the slots of a step, and who leaves after it."""

    def __init__(
        self, limits: Limits, policy: ExitPolicy, targets: ExitTargets, ledger: DebtLedger
    ) -> None:
        self._limits = limits
        self._policy = policy
        self._targets = targets
        self._ledger = ledger
        self._worth = True
        self._draft_bound = NEVER

    def open(self, segment: int, riders: int) -> None:
        """Weigh the checks of one step before they are asked for slot by slot."""
        if segment < len(self._limits.exit_layers):
            self._worth = self._policy.asks(segment, riders)
            self._draft_bound = self._policy.draft_bound(segment, riders)

    def check(self, slot: Slot, segment: int, now: float) -> ExitCheck | None:
        """The question to a slot's last row after ``segment``; None where it has to go on.

        Only a decode token riding alone may leave. A prompt's last token never does.
        """
        exits = slot.request.exits
        if not slot.exits_on or segment >= len(self._limits.exit_layers) or not slot.riding_to_end:
            return None
        if exits.criterion is ExitCriterion.PROMPT_DEPTH:
            return self._depth_check(slot, segment, now)
        if slot.num_generated == 0 or len(slot.ride) > 1:
            return None
        bound = self._bound(slot, segment, now)
        if bound > 1 and exits.criterion not in STATEFUL:
            return None
        return ExitCheck(exits.criterion, bound, _next_head(slot))

    def prompt_threshold(self, slot: Slot, segment: int) -> float | None:
        """Gate score at which prompt rows leave after ``segment``; None where they may not."""
        exits = slot.request.exits
        if not slot.exits_on or segment >= len(self._limits.exit_layers):
            return None
        if self._limits.exit_layers[segment] < exits.min_layer or not self.prompt_rows(slot):
            return None
        return exits.prefill_threshold

    def prompt_rows(self, slot: Slot) -> int:
        """Leading rows of the ride that hold prompt tokens, the prompt's last one left out."""
        if slot.request.exits.prefill_threshold is None:
            return 0
        return bisect_left(slot.ride, slot.num_prompt - 1)

    def verdict(
        self, segment: int, slots: Sequence[Slot], work: Sequence[SequenceRows], result: StepResult
    ) -> list[bool]:
        """Who leaves after ``segment``: allowed by the score, and worth it."""
        asked = sum(item.check is not None for item in work)
        if not any(result.leave):
            self._policy.observe(segment, asked, 0)
            return [False] * len(slots)
        fired = [
            leave and not self._notes_depth(slot, segment)
            for leave, slot in zip(result.leave, slots, strict=True)
        ]
        self._policy.observe(segment, asked, sum(fired))
        leaving = sum(fire and not slot.lossless for fire, slot in zip(fired, slots, strict=True))
        pays = bool(leaving) and self._policy.lets_go(segment, leaving, len(slots) - leaving)
        return [
            fire and (self._may_guess(slot, token) if slot.lossless else pays)
            for fire, slot, token in zip(fired, slots, result.token_ids, strict=True)
        ]

    def guesses(self, slot: Slot, riders: int) -> list[int]:
        """Tokens looked up in the text so far, as many as are worth verifying."""
        match = slot.lookup.find(slot.tokens)
        slot.match = 0
        if match is None:
            return []
        slot.match = match.size
        slot.shares = slot.shares or self._policy.lookups.copy()
        count = self._policy.lookup_length(slot.shares, match.size, max(1, riders))
        room = min(self._room(slot), self._limits.max_num_batched_tokens - 1)
        return slot.tokens[match.end : match.end + max(0, min(count, room))]

    def _bound(self, slot: Slot, segment: int, now: float) -> float:
        exits = slot.request.exits
        if self._limits.exit_layers[segment] < exits.min_layer or self._must_pay(slot):
            return NEVER
        if slot.lossless:
            wished = 0.0 if exits.thresholds is None else exits.thresholds[segment]
            return max(self._draft_bound, wished)
        if not self._worth:
            return NEVER
        return self._targets.of(exits, late=_late(slot, now))[segment]

    def _must_pay(self, slot: Slot) -> bool:
        """Whether the slot may owe no more and only a ride to the top can pay."""
        most = self._limits.max_debt
        rides_along = slot.fill in {KVFill.RECOMPUTE, KVFill.AUTO}
        return not most or (rides_along and len(self._ledger.owed(slot.id)) >= most)

    def _depth_check(self, slot: Slot, segment: int, now: float) -> ExitCheck | None:
        """FiRST: the prompt's last row is asked at every exit; later tokens obey its answer."""
        if slot.num_generated == 0:
            bound = self._targets.of(slot.request.exits, late=_late(slot, now))[segment]
            allowed = self._limits.exit_layers[segment] >= slot.request.exits.min_layer
            return ExitCheck(ExitCriterion.GATE, bound, _next_head(slot)) if allowed else None
        if slot.depth != segment or len(slot.ride) > 1 or self._must_pay(slot):
            return None
        return ExitCheck(ExitCriterion.FIXED, 0.0, _next_head(slot))

    @staticmethod
    def _notes_depth(slot: Slot, segment: int) -> bool:
        """Whether a firing gate chose the depth of the whole answer rather than an exit."""
        chooses = slot.request.exits.criterion is ExitCriterion.PROMPT_DEPTH
        if not chooses or slot.num_generated:
            return False
        slot.depth = segment if slot.depth is None else slot.depth
        return True

    def _may_guess(self, slot: Slot, token: int) -> bool:
        """A guess that would end the answer is verified instead of built upon."""
        return token not in slot.request.sampling.stop_token_ids and self._room(slot) > 0

    def _room(self, slot: Slot) -> int:
        """Guesses a slot may add and still have a token of the answer left to make."""
        answer = len(slot.tokens) - slot.num_prompt
        room = slot.request.sampling.max_tokens - answer
        return min(room, self._limits.max_model_len - len(slot.tokens)) - 1


def _next_head(slot: Slot) -> HeadRow:
    index = len(slot.tokens) - slot.num_prompt
    return HeadRow(slot.ride_rows[-1], slot.request.sampling, index, slot.tokens, slot.num_prompt)


def _late(slot: Slot, now: float) -> bool:
    """Whether the answer, at its pace so far, would end after its deadline.

    An answer that may be of any length is expected to use all the tokens it was given.
    """
    deadline, first = slot.request.exits.deadline_s, slot.first_token_at
    if deadline is None or first is None or slot.num_generated < 2:
        return False
    pace = (now - first) / (slot.num_generated - 1)
    left = slot.request.sampling.max_tokens - slot.num_generated
    return now + left * pace > slot.submitted_at + deadline
