"""Drafts of lossless sequences: who guesses, how far ahead, and how the guesses fared.

A sequence's next tokens are guessed by the draft head, or copied from where its text has been in
the same place before (n-gram). Full depth verifies them in one pass; a sequence of which nothing is
worth guessing has no drafts. (Exits draft as well, see HostDecoder: a token that leaves early.)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from offramp.models.step import Draft, DraftRows, StepRunner
from offramp.server.engine.blocks import SequenceMemory
from offramp.server.engine.governor import ExitGovernor
from offramp.server.engine.request import EngineInfo
from offramp.server.engine.sequence import DraftSource, Sequence

# How much a verified draft moves its own request's acceptance rates, and those of all requests.
_OWN_RENEWAL, _COMMON_RENEWAL = 0.1, 0.01


@dataclass(slots=True)
class _Due:
    """A sequence whose draft head has something to do.

    The stack's states at ``positions`` are in ``rows``; the entries behind them are missing.
    ``asks`` says that the sequence waits for drafts.
    """

    sequence: Sequence
    positions: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    asks: bool = False


def draft_room(sequence: Sequence, info: EngineInfo) -> int:
    """Drafts a sequence may add and still have a token of the answer left to make."""
    answer = len(sequence.tokens) - sequence.num_prompt
    room = sequence.request.sampling.max_tokens - answer
    return max(0, min(room, info.max_model_len - len(sequence.tokens)) - 1)


class Drafting:
    """Adds drafts to the sequences that wait for them, all at once, before a step is planned.

    The rows of a pass may be given to others from then on, so entries are made at that time too.
    """

    def __init__(
        self,
        info: EngineInfo,
        governor: ExitGovernor,
        memory: SequenceMemory,
        runner: StepRunner,
    ) -> None:
        self._info = info
        self._governor = governor
        self._memory = memory
        self._runner = runner
        self._due: dict[int, _Due] = {}
        self.drafted: Counter[DraftSource] = Counter()
        """Drafts added since the last statistics."""

    def ask(self, sequence: Sequence) -> None:
        """The sequence, lossless and without drafts, is ready for its next token."""
        self._of(sequence).asks = True

    def passed(self, sequence: Sequence) -> None:
        """The sequence's chunk has run the whole stack."""
        if self._info.draft_head and sequence.lossless and not sequence.audit:
            due = self._of(sequence)
            due.positions += sequence.chunk
            due.rows += sequence.chunk_rows

    def left_early(self, sequence: Sequence, token: int) -> None:
        """An exit guessed the sequence's next token."""
        self._add(sequence, [token], DraftSource.EXIT)

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended or lost its blocks."""
        self._due.pop(sequence.id, None)

    def run(self, running: int) -> float:
        """Draft for all who asked, beside ``running`` sequences; returns seconds on the device."""
        if not self._due:
            return 0.0
        found, self._due = list(self._due.values()), {}
        for due in found:
            if due.asks:
                self._copy(due.sequence, running)
        if not self._info.draft_head:
            return 0.0
        return self._ask_head([due for due in found if due.positions], running)

    def verified(self, sequence: Sequence, place: int, *, right: bool) -> None:
        """Full depth accepted the sequence's ``place``-th draft, or refused it."""
        rates, common = sequence.acceptance, self._governor.acceptance
        if sequence.source is DraftSource.NGRAM and rates is not None:
            rates.add(sequence.match + place, _OWN_RENEWAL, accepted=right)
            common.add(sequence.match + place, _COMMON_RENEWAL, accepted=right)
        elif sequence.source is DraftSource.HEAD:
            chance = sequence.chances[place]
            wanted = self._governor.head_acceptance.rate(chance)
            self._governor.head_acceptance.add(chance, accepted=right)
            sequence.luck += _OWN_RENEWAL * wanted * (right / wanted - sequence.luck)

    def _of(self, sequence: Sequence) -> _Due:
        return self._due.setdefault(sequence.id, _Due(sequence))

    def _room(self, sequence: Sequence) -> int:
        return min(draft_room(sequence, self._info), self._info.max_num_batched_tokens - 1)

    def _copy(self, sequence: Sequence, running: int) -> None:
        """Draft what followed the text's last tokens before, as far as that is worth verifying."""
        governor = self._governor
        if sequence.acceptance is None:
            sequence.acceptance = governor.acceptance.copy()
        if not governor.ngrams_pay(sequence.acceptance, running):
            return
        match = sequence.proposer.find(sequence.tokens)
        if match is None:
            return
        count = governor.ngram_length(sequence.acceptance, match.size, running)
        count = min(count, self._room(sequence))
        sequence.match = match.size
        self._add(sequence, sequence.tokens[match.end : match.end + count], DraftSource.NGRAM)

    def _ask_head(self, found: list[_Due], running: int) -> float:
        """Make the entries that are due; let the head guess where that pays."""
        plan = self._governor.head_plan(running)
        work: list[DraftRows] = []
        asked_for: list[Sequence] = []
        for due in found:
            sure = due.sequence.drafts > 0
            most = 0 if sure or not due.asks else min(plan.most, self._room(due.sequence))
            rows = self._rows(due, max(0, most))
            if rows.positions:
                work.append(rows)
                asked_for.append(due.sequence)
        if not work:
            return 0.0
        result = self._runner.run(Draft(tuple(work), plan.bound))
        asked = sum(item.guesses > 0 for item in work)
        entries = sum(len(item.rows) for item in work)
        if asked and entries <= asked * (1 + plan.most):
            # Of chunks of prompts, entries would take more than the guesses.
            steps = max(map(len, result.guesses))
            self._governor.costs.draft.add(asked, result.seconds / steps)
        guesses = zip(asked_for, result.guesses, result.chances, strict=True)
        for sequence, tokens, chances in guesses:
            self._memory.mark_entries(sequence)
            if tokens:
                self._governor.head_acceptance.saw(chances[0])
                kept = self._governor.worth_verifying(plan, chances, sequence.luck)
                sequence.chances = chances[:kept]
                self._add(sequence, list(tokens[:kept]), DraftSource.HEAD)
        return result.seconds

    def _rows(self, due: _Due, most: int) -> DraftRows:
        """The entries due, whose tokens are known by now, and ``most`` guesses behind them."""
        sequence, size = due.sequence, self._info.block_size
        end = min(due.positions[-1] + 2, sequence.verified)
        if not self._memory.grow(sequence, end + most):
            end, most = min(end, len(sequence.table) * size), 0
        positions = range(sequence.next_entry, end)
        sequence.next_entry = end
        # Where a text begins, or goes on behind cached blocks, there are no states before.
        row_of = dict(zip(due.positions, due.rows, strict=True))
        return DraftRows(
            positions,
            tuple(sequence.tokens[positions.start : end]),
            tuple(row_of.get(position - 1, -1) for position in positions),
            sequence.table,
            sequence.first_entry // size,
            most,
        )

    def _add(self, sequence: Sequence, tokens: list[int], source: DraftSource) -> None:
        sequence.source = source
        sequence.add_drafts(tokens)
        self.drafted[source] += len(tokens)
