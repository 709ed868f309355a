"""Decoding decided segment by segment on the host: which segment runs next, with which sequences.

Pure Python: no torch, and no clock of its own but to time steps. The core invariant: segment i runs
for a sequence at position p only when every earlier position has K,V in all layers of segment i. A
chunk is one token (decode), a token with drafts behind it (lossless) or a part of a prompt; it
starts at the first segment, and after each segment its newest token leaves or waits in the next
segment's queue.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, abc
from typing import Any

from offramp.models.sampling_params import KVFill
from offramp.models.step import (
    ExitCheck,
    FillKV,
    OwedRows,
    RunSegments,
    SequenceRows,
    StepResult,
    StepRunner,
)
from offramp.server.engine.admission import Admission
from offramp.server.engine.blocks import SequenceMemory
from offramp.server.engine.decoder import TokenResult
from offramp.server.engine.draft_trials import DraftTrials
from offramp.server.engine.drafting import Drafting
from offramp.server.engine.exit_decisions import PAID_LATER, ExitDecisions
from offramp.server.engine.governor import ExitGovernor
from offramp.server.engine.head_rows import HeadOutput, head_rows
from offramp.server.engine.kv_debt import Owed
from offramp.server.engine.request import EngineInfo, StepStats
from offramp.server.engine.sequence import Sequence, SequenceQueue
from offramp.server.engine.step_stats import checked_prompt_rows, step_stats
from offramp.server.engine.verification import token_sources, verify
from offramp.server.errors import BugError

_Planned = RunSegments | FillKV


class HostDecoder:
    """Segment queues, exit checks, K,V debts and drafts; every sequence can be decoded here.

    Prompts of all sequences run here as well, whatever decodes them afterwards. A step is planned,
    run and committed: planning takes blocks and rows, running sees plain data, committing writes
    what came of it. Where this decoder is not ``alone``, adaptive sequences belong to another.
    """

    def __init__(
        self,
        info: EngineInfo,
        admission: Admission,
        memory: SequenceMemory,
        governor: ExitGovernor,
        runner: StepRunner,
        *,
        alone: bool = True,
    ) -> None:
        self.governor = governor
        self.runner = runner
        self._info = info
        self._admission = admission
        self._memory = memory
        self._exits = ExitDecisions(info, governor, memory.ledger)
        self._drafting = Drafting(info, governor, memory, runner, adaptive=alone)
        self._trials = DraftTrials()
        self._queues = [SequenceQueue() for _ in range(info.num_segments)]
        self._counts: Counter[str] = Counter()
        """What has happened since the last statistics, by their field."""

    def accepts(self, sequence: Sequence) -> bool:
        """See Decoder."""
        del sequence
        return True

    def add(self, sequence: Sequence, now: float) -> None:
        """See Decoder: the sequence waits for the first segment, before that for drafts."""
        if (sequence.may_guess or sequence.grammar is not None) and not sequence.drafts:
            self._drafting.ask(sequence)
        sequence.decoder = self
        self._queues[0].put(sequence, now)

    def remove(self, sequence: Sequence) -> None:
        """See Decoder."""
        if sequence.queue is not None:
            sequence.queue.remove(sequence)
        self._drafting.forget(sequence)
        self._trials.interrupt()
        sequence.decoder = None

    @property
    def queue_lengths(self) -> tuple[int, ...]:
        """See Decoder."""
        return tuple(map(len, self._queues))

    def sequence_ids(self) -> list[int]:
        """See Decoder."""
        return [sequence.id for queue in self._queues for sequence in queue]

    def advance(self, now: float) -> tuple[list[TokenResult], StepStats | None]:
        """See Decoder."""
        begun = time.perf_counter()
        own = [each for each in self._admission.running.values() if each.decoder is self]
        running = len(own)
        sampled = 2 * sum(each.sampled for each in own) > running
        spared = self.governor.guesses_spare(running, sampled=sampled)
        guess = self._trials.begin(running, begun, sampled=sampled, spared=spared)
        keep_up = self._trials.near
        drafting = self._drafting.run(running, guess=guess, keep_up=keep_up, spared=spared)
        planned = self._plan(now)
        if planned is None:
            return [], None
        step, sequences = planned
        started = time.perf_counter()
        result = self.runner.run(step)
        ended = time.perf_counter()
        if isinstance(step, RunSegments):
            results = self._commit_segments(step, sequences, result, now)
        else:
            results = self._commit_fill(step, sequences, result)
        facts: dict[str, Any] = {"seconds": result.seconds, "draft_seconds": drafting}
        facts |= self._counts
        facts |= self._drafting.counts()
        self._counts.clear()
        host = started - begun - drafting + time.perf_counter() - ended
        facts["host_seconds"] = host
        if isinstance(step, RunSegments) and step.last + 1 == len(self._queues):
            facts["prompt_full"] = checked_prompt_rows(step.work, sequences)
            if step.first == 0:
                self.governor.costs.host.add(sum(len(item.rows) for item in step.work), host)
                if len(sequences) == running and self._drafting.tries(step.work, sequences):
                    self._trials.end(sum(len(each.tokens) for each in results))
        return results, step_stats(step, sequences, result, facts)

    def _plan(self, now: float) -> tuple[_Planned, list[Sequence]] | None:
        """Choose the next step and reserve what it needs; None if there is nothing to run.

        Sequences come in the order of the step's work. K,V that cannot wait are filled first. Then
        upper segments run, the lowest first so that sequences gather on the way up; then the first
        segment. A thin group may be held back while others go ahead (ExitGovernor.holds).
        """
        due = self._due()
        if due:
            return self._plan_fill(due)
        upper = [i for i in range(1, len(self._queues)) if self._queues[i]]
        for segment in upper:
            queue, ready = self._queues[segment], len(self._queues[0])
            if not self.governor.holds(segment, len(queue), ready, queue.oldest_age(now)):
                return self._plan_upper(segment, now)
        # What is held back would free blocks and needs none: no one is preempted for those ahead.
        first = self._plan_first(now, preempt=not upper)
        return self._plan_upper(upper[0], now) if first is None and upper else first

    def _due(self) -> list[Sequence]:
        """Sequences whose debts are paid before anything else.

        Prompt rows that left hold many hidden rows; and who may owe no more would have to stay.
        """
        ledger, most = self._memory.ledger, self._info.max_exit_debt
        indebted = [self._admission.running[id_] for id_ in sorted(ledger.sequences)]
        return [sequence for sequence in indebted if sequence.prompt_debt] or [
            sequence
            for sequence in indebted
            if len(ledger.owed(sequence.id)) >= most and sequence.fill not in PAID_LATER
        ]

    def _plan_upper(self, segment: int, now: float) -> tuple[_Planned, list[Sequence]]:
        """Run an upper segment; debts that a projection pays are filled first, in one launch."""
        queue, ledger = self._queues[segment], self._memory.ledger
        lacking = {each.id: len(ledger.lacking(each.id, segment)) for each in queue}
        indebted = [sequence for sequence in queue if lacking[sequence.id]]
        owed = sum(lacking.values())
        recompute = bool(owed) and self.governor.recompute_pays(segment, len(queue), owed)
        paying = [
            sequence
            for sequence in indebted
            if sequence.fill is not KVFill.RECOMPUTE
            and not (recompute and sequence.fill is KVFill.AUTO)
        ]
        if paying:
            return self._plan_fill(paying)
        return self._plan_segments(segment, queue.take_all(), now)

    def _plan_fill(self, indebted: list[Sequence]) -> tuple[_Planned, list[Sequence]]:
        method = _fill_method(indebted[0])
        sequences = [sequence for sequence in indebted if _fill_method(sequence) is method]
        work = tuple(
            owed
            for sequence in sequences
            for owed in _owed_rows(sequence, self._memory.ledger.owed(sequence.id))
        )
        return FillKV(method, work), sequences

    def _plan_first(self, now: float, *, preempt: bool) -> tuple[_Planned, list[Sequence]] | None:
        chosen = self._admission.schedule(self._queues[0], now, preempt=preempt)
        for sequence in chosen:
            if sequence.queue is not None:
                sequence.queue.remove(sequence)
            sequence.decoder = self
        if not chosen:
            return None
        return self._plan_segments(0, chosen, now)

    def _plan_segments(
        self, first: int, sequences: list[Sequence], now: float
    ) -> tuple[_Planned, list[Sequence]]:
        """Run ``sequences`` from ``first`` up to where one may leave, others join, or the top."""
        last = first
        checks = self._checks(last, sequences, now)
        while not self._stops(last, sequences, checks):
            last += 1
            checks = self._checks(last, sequences, now)
        work = tuple(
            self._work(sequence, first, last, check)
            for sequence, check in zip(sequences, checks, strict=True)
        )
        if last + 1 < len(self._queues):
            return RunSegments(first, last, work), sequences
        head, scored = head_rows(sequences, work)
        return RunSegments(first, last, work, head, scored), sequences

    def _checks(
        self, segment: int, sequences: list[Sequence], now: float
    ) -> list[ExitCheck | None]:
        self._exits.weigh(segment, sequences)
        return [self._exits.check(sequence, segment, now) for sequence in sequences]

    def _stops(self, last: int, sequences: list[Sequence], checks: list[ExitCheck | None]) -> bool:
        """Whether a step ends after segment ``last``: something is decided, or others join."""
        above = last + 1
        if above == len(self._queues) or self._queues[above]:
            return True
        owed = self._memory.ledger.owed
        return any(
            check is not None
            or self._exits.prompt_threshold(sequence, last) is not None
            or any(debt.segment == above for debt in owed(sequence.id))
            for sequence, check in zip(sequences, checks, strict=True)
        )

    def _work(
        self, sequence: Sequence, first: int, last: int, check: ExitCheck | None
    ) -> SequenceRows:
        """The sequence's rows from segment ``first`` on, and what is decided after ``last``.

        Positions owed at ``first`` (recompute) come before the chunk.
        """
        owed = self._memory.ledger.lacking(sequence.id, first)
        positions = [*(debt.position for debt in owed), *sequence.chunk]
        if positions[0] != sequence.computed[first] and sequence.exact is None:
            raise BugError(f"Sequence {sequence.id} would skip positions in segment {first}.")
        tokens = sequence.tokens[positions[0] : positions[-1] + 1] if first == 0 else ()
        return SequenceRows(
            positions,
            (*(debt.row for debt in owed), *sequence.chunk_rows),
            sequence.table,
            tuple(tokens),
            check,
            self._exits.prompt_threshold(sequence, last),
            self._exits.prompt_rows(sequence),
            sequence.coarse,
        )

    def _commit_segments(
        self, step: RunSegments, sequences: list[Sequence], result: StepResult, now: float
    ) -> list[TokenResult]:
        """Rows went up: tokens that leave, those that full depth chose, the others in a queue."""
        work, last = step.work, step.last
        self._learn_costs(step, result)
        leaving = self._exits.leaving(last, sequences, work, result)
        made = HeadOutput(result)
        results: list[TokenResult] = []
        for index, sequence in enumerate(sequences):
            self._ran(sequence, step, work[index])
            if result.prompt_left and result.prompt_left[index]:
                self._prompt_left(sequence, last, result.prompt_left[index])
            if leaving[index]:
                results += self._leave(sequence, last, index, result, now)
                continue
            if result.leave and result.leave[index] and sequence.num_generated > 0:
                sequence.stayed += 1
                sequence.kept = True
                self._counts["stayed"] += 1
            if last + 1 == len(self._queues) and sequence.chunk:
                results += self._commit_top(sequence, made, now)
            else:
                queue = last + 1 if sequence.chunk else 0
                self._queues[queue].put(sequence, now)
        return results

    def _learn_costs(self, step: RunSegments, result: StepResult) -> None:
        costs, rows = self.governor.costs, sum(len(item.rows) for item in step.work)
        for segment, seconds in enumerate(result.segment_seconds, step.first):
            costs.segments[segment].add(rows, seconds)
        checked = sum(item.check is not None for item in step.work)
        costs.checks[step.last].add(checked, result.check_seconds)
        costs.head.add(len(step.head), result.head_seconds)

    def _commit_fill(
        self, step: FillKV, sequences: list[Sequence], result: StepResult
    ) -> list[TokenResult]:
        """Debts were paid by projection or copy."""
        self.governor.costs.fill.add(sum(len(item.rows) for item in step.work), result.seconds)
        for sequence in sequences:
            debts = self._memory.ledger.owed(sequence.id)
            first = debts[0].position
            sequence.exact = first if sequence.exact is None else min(sequence.exact, first)
            if not sequence.prompt_debt:
                sequence.computed = [max(n, debts[-1].position + 1) for n in sequence.computed]
            elif sequence.chunk:
                sequence.filled.update(debt.position for debt in debts)
            else:
                sequence.computed = [sequence.computed[0]] * len(sequence.computed)
            sequence.prompt_debt = False
            self._memory.ledger.settle(sequence.id)
        return []

    def _commit_top(self, sequence: Sequence, made: HeadOutput, now: float) -> list[TokenResult]:
        """The sequence ran the top segment; its rows take theirs of what the LM head ``made``."""
        sequence.prompt_logprobs += made.scored(sequence)
        self._memory.publish(sequence)
        self._drafting.passed(sequence)
        # The row of position p verifies or makes token p + 1.
        self._memory.free_chunk(sequence, keep_from=sequence.verified - 1)
        if not sequence.chunk:
            self._queues[0].put(sequence, now)
            return []
        sequence.passes += 1
        chosen, logprobs = made.tokens(len(sequence.chunk))
        accepted = sequence.accepted[sequence.source]
        verified = verify(sequence, chosen, self.governor, self._drafting)
        accepted = sequence.accepted[sequence.source] - accepted
        # Only the chunk's last row has been at the exits.
        stayed = sequence.kept and len(verified) == len(chosen)
        sequence.kept = False
        self._memory.free_chunk(sequence)
        # What is verified are the first of those chosen.
        logprobs = logprobs[: len(verified)]
        sources = token_sources(sequence, len(verified), accepted, stayed=stayed)
        return [TokenResult(sequence, verified, self._info.num_layers, logprobs, sources)]

    def _leave(
        self, sequence: Sequence, segment: int, index: int, result: StepResult, now: float
    ) -> list[TokenResult]:
        """A token left after ``segment``: the answer's next one, or a draft of it (lossless)."""
        token, score = result.token_ids[index], result.scores[index] if result.scores else None
        if score is not None:
            sequence.scores[len(sequence.tokens)] = (segment, score)
        debt = Owed(sequence.chunk[-1], segment + 1, sequence.chunk_rows[-1])
        self._memory.ledger.owe(sequence.id, debt)
        sequence.chunk, sequence.chunk_rows = [], []
        sequence.kept = False
        sequence.left_early += 1
        if sequence.lossless:
            self._drafting.left_early(sequence, token)
            self.add(sequence, now)
            return []
        sequence.tokens.append(token)
        own = result.exit_logprobs[index] if result.exit_logprobs else None
        logprobs = () if own is None else (own,)
        return [TokenResult(sequence, [token], self._info.exit_layers[segment], logprobs)]

    def _ran(self, sequence: Sequence, step: RunSegments, work: SequenceRows) -> None:
        # Above the first segment, what left the chunk on the way has its K,V by now.
        done = sequence.computed[0] if step.first else work.positions[-1] + 1
        segments = range(step.first, step.last + 1)
        sequence.computed[step.first : step.last + 1] = [done] * len(segments)
        ledger = self._memory.ledger
        if sequence.lossless and step.last + 1 == len(self._queues):
            # What left early has now run every layer, and its tokens are due for verification.
            self._memory.rejoin(sequence)
        elif ledger.owed(sequence.id):
            paid = sum(ledger.advance(sequence.id, segment) for segment in segments)
            self._counts["fill_tokens"] += paid
        if not sequence.audit:
            # Position p makes token p + 1, so those from num_prompt - 1 on make the answer.
            prompt = bisect_left(work.positions, sequence.num_prompt - 1)
            rows = len(work.positions) - prompt
            layers = rows * sum(map(self._info.layers_of, segments))
            sequence.layers_executed += layers
            self._counts["layers_executed"] += layers

    def _prompt_left(self, sequence: Sequence, segment: int, indices: tuple[int, ...]) -> None:
        """Prompt rows left: their K,V above are owed, the others go on without them."""
        for index in indices:
            debt = Owed(sequence.chunk[index], segment + 1, sequence.chunk_rows[index])
            self._memory.ledger.owe(sequence.id, debt)
        gone = set(indices)
        kept = [index for index in range(len(sequence.chunk)) if index not in gone]
        sequence.chunk = [sequence.chunk[index] for index in kept]
        sequence.chunk_rows = [sequence.chunk_rows[index] for index in kept]
        above = self._info.num_layers - self._info.exit_layers[segment]
        sequence.prompt_layers_skipped += len(gone) * above
        sequence.prompt_debt = True


def _fill_method(sequence: Sequence) -> KVFill:
    return KVFill.PROJECT if sequence.fill in PAID_LATER else sequence.fill


def _owed_rows(sequence: Sequence, debts: list[Owed]) -> abc.Iterator[OwedRows]:
    """Debts grouped by the exit they left at."""
    for segment in sorted({debt.segment for debt in debts}):
        of = [debt for debt in debts if debt.segment == segment]
        rows = tuple(debt.row for debt in of)
        yield OwedRows(segment, [debt.position for debt in of], rows, sequence.table)
