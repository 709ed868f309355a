"""Which segment runs next, with which slots.

Pure Python: no torch, and no clock of its own. The core invariant: segment i runs for a slot at
position p only when every earlier position has K,V in all layers of segment i. A ride is one token
(decode), a token with guesses behind it (lossless) or a chunk of prompt; it starts at the ground
segment and after each segment its newest token leaves or waits in the next segment's queue.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from offramp.models.sampling_params import KVFill
from offramp.models.step import (
    FillKV,
    HeadRow,
    OwedRows,
    RunHead,
    RunSegment,
    SequenceRows,
    Step,
    StepResult,
)
from offramp.server.engine.asking import Asking, Limits
from offramp.server.engine.boarding import Boarding
from offramp.server.engine.debt import Owed
from offramp.server.engine.memory import SequenceMemory
from offramp.server.engine.policy import ExitPolicy
from offramp.server.engine.queue import SequenceQueue
from offramp.server.engine.rides import Rides
from offramp.server.engine.slot import Place, Slot
from offramp.server.engine.targets import ExitTargets
from offramp.server.errors import BugError

__all__ = ["Limits", "Plan", "Scheduler"]

# Fills that may run owed rows together with a later ride.
_RIDES_ALONG = frozenset({KVFill.AUTO, KVFill.RECOMPUTE})
# What a request's own guesses count for itself, and for those to come.
_OWN_RENEWAL, _COMMON_RENEWAL = 0.1, 0.01


@dataclass(frozen=True, slots=True)
class Plan:
    """A step and the slots it is for, in the same order as its work.

    A head has work for each row of a slot's ride, so it may have several rows for one slot.
    """

    step: Step
    slots: tuple[Slot, ...]


class Scheduler:
    """Owns every slot and queue."""

    def __init__(
        self, limits: Limits, memory: SequenceMemory, policy: ExitPolicy, targets: ExitTargets
    ) -> None:
        self.limits = limits
        self.memory = memory
        self.policy = policy
        self.targets = targets
        self.asking = Asking(limits, policy, targets, memory.ledger)
        self.queues = [SequenceQueue(Place.SEGMENT, i) for i in range(limits.num_segments)]
        self.head = SequenceQueue(Place.HEAD)
        self.live: dict[int, Slot] = {}
        self.boarding = Boarding(limits, memory, self.queues, self.head, self.live)
        self.recomputed = 0
        """Debts paid so far by running the layers they skipped."""
        self._prompt_debtors: dict[int, Slot] = {}

    @property
    def has_work(self) -> bool:
        """Whether any slot is waiting or live."""
        return bool(self.boarding.waiting or self.live or self.boarding.audits)

    def add(self, slot: Slot) -> None:
        """Queue a request's slot for admission."""
        self.boarding.waiting.append(slot)

    def release(self, slot: Slot) -> None:
        """Forget a slot, wherever it is, and give back what it holds."""
        if slot.place is Place.WAITING:
            self.boarding.waiting.remove(slot)
        else:
            self.boarding.take_out(slot)
            self._prompt_debtors.pop(slot.id, None)
        slot.place = Place.RELEASED

    def plan(self, now: float) -> Plan | None:
        """Choose the next step and reserve what it needs; None if there is nothing to do.

        K,V that cannot wait are filled first. Then riders, lowest segment first so that they
        gather on the way up; then the head for all that arrived; then the ground segment with
        everyone. A thin group may be held back while others go ahead (see ExitPolicy.holds).
        """
        due = self._due()
        if due:
            return self._plan_fill(due)
        upper = [i for i in range(1, len(self.queues)) if self.queues[i]]
        for segment in upper:
            if not self._holds(segment, now):
                return self._plan_upper(segment, now)
        if self.head:
            return self._plan_head()
        ground = self._plan_ground(now)
        if ground is None and upper:
            return self._plan_upper(upper[0], now)
        return ground

    def commit_segment(self, plan: Plan, result: StepResult, now: float) -> list[tuple[Slot, int]]:
        """Rows of ``plan`` went through their segment; returns slots that left, with their token.

        The caller must pass each of those to `resume` or `release`.
        """
        assert isinstance(plan.step, RunSegment)
        segment, work = plan.step.segment, plan.step.work
        leave = result.leave or (False,) * len(work)
        going = self.asking.verdict(segment, plan.slots, work, result)
        left: list[tuple[Slot, int]] = []
        for index, slot in enumerate(plan.slots):
            self._ran(slot, segment, work[index])
            if result.prompt_left and result.prompt_left[index]:
                self._prompt_left(slot, segment, result.prompt_left[index])
            if going[index]:
                debt = Owed(slot.ride[-1], segment + 1, slot.ride_rows[-1])
                slot.ride, slot.ride_rows = [], []
                slot.left_early += 1
                score = result.scores[index] if result.scores else None
                if score is not None:
                    slot.scores[len(slot.tokens)] = (segment, score)
                self.memory.ledger.owe(slot.id, debt)
                left.append((slot, result.token_ids[index]))
                continue
            slot.stayed += leave[index] and slot.num_generated > 0
            self._rise(slot, segment, now)
        return left

    def commit_fill(self, plan: Plan) -> None:
        """The debts of the plan's slots were paid by projection or copy."""
        for slot in plan.slots:
            debts = self.memory.ledger.owed(slot.id)
            first = debts[0].position
            slot.exact = first if slot.exact is None else min(slot.exact, first)
            if self._prompt_debtors.pop(slot.id, None) is None:
                slot.computed = [max(n, debts[-1].position + 1) for n in slot.computed]
            elif slot.ride:
                slot.filled.update(debt.position for debt in debts)
            else:
                slot.computed = [slot.computed[0]] * len(slot.computed)
            self.memory.ledger.settle(slot.id)

    def commit_head(self, slot: Slot, chosen: list[int]) -> list[int]:
        """Full depth chose ``chosen`` for the rows of the slot's ride; returns what is now certain.

        Guesses are compared one after another; the first wrong one is replaced and all behind it
        are forgotten, with their K,V. The caller must pass the slot to `resume` or `release`.
        """
        certain: list[int] = []
        for place, (position, token) in enumerate(zip(slot.ride, chosen, strict=True)):
            if position + 1 < len(slot.tokens):
                right = slot.tokens[position + 1] == token
                slot.accepted += right
                slot.rejected += not right
                self.learn(slot, position + 1, agreed=right)
                if slot.match and slot.shares is not None:
                    size = slot.match + place
                    slot.shares.add(size, _OWN_RENEWAL, right=right)
                    self.policy.lookups.add(size, _COMMON_RENEWAL, right=right)
                certain.append(token)
                if right:
                    slot.drafts -= 1
                    continue
                slot.drop_drafts(position + 1)
            else:
                certain.append(token)
            slot.tokens.append(token)
            break
        self.memory.alight(slot)
        return certain

    def learn(self, slot: Slot, index: int, *, agreed: bool) -> None:
        """Full depth checked a token that may have left early: its ``index`` in the slot's text."""
        left = slot.scores.pop(index, None)
        if left is not None and slot.lossless:
            self.policy.observe_guess(left[0], right=agreed)
        if left is not None and self.targets.online is not None:
            self.targets.online.add(*left, agreed=agreed)

    def resume(self, slot: Slot, now: float) -> None:
        """The slot got a token, certain or guessed, and goes on with it from the ground."""
        if slot.lossless and not slot.drafts:
            slot.guess(self.asking.guesses(slot, len(self.live)))
        self.boarding.resume(slot, now)

    def check(self) -> None:
        """Audit: every slot in exactly one place, memory accounted for. Between steps only."""
        homes: list[SequenceQueue | Rides] = [*self.queues, self.head]
        if self.boarding.rides is not None:
            homes.append(self.boarding.rides)
        for slot in self.live.values():
            if sum(slot in home for home in homes) != 1 or slot in self.boarding.waiting:
                raise BugError(f"Slot {slot.id} is not in exactly one place.")
        if sum(map(len, homes)) != len(self.live):
            raise BugError("A queue holds a slot that is not live.")
        self.memory.check(self.live.values())

    def _due(self) -> list[Slot]:
        """Slots whose debts are paid before anything else.

        Prompt rows that left hold many hidden rows; and who may owe no more would have to stay.
        """
        # One that was sent back to waiting has nothing to pay any more.
        self._prompt_debtors = {
            slot.id: slot for slot in self._prompt_debtors.values() if slot.id in self.live
        }
        if self._prompt_debtors:
            return list(self._prompt_debtors.values())
        ledger, most = self.memory.ledger, self.limits.max_debt
        return [
            slot
            for slot in map(self.live.__getitem__, sorted(ledger.slots))
            if len(ledger.owed(slot.id)) >= most and slot.fill not in _RIDES_ALONG
        ]

    def _holds(self, segment: int, now: float) -> bool:
        queue = self.queues[segment]
        ready = len(self.head) + len(self.queues[0])
        return self.policy.holds(segment, len(queue), ready, queue.oldest_age(now))

    def _plan_upper(self, segment: int, now: float) -> Plan:
        """Run an upper segment; debts that a projection pays are filled first, in one launch."""
        queue = self.queues[segment]
        indebted = [slot for slot in queue if self.memory.ledger.lacking(slot.id, segment)]
        owed = sum(len(self.memory.ledger.lacking(slot.id, segment)) for slot in indebted)
        along = bool(indebted) and self.policy.recompute_pays(segment, len(queue), owed)
        paying = [
            slot
            for slot in indebted
            if slot.fill is not KVFill.RECOMPUTE and not (along and slot.fill is KVFill.AUTO)
        ]
        if paying:
            return self._plan_fill(paying)
        slots = queue.take_all()
        self.asking.open(segment, len(slots))
        work = tuple(self._work(slot, segment, now) for slot in slots)
        return Plan(RunSegment(segment, work), tuple(slots))

    def _plan_fill(self, indebted: list[Slot]) -> Plan:
        method = _method(indebted[0])
        slots = [slot for slot in indebted if _method(slot) is method]
        work = tuple(
            owed for slot in slots for owed in _owed_rows(slot, self.memory.ledger.owed(slot.id))
        )
        return Plan(FillKV(method, work), tuple(slots))

    def _work(self, slot: Slot, segment: int, now: float) -> SequenceRows:
        """The slot's rows for a segment: positions it owes there (recompute), then its ride."""
        owed = self.memory.ledger.lacking(slot.id, segment)
        positions = [*(debt.position for debt in owed), *slot.ride]
        if positions[0] != slot.computed[segment] and slot.exact is None:
            raise BugError(f"Slot {slot.id} would skip positions in segment {segment}.")
        return SequenceRows(
            positions,
            (*(debt.row for debt in owed), *slot.ride_rows),
            slot.table,
            check=self.asking.check(slot, segment, now),
            prompt_threshold=self.asking.prompt_threshold(slot, segment),
            prompt_rows=self.asking.prompt_rows(slot),
        )

    def _plan_head(self) -> Plan:
        slots = self.head.take_all()
        work = tuple(
            _head_row(slot, position, row)
            for slot in slots
            for position, row in zip(slot.ride, slot.ride_rows, strict=True)
        )
        return Plan(RunHead(work), tuple(slots))

    def _plan_ground(self, now: float) -> Plan | None:
        chosen = self.boarding.choose(now)
        if not chosen:
            return None
        self.asking.open(0, len(chosen))
        work = tuple(self._ground_work(slot, now) for slot in chosen)
        return Plan(RunSegment(0, work), tuple(chosen))

    def _ground_work(self, slot: Slot, now: float) -> SequenceRows:
        return SequenceRows(
            slot.ride,
            tuple(slot.ride_rows),
            slot.table,
            tuple(slot.tokens[slot.ride[0] : slot.ride[-1] + 1]),
            self.asking.check(slot, 0, now),
            self.asking.prompt_threshold(slot, 0),
            self.asking.prompt_rows(slot),
        )

    def _ran(self, slot: Slot, segment: int, work: SequenceRows) -> None:
        # Above the ground, what left the ride on the way has its K,V by now.
        slot.computed[segment] = slot.computed[0] if segment else work.positions[-1] + 1
        if slot.lossless and segment + 1 == self.limits.num_segments:
            # What left early has now run every layer, and its tokens are due for verification.
            self.memory.rejoin(slot)
        else:
            self.recomputed += self.memory.ledger.advance(slot.id, segment)
        if not slot.audit:
            # Position p makes token p + 1, so those from num_prompt - 1 on make the answer.
            prompt = bisect_left(work.positions, slot.num_prompt - 1)
            answering = len(work.positions) - prompt
            slot.layers_executed += answering * self.limits.layers_of(segment)

    def _prompt_left(self, slot: Slot, segment: int, indices: tuple[int, ...]) -> None:
        """Prompt rows left: their K,V above are owed, the others ride on without them."""
        gone = set(indices)
        for index in indices:
            debt = Owed(slot.ride[index], segment + 1, slot.ride_rows[index])
            self.memory.ledger.owe(slot.id, debt)
        kept = [index for index in range(len(slot.ride)) if index not in gone]
        slot.ride = [slot.ride[index] for index in kept]
        slot.ride_rows = [slot.ride_rows[index] for index in kept]
        above = self.limits.num_layers - self.limits.exit_layers[segment]
        slot.prompt_layers_skipped += len(gone) * above
        self._prompt_debtors[slot.id] = slot

    def _rise(self, slot: Slot, segment: int, now: float) -> None:
        """Up to the next segment; from the top to the head, or back down for the next chunk."""
        if not slot.ride:
            self.queues[0].put(slot, now)
            return
        if segment + 1 < self.limits.num_segments:
            self.queues[segment + 1].put(slot, now)
            return
        self.memory.publish(slot)
        # The row of position p verifies or makes token p + 1.
        self.memory.alight(slot, keep_from=slot.verified - 1)
        (self.head if slot.ride else self.queues[0]).put(slot, now)


def _method(slot: Slot) -> KVFill:
    return KVFill.PROJECT if slot.fill in _RIDES_ALONG else slot.fill


def _head_row(slot: Slot, position: int, row: int) -> HeadRow:
    sampling, count = slot.request.sampling, position + 1
    # Penalties must not see the guesses behind the row.
    cut = sampling.adjusts_logits and count < len(slot.tokens)
    tokens = slot.tokens[:count] if cut else slot.tokens
    return HeadRow(row, sampling, count - slot.num_prompt, tokens, slot.num_prompt)


def _owed_rows(slot: Slot, debts: list[Owed]) -> Iterator[OwedRows]:
    """Debts grouped by the exit they left at."""
    for segment in sorted({debt.segment for debt in debts}):
        of = [debt for debt in debts if debt.segment == segment]
        rows = tuple(debt.row for debt in of)
        yield OwedRows(segment, [debt.position for debt in of], rows, slot.table)
