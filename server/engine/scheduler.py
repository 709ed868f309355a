"""Which segment runs next, with which slots.

Pure Python: no torch, and no clock of its own. The core invariant: segment i runs for a slot at
position p only when every earlier position has K,V in all layers of segment i. A ride is one token
(decode) or a chunk of prompt; it starts at the ground segment and after each segment its newest
token leaves through the exit head or waits in the next segment's queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from offramp.models.step import FillKV, HeadRow, OwedRows, RunHead, RunSegment, SlotRows, Step
from offramp.server.engine.debt import Owed
from offramp.server.engine.memory import OutOfBlocks, SlotMemory
from offramp.server.engine.policy import ExitPolicy
from offramp.server.engine.queue import SlotQueue
from offramp.server.engine.slot import Place, Slot
from offramp.server.errors import BugError


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes that stay fixed while the engine lives.

    ``exit_layers`` and ``thresholds`` describe the exit points, ``num_layers`` the stack;
    ``max_debt`` is how many positions one slot may owe before it has to stay.
    """

    num_layers: int
    exit_layers: tuple[int, ...]
    thresholds: tuple[float, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_debt: int

    @property
    def num_segments(self) -> int:
        """Segments of the stack."""
        return len(self.exit_layers) + 1

    def layers_of(self, segment: int) -> int:
        """Layers of one segment."""
        bounds = (0, *self.exit_layers, self.num_layers)
        return bounds[segment + 1] - bounds[segment]


@dataclass(frozen=True, slots=True)
class Plan:
    """A step and the slots it is for, in the same order as its work."""

    step: Step
    slots: tuple[Slot, ...]


class Scheduler:
    """Owns every slot and queue."""

    def __init__(self, limits: Limits, memory: SlotMemory, policy: ExitPolicy) -> None:
        self.limits = limits
        self.memory = memory
        self.policy = policy
        self.waiting: deque[Slot] = deque()
        self.queues = [SlotQueue(Place.SEGMENT, i) for i in range(limits.num_segments)]
        self.head = SlotQueue(Place.HEAD)
        self.live: dict[int, Slot] = {}
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any slot is waiting or live."""
        return bool(self.waiting or self.live)

    def add(self, slot: Slot) -> None:
        """Queue a request's slot for admission."""
        self.waiting.append(slot)

    def release(self, slot: Slot) -> None:
        """Forget a slot, wherever it is, and give back what it holds."""
        if slot.place is Place.WAITING:
            self.waiting.remove(slot)
        else:
            self._leave_queue(slot)
            self.memory.release(slot)
            del self.live[slot.id]
        slot.place = Place.RELEASED

    def plan(self, now: float) -> Plan | None:
        """Choose the next step and reserve what it needs; None if there is nothing to do.

        Riders first, lowest segment first so that they gather on the way up; then the head for all
        that arrived; then the ground segment with everyone. A thin group may be held back while
        others go ahead (see ExitPolicy.holds).
        """
        upper = [i for i in range(1, len(self.queues)) if self.queues[i]]
        for segment in upper:
            if not self._holds(segment, now):
                return self._plan_upper(segment)
        if self.head:
            return self._plan_head()
        ground = self._plan_ground(now)
        if ground is None and upper:
            return self._plan_upper(upper[0])
        return ground

    def commit_segment(self, plan: Plan, leave: tuple[bool, ...], now: float) -> None:
        """Rows of ``plan`` went through their segment; ``leave`` tells whose gate fired."""
        assert isinstance(plan.step, RunSegment)
        segment = plan.step.segment
        fired = sum(leave)
        let_go = bool(fired) and self.policy.lets_go(segment, fired, len(leave) - fired)
        for slot, work, gate in zip(plan.slots, plan.step.work, leave, strict=True):
            self._ran(slot, segment, work)
            in_debt = len(self.memory.ledger.owed(slot.id)) >= self.limits.max_debt
            if gate and let_go and not in_debt:
                slot.leaving = segment
                self.head.put(slot, now)
                continue
            slot.stayed += gate
            self._rise(slot, segment, now)

    def commit_fill(self, plan: Plan) -> None:
        """The debts of the plan's slots were paid by projection or copy."""
        for slot in plan.slots:
            debts = self.memory.ledger.owed(slot.id)
            first = debts[0].position
            slot.exact = first if slot.exact is None else min(slot.exact, first)
            slot.computed = [max(n, debts[-1].position + 1) for n in slot.computed]
            self.memory.ledger.settle(slot.id)

    def commit_token(self, slot: Slot, now: float) -> None:
        """The slot got a token and goes on; if it left early it now owes the layers above."""
        if slot.leaving is None:
            self.memory.alight(slot, keep_last=False)
        else:
            debt = Owed(slot.ride_start, slot.leaving + 1, slot.ride_rows[-1])
            slot.ride_rows = []
            self.memory.ledger.owe(slot.id, debt)
            slot.leaving = None
        self.queues[0].put(slot, now)

    def check(self) -> None:
        """Audit: every slot in exactly one place, memory accounted for. Between steps only."""
        homes = [*self.queues, self.head]
        for slot in self.live.values():
            if sum(slot in home for home in homes) != 1 or slot in self.waiting:
                raise BugError(f"Slot {slot.id} is not in exactly one place.")
        if sum(map(len, homes)) != len(self.live):
            raise BugError("A queue holds a slot that is not live.")
        self.memory.check(self.live.values())

    def _holds(self, segment: int, now: float) -> bool:
        queue = self.queues[segment]
        ready = len(self.head) + len(self.queues[0])
        return self.policy.holds(segment, len(queue), ready, queue.oldest_age(now))

    def _plan_upper(self, segment: int) -> Plan:
        """Run an upper segment; debts that projection pays are filled first, in one launch."""
        queue = self.queues[segment]
        indebted = [
            slot
            for slot in queue
            if not slot.recomputes and self.memory.ledger.lacking(slot.id, segment)
        ]
        if indebted:
            return self._plan_fill(indebted)
        slots = queue.take_all()
        work = tuple(self._work(slot, segment) for slot in slots)
        return Plan(RunSegment(segment, work), tuple(slots))

    def _plan_fill(self, indebted: list[Slot]) -> Plan:
        method = indebted[0].request.exits.kv_fill
        slots = [slot for slot in indebted if slot.request.exits.kv_fill is method]
        work = tuple(owed for slot in slots for owed in _owed_rows(slot, self._debts(slot)))
        return Plan(FillKV(method, work), tuple(slots))

    def _debts(self, slot: Slot) -> list[Owed]:
        return self.memory.ledger.owed(slot.id)

    def _work(self, slot: Slot, segment: int) -> SlotRows:
        """The slot's rows for a segment: positions it owes there (recompute), then its ride."""
        start = slot.computed[segment]
        owed = [debt.row for debt in self.memory.ledger.lacking(slot.id, segment)]
        if start + len(owed) != slot.ride_start:
            raise BugError(f"Slot {slot.id} would skip positions in segment {segment}.")
        return SlotRows(
            start,
            (*owed, *slot.ride_rows),
            slot.table,
            threshold=self._threshold(slot, segment),
        )

    def _threshold(self, slot: Slot, segment: int) -> float | None:
        """Gate bound for the ride's token after ``segment``; None where it has to go on.

        Only decode tokens leave. A prompt's last token is never among them: it rides as a chunk.
        """
        exits = slot.request.exits
        if not slot.exits_on or segment >= len(self.limits.exit_layers):
            return None
        if slot.num_generated == 0 or len(slot.ride_rows) > 1 or not slot.riding_to_end:
            return None
        if self.limits.exit_layers[segment] < exits.min_layer:
            return None
        return self.limits.thresholds[segment] if exits.threshold is None else exits.threshold

    def _plan_head(self) -> Plan:
        slots = self.head.take_all()
        work = tuple(
            HeadRow(
                slot.ride_rows[-1],
                slot.leaving,
                slot.request.sampling,
                slot.num_generated,
                slot.tokens,
                slot.num_prompt,
            )
            for slot in slots
        )
        return Plan(RunHead(work), tuple(slots))

    def _plan_ground(self, now: float) -> Plan | None:
        """Decode tokens first, then chunks of admitted prompts, then new admissions."""
        chosen: list[Slot] = []
        budget = self.limits.max_num_batched_tokens
        decoding = [slot for slot in self.queues[0] if slot.decoding]
        prefilling = [slot for slot in self.queues[0] if not slot.decoding]
        for slot in [*decoding, *prefilling]:
            if slot.place is Place.SEGMENT and self._board(slot, budget, chosen):
                budget -= len(slot.ride_rows)
        for slot in self._admissions(now):
            if not self._board(slot, budget, chosen):
                break
            budget -= len(slot.ride_rows)
        if not chosen:
            return None
        work = tuple(self._ground_work(slot) for slot in chosen)
        return Plan(RunSegment(0, work), tuple(chosen))

    def _ground_work(self, slot: Slot) -> SlotRows:
        end = slot.ride_start + len(slot.ride_rows)
        return SlotRows(
            slot.ride_start,
            tuple(slot.ride_rows),
            slot.table,
            tuple(slot.tokens[slot.ride_start : end]),
            self._threshold(slot, 0),
        )

    def _admissions(self, now: float) -> Iterator[Slot]:
        """Admit waiting slots one by one, as long as there is room for them."""
        while self.waiting and len(self.live) < self.limits.max_num_seqs:
            slot = self.waiting[0]
            if not self.memory.admit(slot):
                return
            self.waiting.popleft()
            if slot.admitted_at is None:
                slot.admitted_at = now
            self.live[slot.id] = slot
            self.queues[0].put(slot, now)
            yield slot

    def _board(self, slot: Slot, budget: int, chosen: list[Slot]) -> bool:
        """Put the slot's next positions on a ride, preempting others for blocks if it must."""
        count = min(slot.remaining, budget, self.memory.rows.num_free)
        if count <= 0:
            return False
        while True:
            try:
                self.memory.grow(slot, slot.computed[0] + count)
                break
            except OutOfBlocks:
                if not self._preempt_one(slot, chosen):
                    return False
        self.memory.board(slot, count)
        self.queues[0].remove(slot)
        slot.place = Place.RUNNING
        chosen.append(slot)
        return True

    def _preempt_one(self, needy: Slot, chosen: list[Slot]) -> bool:
        """Send the slot admitted last back to waiting; False if that is the needy one itself."""
        victim = max(
            (slot for slot in self.live.values() if slot not in chosen),
            key=lambda slot: (slot.admitted_at or 0.0, slot.id),
        )
        self._leave_queue(victim)
        self.memory.release(victim)
        del self.live[victim.id]
        victim.restart()
        victim.place = Place.WAITING
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return victim is not needy

    def _leave_queue(self, slot: Slot) -> None:
        if slot.place is Place.SEGMENT:
            self.queues[slot.segment].remove(slot)
        elif slot.place is Place.HEAD:
            self.head.remove(slot)

    def _ran(self, slot: Slot, segment: int, work: SlotRows) -> None:
        end = work.start + len(work.rows)
        slot.computed[segment] = end
        self.memory.ledger.advance(slot.id, segment)
        # Position p makes token p + 1, so those from num_prompt - 1 on make the answer.
        answering = end - max(work.start, slot.num_prompt - 1)
        slot.layers_executed += max(0, answering) * self.limits.layers_of(segment)

    def _rise(self, slot: Slot, segment: int, now: float) -> None:
        """Up to the next segment; from the top to the head, or back down for the next chunk."""
        if segment + 1 < self.limits.num_segments:
            self.queues[segment + 1].put(slot, now)
            return
        self.memory.publish(slot)
        ends = slot.riding_to_end
        self.memory.alight(slot, keep_last=ends)
        (self.head if ends else self.queues[0]).put(slot, now)


def _owed_rows(slot: Slot, debts: list[Owed]) -> Iterator[OwedRows]:
    """Debts grouped into runs of consecutive positions that left at the same exit."""
    run: list[Owed] = []
    for debt in debts:
        if run and (run[-1].position + 1, run[-1].segment) != (debt.position, debt.segment):
            yield _as_rows(slot, run)
            run = []
        run.append(debt)
    if run:
        yield _as_rows(slot, run)


def _as_rows(slot: Slot, run: list[Owed]) -> OwedRows:
    rows = tuple(debt.row for debt in run)
    return OwedRows(run[0].segment, run[0].position, rows, slot.table)
