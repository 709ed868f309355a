"""The engine: plan, run, commit, one step at a time, on one thread."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol

from offramp.models.sampling_params import KVFill
from offramp.models.step import FillKV, RunHead, RunSegment, Step, StepResult
from offramp.server.engine.guard import LiveGuard
from offramp.server.engine.request import (
    EngineInfo,
    EngineOutput,
    FinishReason,
    GenerationRequest,
    StepStats,
    TokenEvent,
)
from offramp.server.engine.rides import Rides
from offramp.server.engine.scheduler import Plan, Scheduler
from offramp.server.engine.slot import Slot
from offramp.server.engine.threads import ThreadGovernor


class StepRunner(Protocol):
    """What carries steps out: models.runner.Runner, or a fake in tests."""

    def run(self, step: Step) -> StepResult:
        """Run one step to its end."""
        ...


class Engine:
    """Turns requests into token events.

    Only this object and the scheduler it drives change host state, and only while planning and
    committing; ``run`` sees plain data. ``audit`` checks the invariants after every step (tests);
    otherwise they are checked whenever the engine goes idle. ``guard`` watches over the quality of
    finished answers, ``threads`` over how many threads a step takes (None: it stays).
    """

    def __init__(
        self,
        info: EngineInfo,
        scheduler: Scheduler,
        runner: StepRunner,
        guard: LiveGuard | None = None,
        threads: ThreadGovernor | None = None,
        *,
        audit: bool = False,
    ) -> None:
        self.info = info
        self.scheduler = scheduler
        self.runner = runner
        self.guard = guard or LiveGuard(scheduler.targets, 0.0)
        self._threads = threads
        self._audit = audit
        self._ids = count()
        self._slots: dict[str, Slot] = {}
        self._events: list[TokenEvent] = []
        self._seen = (0,) * 6
        self._rode = False

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._slots or self._events or self.scheduler.has_work)

    def add(self, request: GenerationRequest, submitted_at: float) -> None:
        """Accept a request; what cannot be served at all ends in an error event."""
        slot = Slot(next(self._ids), request, submitted_at, self.scheduler.limits.num_segments)
        room = self.info.max_model_len - len(request.prompt)
        if not request.prompt or room < 1 or request.sampling.max_tokens < 1:
            error = "The prompt is empty, leaves no room for an answer, or none was asked for."
            self._emit(slot, (), FinishReason.ERROR, error=error)
            return
        self._slots[request.request_id] = slot
        self.scheduler.add(slot)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown ids are ignored, so aborting twice is harmless."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self.scheduler.release(slot)
            self._emit(slot, (), FinishReason.ABORT)

    def step(self) -> EngineOutput:
        """Plan, run, commit; returns the events since the last step."""
        begun = time.perf_counter()
        scheduler = self.scheduler
        scheduler.targets.observe_load(len(scheduler.boarding.waiting))
        rides = scheduler.boarding.rides or None
        # Rides take turns with other steps, so that neither waits for the other's end.
        plan = None if rides and not self._rode else scheduler.plan(time.monotonic())
        self._rode = plan is None
        stats = None
        if plan is not None:
            stats = self._run(plan, begun)
        elif rides:
            stats = self._ride(rides, begun)
        if self._audit or not scheduler.has_work:
            scheduler.check()
        events, self._events = tuple(self._events), []
        return EngineOutput(events, stats)

    def _run(self, plan: Plan, begun: float) -> StepStats:
        """Run a step of the scheduler's and commit it."""
        planned, used = time.perf_counter(), time.process_time()
        result = self.runner.run(plan.step)
        ran = time.perf_counter()
        if self._threads is not None:
            self._threads.observe(ran - planned, time.process_time() - used)
        before = self._totals(plan.slots)
        self._commit(plan, result)
        host = planned - begun + time.perf_counter() - ran
        kind, segment, prefill, decode, method = _describe(plan)
        top = kind == "segment" and segment + 1 == self.scheduler.limits.num_segments
        return self._stats(
            self._totals(plan.slots, before),
            kind=kind,
            segment=segment,
            seconds=result.seconds,
            host_seconds=host,
            prefill_rows=prefill,
            decode_rows=decode,
            fill_tokens=decode if kind == "fill" else 0,
            fill_method=method,
            exit_head_rows=result.head_rows,
            prompt_left=sum(map(len, result.prompt_left)),
            prompt_risen=_asking_prompt_rows(plan) if top else 0,
        )

    def _ride(self, rides: Rides, begun: float) -> StepStats:
        """Start a ride on the device, and commit what the one before made."""
        planned = time.perf_counter()
        landed = rides.fly()
        flown, now = time.perf_counter(), time.monotonic()
        slots = [slot for slot, _ in landed]
        before = self._totals(slots)
        for slot, token in landed:
            rides.commit(slot, token)
            self._commit_tokens(slot, [token.token], token.depth, now)
        left = sum(token.depth < self.info.num_layers for _, token in landed)
        return self._stats(
            self._totals(slots, before),
            kind="ride",
            segment=-1,
            seconds=flown - planned,
            host_seconds=planned - begun + time.perf_counter() - flown,
            prefill_rows=0,
            decode_rows=len(landed),
            fill_tokens=left,
            fill_method=str(KVFill.PROJECT) if left else "",
            exit_head_rows=rides.head_rows,
        )

    def _commit(self, plan: Plan, result: StepResult) -> None:
        now = time.monotonic()
        costs = self.scheduler.policy.costs
        match plan.step:
            case RunSegment(segment, work):
                rows = sum(len(item.rows) for item in work)
                costs.segments[segment].add(rows, result.seconds - result.check_seconds)
                asked = sum(item.check is not None for item in work)
                costs.checks[segment].add(asked, result.check_seconds)
                for slot, token in self.scheduler.commit_segment(plan, result, now):
                    self._commit_left(slot, token, segment, now)
            case FillKV(_, owed):
                costs.fill.add(sum(len(item.rows) for item in owed), result.seconds)
                self.scheduler.commit_fill(plan)
            case RunHead(heads):
                costs.head.add(len(heads), result.seconds)
                chosen = iter(result.token_ids)
                for slot in plan.slots:
                    self._commit_head(slot, [next(chosen) for _ in slot.ride], now)

    def _commit_left(self, slot: Slot, token: int, segment: int, now: float) -> None:
        """A token left after ``segment``: the answer's next one, or a guess of it (lossless)."""
        if slot.lossless:
            slot.guess([token])
            slot.match = 0
            self.scheduler.resume(slot, now)
            return
        slot.tokens.append(token)
        self._commit_tokens(slot, [token], self.info.exit_layers[segment], now)

    def _commit_head(self, slot: Slot, chosen: list[int], now: float) -> None:
        if slot.audit:
            self._commit_audit(slot, chosen, now)
            return
        certain = self.scheduler.commit_head(slot, chosen)
        self._commit_tokens(slot, certain, self.info.num_layers, now)

    def _commit_tokens(self, slot: Slot, tokens: list[int], layer: int, now: float) -> None:
        """``tokens`` are new at the end of the slot's verified ones."""
        if slot.first_token_at is None:
            slot.first_token_at = now
        first = slot.verified - len(tokens)
        reason = None
        for index, token in enumerate(tokens):
            reason = self._finish_reason(slot, token, first + index + 1)
            if reason is not None:
                tokens = tokens[: index + 1]
                slot.drop_drafts(first + len(tokens))
                break
        if reason is None:
            self.scheduler.resume(slot, now)
        else:
            self._finish(slot)
        self._emit(slot, tuple(tokens), reason, layer)

    def _finish(self, slot: Slot) -> None:
        self.scheduler.release(slot)
        del self._slots[slot.request.request_id]
        audits = self.scheduler.boarding.audits
        if self.guard.wants(slot, len(audits)):
            limits = self.scheduler.limits
            copy = Slot(next(self._ids), slot.request, slot.submitted_at, limits.num_segments)
            copy.read_again(slot.tokens)
            copy.scores = slot.scores
            audits.append(copy)

    def _commit_audit(self, slot: Slot, chosen: list[int], now: float) -> None:
        """Full depth's choices for part of a finished answer."""
        places = [p + 1 for p in slot.ride if p + 1 < len(slot.tokens)]
        # The row behind the answer's last token makes one more, which nobody asked for.
        for place, token in zip(places, chosen, strict=False):
            agreed = slot.tokens[place] == token
            slot.rejected += not agreed
            self.scheduler.learn(slot, place, agreed=agreed)
        ended = slot.riding_to_end
        self.scheduler.memory.alight(slot)
        if ended:
            self.scheduler.release(slot)
            self.guard.record(slot, slot.rejected)
        else:
            self.scheduler.resume(slot, now)

    def _finish_reason(self, slot: Slot, token: int, length: int) -> FinishReason | None:
        """Why the answer ends with ``token``, the ``length``-th of prompt and answer."""
        sampling = slot.request.sampling
        if token in sampling.stop_token_ids:
            return FinishReason.STOP
        full = length >= self.info.max_model_len
        if length - slot.num_prompt >= sampling.max_tokens or full:
            return FinishReason.LENGTH
        return None

    def _emit(
        self,
        slot: Slot,
        tokens: tuple[int, ...],
        reason: FinishReason | None,
        layer: int = 0,
        error: str | None = None,
    ) -> None:
        stats = slot.stats(time.monotonic() if reason else None)
        layers = (layer,) * len(tokens)
        event = TokenEvent(slot.request.request_id, tokens, layers, stats, reason, error)
        self._events.append(event)

    @staticmethod
    def _totals(slots: Sequence[Slot], before: Sequence[int] = (0,) * 4) -> tuple[int, ...]:
        """Sums over ``slots`` of what requests count for themselves, what they were left out."""
        now = (
            sum(slot.stayed for slot in slots),
            sum(slot.layers_executed for slot in slots),
            sum(slot.drafted for slot in slots),
            sum(slot.accepted for slot in slots),
        )
        return tuple(new - old for new, old in zip(now, before, strict=True))

    def _stats(self, grown: Sequence[int], *, fill_tokens: int, **own: Any) -> StepStats:
        """``own`` are the step's facts; the rest is read off the scheduler."""
        scheduler, memory, guard = self.scheduler, self.scheduler.memory, self.guard
        now = (
            scheduler.boarding.preemptions,
            memory.prefix_queries,
            memory.prefix_hits,
            guard.audited,
            guard.disagreements,
            scheduler.recomputed,
        )
        fresh = [new - old for new, old in zip(now, self._seen, strict=True)]
        self._seen = now
        stayed, layers, drafted, accepted = grown
        own["fill_method"] = own["fill_method"] or (str(KVFill.RECOMPUTE) if fresh[5] else "")
        return StepStats(
            **own,
            layers_executed=layers,
            running=len(scheduler.live),
            waiting=len(scheduler.boarding.waiting),
            kv_used_blocks=memory.blocks.num_used,
            kv_total_blocks=memory.blocks.num_blocks,
            debt_tokens=memory.ledger.total,
            segment_queue=scheduler.boarding.queue_lengths,
            fill_tokens=fill_tokens or fresh[5],
            preemptions=fresh[0],
            prefix_queries=fresh[1],
            prefix_hits=fresh[2],
            stayed=stayed,
            drafted=drafted,
            accepted=accepted,
            audited=fresh[3],
            disagreements=fresh[4],
            thresholds=scheduler.targets.thresholds,
            guard_level=scheduler.targets.guard_level,
            quality_target=scheduler.targets.quality or 0.0,
        )


def _describe(plan: Plan) -> tuple[str, int, int, int, str]:
    """Kind, segment, prefill rows, decode rows and fill method of a step."""
    match plan.step:
        case RunHead(heads):
            return "head", -1, 0, len(heads), ""
        case FillKV(method, owed):
            return "fill", owed[0].segment, 0, sum(len(item.rows) for item in owed), str(method)
        case RunSegment(segment, work):
            total = sum(len(item.rows) for item in work)
            decode = sum(
                len(item.positions) - bisect_left(item.positions, slot.num_prompt)
                for item, slot in zip(work, plan.slots, strict=True)
                if not slot.audit
            )
            return "segment", segment, total - decode, decode, ""


def _asking_prompt_rows(plan: Plan) -> int:
    """Prompt rows of a segment's run that belong to requests whose prompt tokens may leave."""
    assert isinstance(plan.step, RunSegment)
    return sum(
        bisect_left(item.positions, slot.num_prompt)
        for item, slot in zip(plan.step.work, plan.slots, strict=True)
        if slot.request.exits.prefill_threshold is not None and not slot.audit
    )
