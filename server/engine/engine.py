"""The engine: requests in, token events out, one step at a time, on one thread."""

from __future__ import annotations

import logging
import time
from collections import abc
from itertools import count

from offramp.server.engine.admission import Admission
from offramp.server.engine.blocks import SequenceMemory
from offramp.server.engine.decisions import Decisions
from offramp.server.engine.decoder import Decoder, TokenResult
from offramp.server.engine.guard import LiveGuard
from offramp.server.engine.request import (
    DecisionRequest,
    EngineInfo,
    EngineOutput,
    FinishReason,
    GenerationRequest,
    StepStats,
    TokenEvent,
)
from offramp.server.engine.sequence import Sequence
from offramp.server.errors import BugError

logger = logging.getLogger("offramp.engine")

# Steps that fail one after the other before the engine counts as broken.
_MOST_FAILURES = 3


class Engine:
    """Turns requests into token events.

    Admission decides who runs, ``decoders`` make the tokens: a sequence is with the first of them
    that accepts it, the last accepts all. ``decisions`` answers questions with fixed answers, in
    turns with them. Only these objects change state, on one thread. ``guard`` watches over the
    quality of finished answers. ``check_invariants`` checks them after every step (tests);
    otherwise they are checked whenever the engine goes idle.
    """

    def __init__(
        self,
        info: EngineInfo,
        admission: Admission,
        memory: SequenceMemory,
        decoders: abc.Sequence[Decoder],
        decisions: Decisions,
        guard: LiveGuard,
        *,
        check_invariants: bool = False,
    ) -> None:
        self.info = info
        self.admission = admission
        self.memory = memory
        self.decoders = tuple(decoders)
        self.decisions = decisions
        self.guard = guard
        self.thresholds = guard.thresholds
        self._turns: list[Decoder | Decisions] = [*decoders, decisions]
        self.check_invariants = check_invariants
        self._ids = count()
        self._sequences: dict[str, Sequence] = {}
        self._events: list[TokenEvent] = []
        self._totals = (0,) * 5
        self._failures = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._events or self.admission.has_work or self.decisions.has_work)

    def add(self, request: GenerationRequest | DecisionRequest, submitted_at: float) -> None:
        """Accept a request; what cannot be served at all ends in an error event."""
        if isinstance(request, DecisionRequest):
            self.decisions.add(request, submitted_at)
            return
        sequence = self._new_sequence(request, submitted_at)
        room = self.info.max_model_len - len(request.prompt)
        if not request.prompt or room < 1 or request.sampling.max_tokens < 1:
            error = "The prompt is empty, leaves no room for an answer, or max_tokens is 0."
            self._emit(sequence, (), FinishReason.ERROR, error=error)
            return
        self._sequences[request.request_id] = sequence
        self.admission.enqueue(sequence)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown ids are ignored, so aborting twice is harmless."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            self.decisions.abort(request_id)
            return
        self.admission.release(sequence)
        self._emit(sequence, (), FinishReason.ABORT)

    def step(self) -> EngineOutput:
        """Run one step of one decoder and commit it; returns the events since the last step."""
        self.thresholds.observe_load(len(self.admission.waiting))
        try:
            stats = self._advance()
            self._failures = 0
        except Exception:
            self._failures += 1
            if self._failures > _MOST_FAILURES:
                raise
            logger.exception("a step failed; the requests that ran end with an error")
            self._fail_running()
            stats = None
        if stats is None and self._events:
            # What ended without a step leaves its mark on the gauges too.
            stats = StepStats("idle", 0)
        if self.check_invariants or not (self.admission.has_work or self.decisions.has_work):
            self.check()
        events, self._events = tuple(self._events), []
        if stats is not None:
            self._add_gauges(stats)
        return EngineOutput(events, stats)

    def _advance(self) -> StepStats | None:
        """Let the first worker that has something to do run one step."""
        for worker in self._turns:
            if isinstance(worker, Decisions):
                ended, stats = worker.advance(time.monotonic())
                self._events += ended
            else:
                results, stats = worker.advance(time.monotonic())
                for result in results:
                    self._commit(result, time.monotonic())
            if stats is not None:
                # The others come first next time, so that none waits for another's end.
                self._turns.remove(worker)
                self._turns.append(worker)
                return stats
        return None

    def _fail_running(self) -> None:
        """End the requests that run: one of them is at fault, and which one is not known."""
        for sequence in list(self.admission.running.values()):
            self.admission.release(sequence)
            if not sequence.audit:
                del self._sequences[sequence.request.request_id]
                error = "The engine could not finish this request."
                self._emit(sequence, (), FinishReason.ERROR, error=error)

    def check(self) -> None:
        """Check that every running sequence is in exactly one place and memory is accounted for.

        Between steps only; raises BugError.
        """
        running = self.admission.running
        if sorted(i for each in self.decoders for i in each.sequence_ids()) != sorted(running):
            raise BugError("A running sequence is not in exactly one place.")
        if any(sequence.id in running for sequence in self.admission.waiting):
            raise BugError("A waiting sequence runs.")
        self.memory.check(running.values(), self.decisions.tables)

    def _commit(self, result: TokenResult, now: float) -> None:
        """New tokens of one sequence: it goes on, or ends."""
        sequence, tokens = result.sequence, result.tokens
        if sequence.audit:
            self._commit_audit(sequence, now)
            return
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        first = sequence.verified - len(tokens)
        reason = None
        for index, token in enumerate(tokens):
            reason = self._finish_reason(sequence, token, first + index + 1)
            if reason is not None:
                tokens = tokens[: index + 1]
                sequence.drop_drafts(first + len(tokens))
                break
        if reason is None:
            self._continue(sequence, now)
        else:
            self._finish(sequence)
        error = sequence.grammar.error if sequence.grammar and reason is not None else None
        if error is not None:
            reason, error = FinishReason.ERROR, f"The answer's grammar cannot be followed: {error}"
        self._emit(sequence, tuple(tokens), reason, error, result)

    def _continue(self, sequence: Sequence, now: float) -> None:
        decoder = next(each for each in self.decoders if each.accepts(sequence))
        decoder.add(sequence, now)

    def _finish(self, sequence: Sequence) -> None:
        self.admission.release(sequence)
        del self._sequences[sequence.request.request_id]
        if self.guard.wants(sequence, len(self.admission.audits)):
            audit = self._new_sequence(sequence.request, sequence.submitted_at)
            audit.make_audit(sequence.tokens)
            audit.scores = sequence.scores
            self.admission.audits.append(audit)

    def _commit_audit(self, sequence: Sequence, now: float) -> None:
        """Part of a finished answer was read again at full depth."""
        if sequence.remaining:
            self._continue(sequence, now)
            return
        self.admission.release(sequence)
        self.guard.record(sequence, sequence.rejected)

    def _finish_reason(self, sequence: Sequence, token: int, length: int) -> FinishReason | None:
        """Why the answer ends with ``token``, the ``length``-th of prompt and answer."""
        sampling = sequence.request.sampling
        if token in sampling.stop_token_ids:
            return FinishReason.STOP
        if sequence.grammar is not None:
            sequence.grammar.accept(token)
            if sequence.grammar.finished:
                return FinishReason.STOP
        full = length >= self.info.max_model_len
        if length - sequence.num_prompt >= sampling.max_tokens or full:
            return FinishReason.LENGTH
        return None

    def _new_sequence(self, request: GenerationRequest, submitted_at: float) -> Sequence:
        made = Sequence(next(self._ids), request, submitted_at, self.info.num_segments)
        made.exits_closed = not self.info.coarse and self.thresholds.takes_coarse(request.exits)
        made.coarse = self.info.coarse or made.exits_closed
        return made

    def _emit(
        self,
        sequence: Sequence,
        tokens: tuple[int, ...],
        reason: FinishReason | None,
        error: str | None = None,
        result: TokenResult | None = None,
    ) -> None:
        is_first = bool(tokens) and sequence.num_generated == len(tokens)
        prompt = tuple(sequence.prompt_logprobs) if is_first else ()
        stats = sequence.stats(time.monotonic() if reason else None)
        made = result or TokenResult(sequence, [], 0)
        self._events.append(
            TokenEvent(
                sequence.request.request_id,
                tokens,
                (made.layer,) * len(tokens),
                stats,
                reason,
                error,
                logprobs=made.logprobs[: len(tokens)],
                prompt_logprobs=prompt,
                sources=made.sources[: len(tokens)],
            )
        )

    def _add_gauges(self, stats: StepStats) -> None:
        """Add the state that the step left behind."""
        admission, memory, guard = self.admission, self.memory, self.guard
        totals = (
            admission.preemptions,
            memory.prefix_queries,
            memory.prefix_hits,
            guard.audited,
            guard.disagreements,
        )
        new = [now - before for now, before in zip(totals, self._totals, strict=True)]
        self._totals = totals
        stats.preemptions, stats.prefix_queries, stats.prefix_hits = new[:3]
        stats.audited, stats.disagreements = new[3:]
        stats.running = len(admission.running) + self.decisions.num_running
        stats.waiting = len(admission.waiting) + self.decisions.num_waiting
        stats.kv_used_blocks = memory.blocks.num_used
        stats.kv_total_blocks = memory.blocks.num_blocks
        stats.debt_tokens = memory.ledger.total
        lengths = [decoder.queue_lengths for decoder in self.decoders]
        stats.segment_queue = tuple(map(sum, zip(*lengths, strict=True)))
        stats.thresholds = self.thresholds.thresholds
        stats.guard_level = self.thresholds.guard_level
        stats.quality_target = self.thresholds.quality or 0.0
