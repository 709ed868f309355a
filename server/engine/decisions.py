"""Questions with fixed answers: prompts that climb the stack together until each one is decided.

Nothing is generated afterwards, so no K,V are owed: when all questions about an input are decided,
the layers above run for none of its tokens. The unit of work is a block of K,V. Each is known to
have been through so many segments (DecisionBlocks), and its states stay where its K,V are; a later
request that shares the block and wants more of it goes on from there.

An embedding is such a read behind all layers. Its mean is over the states of all positions, so of
cached blocks it takes only those whose states are there, of other decisions and embeddings, not the
ones that chats left.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from offramp.models.step import AnswerRead, Decide, PromptRows, StepRunner
from offramp.server.engine.blocks import SequenceMemory, block_hashes
from offramp.server.engine.decision_blocks import DecisionBlocks
from offramp.server.engine.request import (
    AnswerRequest,
    AnswerResult,
    DecisionRequest,
    EngineInfo,
    FinishReason,
    RequestStats,
    StepStats,
    TokenEvent,
)

logger = logging.getLogger("offramp.engine")

# Requests that climb at once, and rows of questions that one request has in the stack at once.
_MOST_JOBS = 32
_MOST_ROWS = 4096


@dataclass(slots=True, eq=False)
class _Prompt:
    """One read on its way; ``table`` has its own blocks from the ``own``-th on."""

    index: int
    request: AnswerRequest
    table: list[int]
    own: int


@dataclass(slots=True, eq=False)
class _Job:
    """One request.

    All its prompts begin with ``tokens``, which are in the ``shared`` blocks; ``digests`` are those
    of the full ones. Where they end inside a block, each prompt has a block of its own that begins
    like the last of them. Of ``waiting`` reads some are ``climbing``; they have been through
    ``segment`` segments.
    """

    request: DecisionRequest
    submitted_at: float
    tokens: tuple[int, ...]
    digests: list[bytes]
    waiting: deque[tuple[int, AnswerRequest]]
    shared: list[int] = field(default_factory=list)
    climbing: list[_Prompt] = field(default_factory=list)
    results: dict[int, AnswerResult] = field(default_factory=dict)
    segment: int = 0
    admitted_at: float | None = None
    cached: int = 0
    positions: int = 0
    executed: int = 0


@dataclass(slots=True)
class _Call:
    """Rows gathered for one step of a segment."""

    segment: int
    room: int
    work: list[PromptRows] = field(default_factory=list)
    blocks: dict[int, None] = field(default_factory=dict)
    jobs: list[_Job] = field(default_factory=list)
    asked: list[tuple[_Job, _Prompt]] = field(default_factory=list)
    reads: list[AnswerRead] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    rows: int = 0


class Decisions:
    """Owns the requests that wait for answers of a fixed set.

    Blocks come from the memory that all sequences share. A step runs one segment for the oldest
    request, and for what else stands before the same segment; a request of many rows takes turns
    with the others.
    """

    def __init__(self, info: EngineInfo, memory: SequenceMemory, runner: StepRunner) -> None:
        self._info = info
        self._memory = memory
        self._runner = runner
        self._bounds = (0, *info.decision_layers, info.num_layers)
        self._top = len(self._bounds) - 1
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._blocks = DecisionBlocks(memory, self._top)
        self._events: list[TokenEvent] = []

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running or self._events)

    @property
    def num_running(self) -> int:
        """Requests that climb."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._waiting)

    @property
    def tables(self) -> list[list[int]]:
        """The blocks held, for audits."""
        jobs = [job.shared for job in self._running]
        own = [each.table[each.own :] for job in self._running for each in job.climbing]
        return jobs + own

    def add(self, request: DecisionRequest, submitted_at: float) -> None:
        """Accept a request; what cannot be served at all ends in an error event."""
        size = self._info.block_size
        prompts = [read.tokens for read in request.reads]
        # The last token of each prompt is its own: an answer is read there.
        tokens = _common([tokens[:-1] for tokens in prompts])
        if len(prompts) == 1:
            tokens = tokens[: len(tokens) // size * size]
        digests = block_hashes(tokens, size)
        job = _Job(request, submitted_at, tokens, digests, deque(enumerate(request.reads)))
        fault = self._fault(request)
        if fault is not None:
            self._end(job, FinishReason.ERROR, fault)
            return
        self._waiting.append(job)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown ids are ignored."""
        for job in (*self._waiting, *self._running):
            if job.request.request_id == request_id:
                self._remove(job)
                self._end(job, FinishReason.ABORT)
                return

    def advance(self, now: float) -> tuple[list[TokenEvent], StepStats | None]:
        """Run one step; the events since the last one, and without anything to run no statistics.

        Whatever goes wrong in a step ends the requests it was for.
        """
        self._admit(now)
        climbing = [job for job in self._running if job.climbing]
        stats = None
        if climbing:
            call = _Call(climbing[0].segment, self._info.max_num_batched_tokens)
            for job in climbing:
                if job.segment == call.segment and call.room > 0:
                    self._gather(job, call)
            try:
                stats = self._run(call)
            except Exception:
                logger.exception("a step of decisions failed")
                self._fail(call)
                stats = StepStats("decisions", call.segment)
            self._take_turns(call)
        events, self._events = self._events, []
        return events, stats

    def _take_turns(self, call: _Call) -> None:
        """A request that did not fit into its step lets the others go first."""
        first = call.jobs[0]
        if first in self._running and first.segment == call.segment:
            self._running.remove(first)
            self._running.append(first)

    def _fault(self, request: DecisionRequest) -> str | None:
        longest = max((len(read.tokens) for read in request.reads), default=0)
        empty = not request.reads or any(
            not read.tokens or not (read.candidates or read.pooling) for read in request.reads
        )
        if empty or longest > self._info.max_model_len:
            return "A question is empty or longer than the model's context."
        return None

    def _admit(self, now: float) -> None:
        self._resume()
        while self._waiting and len(self._running) < _MOST_JOBS:
            job = self._waiting[0]
            if not self._share(job):
                break
            if not self._start(job):
                self._memory.blocks.release(job.shared)
                job.shared = []
                break
            self._waiting.popleft()
            self._running.append(job)
            if job.admitted_at is None:
                job.admitted_at = now
                if self._memory.prefix_caching:
                    self._memory.prefix_queries += len(job.tokens)
                    self._memory.prefix_hits += job.cached

    def _resume(self) -> None:
        """Start further reads of requests that have none climbing.

        If they leave no room for each other, the youngest waits again, its answers so far kept.
        """
        while True:
            for job in self._running:
                if not job.climbing:
                    self._start(job)
            if len(self._running) < 2 or any(job.climbing for job in self._running):
                return
            job = max(self._running, key=lambda each: each.submitted_at)
            self._remove(job)
            job.shared = []
            self._waiting.appendleft(job)

    def _share(self, job: _Job) -> bool:
        """Hold the blocks of what the job's prompts share, known ones first; False without room."""
        pool = self._memory.blocks
        # Heads and embeddings read means, for which a block's states must have been seen.
        plain = all(read.task is None and not read.pooling for read in job.request.reads)
        for digest in job.digests:
            found = self._blocks.find(digest, plain=plain)
            if found is None:
                break
            job.shared.append(found)
        size = self._info.block_size
        if job.admitted_at is None:
            job.cached, job.positions = len(job.shared) * size, len(job.tokens)
        after = job.shared[-1] if job.shared else -1
        total = -(-len(job.tokens) // size)
        new = pool.allocate(total - len(job.shared), after)
        if new is None:
            pool.release(job.shared)
            job.shared = []
            return False
        for index, block in enumerate(new, start=len(job.shared)):
            self._blocks.claim(block, job.digests[index] if index < len(job.digests) else None)
        job.shared += new
        return True

    def _start(self, job: _Job) -> bool:
        """Let waiting reads of a job climb, as many as there is room for."""
        pool, size = self._memory.blocks, self._info.block_size
        rows = 0
        while job.waiting and rows < _MOST_ROWS:
            index, request = job.waiting[0]
            full = len(job.digests)
            count = -(-len(request.tokens) // size) - full
            # The others' share of the cache is not for one request with many questions.
            if job.climbing and pool.num_free < pool.num_blocks // 4 + count:
                break
            own = pool.allocate(count, -1)
            if own is None:
                break
            for block in own:
                self._blocks.claim(block)
            job.waiting.popleft()
            job.climbing.append(_Prompt(index, request, job.shared[:full] + own, full))
            rows += len(request.tokens) - len(job.tokens)
        job.positions += rows
        job.segment = 0
        return bool(job.climbing)

    def _gather(self, job: _Job, call: _Call) -> None:
        """Add the job's rows that stand before the call's segment, as far as there is room.

        What its prompts share comes first: the others read its K,V.
        """
        call.jobs.append(job)
        if not self._add_rows(job, job.tokens, job.shared, 0, call):
            return
        begun = len(job.tokens) % self._info.block_size
        if begun and job.shared[-1] in call.blocks:
            # What others copy has to be there first.
            return
        for prompt in job.climbing:
            block = prompt.table[prompt.own]
            fresh = self._pending(block, call)
            done = self._add_rows(job, prompt.request.tokens, prompt.table, len(job.tokens), call)
            if begun and fresh and block in call.blocks:
                call.copies.append((job.shared[-1], block, begun))
            if not done:
                return
            if prompt.table[-1] in call.blocks and self._wanted(prompt.request, call.segment):
                call.asked.append((job, prompt))
                call.reads.append(self._read(prompt, call))

    def _read(self, prompt: _Prompt, call: _Call) -> AnswerRead:
        """What to read behind the last rows of the call."""
        request = prompt.request
        by_heads = request.labelled or call.segment < self._top - 1
        task = request.task if by_heads else None
        place, length = len(call.work) - 1, len(request.tokens)
        return AnswerRead(place, prompt.table, length, request.candidates, task, request.pooling)

    def _add_rows(
        self, job: _Job, tokens: Sequence[int], table: Sequence[int], first: int, call: _Call
    ) -> bool:
        """Add the positions from ``first`` on that have yet to run; False if not all had room."""
        size, layers = self._info.block_size, self._layers(call.segment)
        start = None
        for index in range(first // size, len(table) + 1):
            block = table[index] if index < len(table) else None
            pending = block is not None and self._pending(block, call)
            begin = max(index * size, first)
            count = min((index + 1) * size, len(tokens)) - begin
            fits = pending and (count <= call.room or not call.blocks)
            if fits:
                assert block is not None
                call.blocks[block] = None
                call.room -= count
                call.rows += count
                job.executed += count * layers
                start = begin if start is None else start
            elif start is not None:
                end = min(begin, len(tokens))
                own = tuple(tokens[start:end]) if call.segment == 0 else ()
                call.work.append(PromptRows(range(start, end), table, own, self._info.coarse))
                start = None
            if pending and not fits:
                return False
        return True

    def _pending(self, block: int, call: _Call) -> bool:
        return self._blocks.depth(block) <= call.segment and block not in call.blocks

    def _wanted(self, request: AnswerRequest, segment: int) -> bool:
        """Whether the answer may leave after ``segment``."""
        if segment == self._top - 1:
            return True
        return bool(request.thresholds) and request.thresholds[segment] <= 1

    def _run(self, call: _Call) -> StepStats:
        """Carry a call out and commit it."""
        step = Decide(call.segment, tuple(call.work), tuple(call.reads), tuple(call.copies))
        result = self._runner.run(step)
        self._blocks.ran(call.blocks, call.segment)
        for (job, prompt), logits in zip(call.asked, result.logits, strict=True):
            if self._decided(prompt.request, logits, call.segment):
                layer = self._bounds[call.segment + 1]
                job.results[prompt.index] = AnswerResult(logits, layer)
                job.climbing.remove(prompt)
                self._memory.blocks.release(prompt.table[prompt.own :])
        for job in call.jobs:
            self._go_on(job, call.segment)
        return StepStats(
            "decisions",
            call.segment,
            seconds=result.seconds,
            first_segment=call.segment,
            prefill_rows=call.rows,
            layers_executed=call.rows * self._layers(call.segment),
        )

    def _decided(self, request: AnswerRequest, logits: Sequence[float], segment: int) -> bool:
        if segment == self._top - 1:
            return True
        return top_probability(logits) >= request.thresholds[segment]

    def _go_on(self, job: _Job, segment: int) -> None:
        """The job goes to the next segment, starts with further reads, or ends."""
        if not job.climbing:
            if job.waiting:
                self._start(job)
                return
            self._remove(job)
            answers = tuple(job.results[index] for index in range(len(job.results)))
            self._end(job, FinishReason.STOP, answers=answers)
            return
        pending = [*job.shared, *(b for p in job.climbing for b in p.table[p.own :])]
        if all(self._blocks.depth(block) > segment for block in pending):
            job.segment = segment + 1

    def _fail(self, call: _Call) -> None:
        """End the requests of a step that failed, and those that hold what it left half done."""
        self._blocks.spoil(call.blocks)
        for job in list(self._running):
            if job in call.jobs or not call.blocks.keys().isdisjoint(job.shared):
                self._remove(job)
                self._end(job, FinishReason.ERROR, "The engine could not answer this request.")

    def _remove(self, job: _Job) -> None:
        """Forget a job, wherever it is, and free what it holds; what it shared stays findable."""
        if job not in self._running:
            self._waiting.remove(job)
            return
        self._running.remove(job)
        pool = self._memory.blocks
        self._blocks.publish(job.shared, job.digests)
        for prompt in job.climbing:
            pool.release(prompt.table[prompt.own :])
        pool.release(job.shared)

    def _end(
        self,
        job: _Job,
        reason: FinishReason,
        error: str | None = None,
        answers: tuple[AnswerResult, ...] = (),
    ) -> None:
        stats = RequestStats(
            submitted_at=job.submitted_at,
            admitted_at=job.admitted_at,
            prompt_tokens=job.positions,
            cached_tokens=job.cached,
            layers_executed=job.executed,
        )
        self._events.append(
            TokenEvent(job.request.request_id, (), (), stats, reason, error, answers)
        )

    def _layers(self, segment: int) -> int:
        return self._bounds[segment + 1] - self._bounds[segment]


def top_probability(logits: Sequence[float]) -> float:
    """Probability of the likeliest candidate."""
    top = max(logits)
    return 1 / math.fsum(math.exp(value - top) for value in logits)


def _common(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens with which all prompts begin."""
    if not prompts:
        return ()
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))
    count = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:count]
