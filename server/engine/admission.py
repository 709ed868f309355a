"""Who may run: the waiting line, chunks of prompts, room in the cache, and preemption.

Alike for all devices. A decoder takes each step's new positions from `Admission.schedule`, and
room for one more token from `Admission.make_room`.
"""

from __future__ import annotations

from bisect import insort
from collections import abc, deque

from offramp.server.engine.blocks import SequenceMemory
from offramp.server.engine.request import EngineInfo
from offramp.server.engine.sequence import Sequence

# Prompt rows an audit may add to a step beside other requests.
_AUDIT_ROWS = 32
# Rows of prompts beside each row of an answer, and the fewest beside any: they bound how long a new
# prompt keeps answers waiting for their next tokens. Prompts take no longer in small chunks; what
# they wait for is the answers' rows among theirs.
_PROMPT_ROWS_BESIDE = 16
_FEWEST_PROMPT_ROWS = 64
# Seconds after which a request's priority no longer keeps it waiting.
_LONGEST_WAIT_S = 60.0


class Admission:
    """Owns the sequences: those that wait, the audits that wait, and by id those that run.

    Those that wait are in order of priority (the lowest first), then of arrival. One that has
    waited for a minute goes before all others, whatever its priority, and is preempted after them:
    however many urgent requests come, each other one runs at last.
    """

    def __init__(self, info: EngineInfo, memory: SequenceMemory) -> None:
        self.waiting: list[Sequence] = []
        self.audits: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self.preemptions = 0
        self._info = info
        self._memory = memory

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running or self.audits)

    def enqueue(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn; one that ran before keeps its place by arrival."""
        insort(self.waiting, sequence, key=_place)

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free what it holds."""
        if sequence.id in self.running:
            self._take_out(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(
        self, ready: abc.Iterable[Sequence], now: float, *, preempt: bool = True
    ) -> list[Sequence]:
        """Sequences for the next step of the first segment, each with a chunk in the cache.

        Of those ``ready`` there, decode tokens come first, then chunks of prompts; then waiting
        sequences are admitted. The step's token budget and the hidden rows bound all together;
        beside decode tokens there is less room for prompts (stall-free batching, Sarathi-Serve,
        arXiv 2403.02310, here in proportion to those tokens).
        Sequences that are preempted for blocks leave their decoder. Without ``preempt`` those for
        which there are none are left out instead.
        """
        chosen: list[Sequence] = []
        budget = self._info.max_num_batched_tokens
        prompts: list[Sequence] = []
        for sequence in ready:
            if not sequence.decoding:
                prompts.append(sequence)
            elif self._resume(sequence, budget, chosen, preempt=preempt):
                budget -= len(sequence.chunk)
        rows = self._info.max_num_batched_tokens - budget
        if rows:
            budget = min(budget, max(_FEWEST_PROMPT_ROWS, _PROMPT_ROWS_BESIDE * rows))
        for sequence in prompts:
            if self._resume(sequence, budget, chosen, preempt=preempt):
                budget -= len(sequence.chunk)
        while budget and self._memory.rows.num_free:
            admitted = self._admit(now)
            # It has blocks for all its tokens, so none is preempted for it.
            if admitted is None or not self._start_chunk(admitted, budget, chosen):
                break
            budget -= len(admitted.chunk)
        return chosen

    def make_room(
        self,
        sequence: Sequence,
        length: int,
        spared: abc.Sequence[Sequence],
        *,
        preempt: bool = True,
    ) -> bool:
        """Take blocks for ``length`` positions of a sequence, with ``preempt`` also from others.

        False if there are none, or the sequence itself was preempted; those ``spared`` never are.
        """
        while not self._memory.grow(sequence, length):
            if not preempt or self._preempt(spared) is sequence:
                return False
        return True

    def _resume(
        self, sequence: Sequence, budget: int, chosen: list[Sequence], *, preempt: bool
    ) -> bool:
        """Start a chunk of a sequence that was ready, unless another's preempted it meanwhile."""
        preempted = sequence.decoder is None
        return not preempted and self._start_chunk(sequence, budget, chosen, preempt=preempt)

    def _start_chunk(
        self, sequence: Sequence, budget: int, chosen: list[Sequence], *, preempt: bool = True
    ) -> bool:
        """Make the sequence's next positions its chunk; False if there is no room for any."""
        count = min(sequence.remaining, budget, self._memory.rows.num_free)
        if sequence.audit and len(self.running) > 1:
            count = min(count, _AUDIT_ROWS)
        length = sequence.computed[0] + count
        if count <= 0 or not self.make_room(sequence, length, chosen, preempt=preempt):
            return False
        self._memory.start_chunk(sequence, count)
        chosen.append(sequence)
        return True

    def _admit(self, now: float) -> Sequence | None:
        """The next waiting sequence, if there is room for it; audits come last, one at a time."""
        line = self.waiting or self.audits
        if not line or len(self.running) >= self._info.max_num_seqs:
            return None
        if line is self.audits and any(sequence.audit for sequence in self.running.values()):
            return None
        if line is self.waiting:
            self._age(now)
        sequence = line[0]
        if not self._memory.admit(sequence):
            return None
        del line[0]
        if sequence.admitted_at is None:
            sequence.admitted_at = now
        self.running[sequence.id] = sequence
        return sequence

    def _age(self, now: float) -> None:
        """Let the one that came first go first, if it has waited for long enough."""
        oldest = min(self.waiting, key=lambda sequence: sequence.id)
        if not oldest.aged and now - oldest.submitted_at > _LONGEST_WAIT_S:
            self.waiting.remove(oldest)
            oldest.aged = True
            self.enqueue(oldest)

    def _preempt(self, spared: abc.Sequence[Sequence]) -> Sequence:
        """Send one sequence back to waiting: an audit, else the last of the least urgent ones."""
        victim = max(
            (sequence for sequence in self.running.values() if sequence not in spared),
            key=lambda sequence: (
                sequence.audit,
                sequence.rank,
                sequence.admitted_at or 0.0,
                sequence.id,
            ),
        )
        self._take_out(victim)
        # An audit is dropped: no client waits for it, so it is not worth a second try.
        if not victim.audit:
            victim.restart()
            self.enqueue(victim)
            self.preemptions += 1
        return victim

    def _take_out(self, sequence: Sequence) -> None:
        if sequence.decoder is not None:
            sequence.decoder.remove(sequence)
        self._memory.release(sequence)
        del self.running[sequence.id]


def _place(sequence: Sequence) -> tuple[tuple[bool, int], int]:
    """Key of the waiting line."""
    return sequence.rank, sequence.id
