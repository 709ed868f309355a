"""The engine: plan, run, commit, one step at a time, on one thread."""

from __future__ import annotations

import time
from itertools import count
from typing import Protocol

from offramp.models.step import FillKV, RunHead, RunSegment, Step, StepResult
from offramp.server.engine.request import (
    EngineInfo,
    EngineOutput,
    FinishReason,
    GenerationRequest,
    StepStats,
    TokenEvent,
)
from offramp.server.engine.scheduler import Plan, Scheduler
from offramp.server.engine.slot import Slot


class StepRunner(Protocol):
    """What carries steps out: models.runner.Runner, or a fake in tests."""

    def run(self, step: Step) -> StepResult:
        """Run one step to its end."""
        ...


class Engine:
    """Turns requests into token events.

    Only this object and the scheduler it drives change host state, and only while planning and
    committing; ``run`` sees plain data. ``audit`` checks the invariants after every step (tests);
    otherwise they are checked whenever the engine goes idle.
    """

    def __init__(
        self, info: EngineInfo, scheduler: Scheduler, runner: StepRunner, *, audit: bool = False
    ) -> None:
        self.info = info
        self.scheduler = scheduler
        self.runner = runner
        self._audit = audit
        self._ids = count()
        self._slots: dict[str, Slot] = {}
        self._events: list[TokenEvent] = []
        self._seen = (0, 0, 0)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._slots or self._events)

    def add(self, request: GenerationRequest, submitted_at: float) -> None:
        """Accept a request; what cannot be served at all ends in an error event."""
        slot = Slot(next(self._ids), request, submitted_at, self.scheduler.limits.num_segments)
        room = self.info.max_model_len - len(request.prompt)
        if not request.prompt or room < 1 or request.sampling.max_tokens < 1:
            error = "The prompt is empty, leaves no room for an answer, or none was asked for."
            self._emit(slot, (), (), FinishReason.ERROR, error)
            return
        self._slots[request.request_id] = slot
        self.scheduler.add(slot)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown ids are ignored, so aborting twice is harmless."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self.scheduler.release(slot)
            self._emit(slot, (), (), FinishReason.ABORT)

    def step(self) -> EngineOutput:
        """Plan, run, commit; returns the events since the last step."""
        begun = time.perf_counter()
        plan = self.scheduler.plan(time.monotonic())
        stats = None
        if plan is not None:
            planned = time.perf_counter()
            result = self.runner.run(plan.step)
            ran = time.perf_counter()
            stayed, layers = self._totals(plan)
            self._commit(plan, result)
            host = planned - begun + time.perf_counter() - ran
            after = self._totals(plan)
            stats = self._stats(plan, result.seconds, host, after[0] - stayed, after[1] - layers)
        if self._audit or not self.scheduler.has_work:
            self.scheduler.check()
        events, self._events = tuple(self._events), []
        return EngineOutput(events, stats)

    def _commit(self, plan: Plan, result: StepResult) -> None:
        now = time.monotonic()
        costs = self.scheduler.policy.costs
        match plan.step:
            case RunSegment(segment, work):
                rows = sum(len(item.rows) for item in work)
                costs.segments[segment].add(rows, result.seconds)
                self.scheduler.commit_segment(plan, result.leave, now)
            case FillKV(_, owed):
                costs.fill.add(sum(len(item.rows) for item in owed), result.seconds)
                self.scheduler.commit_fill(plan)
            case RunHead(heads):
                costs.head.add(len(heads), result.seconds)
                for slot, token in zip(plan.slots, result.token_ids, strict=True):
                    self._commit_token(slot, token, now)

    def _commit_token(self, slot: Slot, token: int, now: float) -> None:
        limits = self.scheduler.limits
        layer = limits.num_layers if slot.leaving is None else limits.exit_layers[slot.leaving]
        slot.tokens.append(token)
        if slot.first_token_at is None:
            slot.first_token_at = now
        reason = self._finish_reason(slot, token)
        if reason is None:
            self.scheduler.commit_token(slot, now)
        else:
            self.scheduler.release(slot)
            del self._slots[slot.request.request_id]
        self._emit(slot, (token,), (layer,), reason)

    def _finish_reason(self, slot: Slot, token: int) -> FinishReason | None:
        sampling = slot.request.sampling
        if token in sampling.stop_token_ids:
            return FinishReason.STOP
        full = len(slot.tokens) >= self.info.max_model_len
        if slot.num_generated >= sampling.max_tokens or full:
            return FinishReason.LENGTH
        return None

    def _emit(
        self,
        slot: Slot,
        tokens: tuple[int, ...],
        layers: tuple[int, ...],
        reason: FinishReason | None,
        error: str | None = None,
    ) -> None:
        stats = slot.stats(time.monotonic() if reason else None)
        event = TokenEvent(slot.request.request_id, tokens, layers, stats, reason, error)
        self._events.append(event)

    @staticmethod
    def _totals(plan: Plan) -> tuple[int, int]:
        return (
            sum(slot.stayed for slot in plan.slots),
            sum(slot.layers_executed for slot in plan.slots),
        )

    def _stats(
        self, plan: Plan, seconds: float, host: float, stayed: int, layers: int
    ) -> StepStats:
        scheduler, memory = self.scheduler, self.scheduler.memory
        kind, segment, prefill, decode, method = _describe(plan)
        now = (scheduler.preemptions, memory.prefix_queries, memory.prefix_hits)
        grown = tuple(new - old for new, old in zip(now, self._seen, strict=True))
        self._seen = now
        return StepStats(
            kind=kind,
            segment=segment,
            seconds=seconds,
            host_seconds=host,
            prefill_rows=prefill,
            decode_rows=decode,
            layers_executed=layers,
            running=len(scheduler.live),
            waiting=len(scheduler.waiting),
            kv_used_blocks=memory.blocks.num_used,
            kv_total_blocks=memory.blocks.num_blocks,
            debt_tokens=memory.ledger.total,
            segment_queue=tuple(len(queue) for queue in scheduler.queues),
            fill_tokens=decode if kind == "fill" else 0,
            fill_method=method,
            preemptions=grown[0],
            prefix_queries=grown[1],
            prefix_hits=grown[2],
            stayed=stayed,
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
                max(0, item.start + len(item.rows) - max(item.start, slot.num_prompt))
                for item, slot in zip(work, plan.slots, strict=True)
            )
            return "segment", segment, total - decode, decode, ""
