"""Drafts of sequences: who guesses, how far ahead, and how the guesses fared.

A sequence's next tokens are guessed by the draft head, or copied from where its text has been in
the same place before (n-gram). Full depth verifies them in one pass; a sequence of which nothing is
worth guessing has no drafts. Adaptive sequences get drafts as lossless ones do where by measured
cost their tokens gain less by leaving early. (Exits draft as well, see HostDecoder: a lossless
token that leaves early.) What an answer's grammar forces is drafted in every mode.
"""

from __future__ import annotations

from collections import Counter, abc
from typing import Any

from offramp.kernels.noise import TokenNoise
from offramp.models.sampling_params import DraftSource
from offramp.models.step import Draft, DraftRows, SequenceRows, StepRunner
from offramp.server.engine.blocks import SequenceMemory
from offramp.server.engine.governor import MAX_HEAD_DRAFTS, NO_DRAFTS, ExitGovernor, HeadPlan
from offramp.server.engine.request import MOST_STATES, EngineInfo
from offramp.server.engine.sequence import Sequence

# How much a verified draft moves its own request's acceptance rates, and those of all requests.
_OWN_RENEWAL, _COMMON_RENEWAL = 0.1, 0.01
# Tokens that a grammar leaves no choice about, at once: each takes a row.
_MOST_FORCED = 16


def draft_room(sequence: Sequence, info: EngineInfo) -> int:
    """Drafts a sequence may add and still have a token of the answer left to make."""
    answer = len(sequence.tokens) - sequence.num_prompt
    room = sequence.request.sampling.max_tokens - answer
    return max(0, min(room, info.max_model_len - len(sequence.tokens)) - 1)


def _noise(sequence: Sequence, index: int) -> TokenNoise | None:
    """What guesses of the sequence's tokens from the ``index``-th on are made with."""
    sampling = sequence.request.sampling
    if sampling.temperature == 0:
        return None
    return TokenNoise(sampling.temperature, sampling.seed, index - sequence.num_prompt)


class Drafting:
    """Adds drafts to the sequences that wait for them, all at once, before a step is planned.

    The draft head needs the stack's states at all positions, for its entries. The rows that hold
    them stay with their sequence until the head is next run: for guesses, or because a sequence
    holds many. Nothing is held where no guesses are near. With ``adaptive`` such sequences are
    guessed for as well as lossless ones.
    """

    def __init__(
        self,
        info: EngineInfo,
        governor: ExitGovernor,
        memory: SequenceMemory,
        runner: StepRunner,
        *,
        adaptive: bool,
    ) -> None:
        self._info = info
        self._governor = governor
        self._memory = memory
        self._runner = runner
        self._asking: dict[int, Sequence] = {}
        self._holding: dict[int, Sequence] = {}
        self._drafted: Counter[DraftSource] = Counter()
        self._accepted: Counter[DraftSource] = Counter()
        self._accepted_at: Counter[int] = Counter()
        self._runs = 0
        self._adaptive = adaptive
        self._exits_save = False
        self._keeping_up = True

    def ask(self, sequence: Sequence) -> None:
        """The sequence, which has no drafts, is ready for its next token.

        Which may not guess gets the tokens that its grammar forces.
        """
        self._asking[sequence.id] = sequence
        # Of drafts that were wrong; what is now there may pass without states being kept.
        self._memory.drop_states(sequence, sequence.verified - 1)
        if not sequence.state_rows:
            self._holding.pop(sequence.id, None)
        if sequence.acceptance is None:
            sequence.luck = self._usual_luck(sequence)
            sequence.acceptance = self._governor.acceptance.scaled(sequence.luck)

    def passed(self, sequence: Sequence) -> None:
        """The sequence's chunk has run the whole stack."""
        kept = self._keeping_up and self._info.draft_head and not sequence.audit
        if kept and self._guesses(sequence):
            self._memory.keep_states(sequence)
            self._holding[sequence.id] = sequence

    def left_early(self, sequence: Sequence, token: int) -> None:
        """An exit guessed the sequence's next token."""
        self._add(sequence, [token], DraftSource.EXIT)

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended or lost its blocks."""
        self._asking.pop(sequence.id, None)
        self._holding.pop(sequence.id, None)

    def run(
        self, running: int, *, guess: bool = True, keep_up: bool = True, spared: float = 0.0
    ) -> float:
        """Draft for all who asked, beside ``running`` sequences; returns seconds on the device.

        Where ``guess`` is False, only what a grammar forces. With ``keep_up`` the draft head's
        entries are made all the same, many at a time, so that its next guesses are no worse. Its
        guesses are expected to spare the share ``spared`` of a token's time.
        """
        beyond = spared if keep_up else 0.0
        self._exits_save = self._adaptive and self._governor.exits_save(running, beyond)
        self._keeping_up = keep_up
        if not keep_up:
            self._let_go(list(self._holding.values()))
        asking = {
            id_: sequence
            for id_, sequence in self._asking.items()
            if not self._force(sequence) and self._guesses(sequence)
        }
        self._asking = {}
        many = [each for each in self._holding.values() if len(each.state_rows) > MOST_STATES]
        plan = NO_DRAFTS
        if self._info.draft_head and (many or (guess and asking)):
            lucks = [self._usual_luck(each) for each in (asking.values() if asking else many)]
            plan = self._governor.head_plan(running, sum(lucks) / len(lucks))
        # An n-gram costs no guess, but is worth its row only where it is right as often.
        rival = self._governor.head_acceptance.mean if plan.most else 0.0
        for sequence in asking.values() if guess else ():
            self._copy(sequence, running, rival)
        lacking = {id_ for id_, sequence in asking.items() if guess and not sequence.drafts}
        if plan.most and (lacking or many):
            return self._run_head(plan, lacking)
        # Entries would cost a hundredth of all work, for drafts that do not pay.
        self._let_go(many)
        return 0.0

    def tries(self, work: abc.Sequence[SequenceRows], sequences: abc.Sequence[Sequence]) -> bool:
        """Whether all ``sequences`` of a step make tokens, and could be guessed for."""
        return all(
            item.positions[0] >= sequence.num_prompt - 1 and self._guesses(sequence)
            for item, sequence in zip(work, sequences, strict=True)
        )

    def verified(self, sequence: Sequence, place: int, *, right: bool) -> None:
        """Full depth accepted the sequence's ``place``-th draft, or refused it."""
        sequence.accepted[sequence.source] += right
        sequence.rejected += not right
        self._accepted[sequence.source] += right
        self._accepted_at[place] += right
        rates, common = sequence.acceptance, self._governor.acceptance
        if sequence.source is DraftSource.NGRAM and rates is not None:
            rates.add(sequence.match + place, _OWN_RENEWAL, accepted=right)
            if not sequence.sampled:
                common.add(sequence.match + place, _COMMON_RENEWAL, accepted=right)
        elif sequence.source is DraftSource.HEAD:
            chance = sequence.chances[place]
            wanted = self._governor.head_acceptance.rate(chance)
            if sequence.sampled:
                self._governor.observe_sampled(wanted, right=right)
            else:
                self._governor.head_acceptance.add(chance, accepted=right)
            sequence.luck += _OWN_RENEWAL * (right - wanted * sequence.luck)

    def counts(self) -> dict[str, Any]:
        """Drafts added and accepted since the last call, as StepStats has them."""
        found = {
            "drafted": dict(self._drafted),
            "accepted": dict(self._accepted),
            "drafts": self._runs,
            "accepted_at": dict(self._accepted_at),
        }
        for counter in (self._drafted, self._accepted, self._accepted_at):
            counter.clear()
        self._runs = 0
        return found

    def _let_go(self, sequences: abc.Iterable[Sequence]) -> None:
        """Give back the rows with states of ``sequences``."""
        for sequence in sequences:
            self._memory.free_states(sequence)
            del self._holding[sequence.id]

    def _usual_luck(self, sequence: Sequence) -> float:
        """How often guesses are right in answers of its kind; each learns its own from there on."""
        return self._governor.sampled_luck if sequence.sampled else 1.0

    def _guesses(self, sequence: Sequence) -> bool:
        if sequence.lossless:
            return True
        return self._adaptive and sequence.may_guess and not self._exits_save

    def _room(self, sequence: Sequence) -> int:
        return min(draft_room(sequence, self._info), self._info.max_num_batched_tokens - 1)

    def _copy(self, sequence: Sequence, running: int, rival: float) -> None:
        """Draft what followed the text's last tokens before, as far as that is worth verifying.

        Not where the first of these tokens is right less often than ``rival``.
        """
        governor = self._governor
        assert sequence.acceptance is not None
        if not governor.ngrams_pay(sequence.acceptance, running):
            return
        match = sequence.proposer.find(sequence.tokens)
        if match is None or sequence.acceptance.of(match.size) < rival:
            return
        count = governor.ngram_length(sequence.acceptance, match.size, running)
        count = min(count, self._room(sequence))
        sequence.match = match.size
        self._guess(sequence, sequence.tokens[match.end : match.end + count], DraftSource.NGRAM)

    def _run_head(self, plan: HeadPlan, lacking: set[int]) -> float:
        """Make all entries that are due, and guesses for the sequences with ids ``lacking``."""
        holding, self._holding = self._holding, {}
        work: dict[int, DraftRows] = {}
        for id_, sequence in holding.items():
            most = min(plan.most, self._room(sequence)) if id_ in lacking else 0
            rows = self._rows(sequence, most)
            self._memory.free_states(sequence)
            if rows.positions:
                work[id_] = rows
        if not work:
            return 0.0
        result = self._runner.run(Draft(tuple(work.values()), plan.bound))
        asked = sum(item.guesses > 0 for item in work.values())
        entries = sum(len(item.rows) for item in work.values())
        if asked and entries <= asked * (1 + MAX_HEAD_DRAFTS):
            # Of chunks of prompts, entries would take more than the guesses.
            self._governor.costs.learn_draft(asked, result)
        for id_, tokens, chances in zip(work, result.guesses, result.chances, strict=True):
            sequence = holding[id_]
            self._memory.mark_entries(sequence)
            if tokens:
                self._governor.head_acceptance.saw(chances[0])
                kept = self._governor.worth_verifying(plan, chances, sequence.luck)
                sequence.chances = chances[:kept]
                self._guess(sequence, list(tokens[:kept]), DraftSource.HEAD)
        return result.seconds

    def _rows(self, sequence: Sequence, most: int) -> DraftRows:
        """The entries due, whose tokens are known by now, and ``most`` guesses behind them."""
        states = sequence.state_positions
        self._memory.skip_entries(sequence)
        end = min(states[-1] + 2, sequence.verified)
        if not self._memory.grow(sequence, end + most):
            end, most = min(end, len(sequence.table) * self._info.block_size), 0
        positions = range(sequence.next_entry, end)
        sequence.next_entry = max(end, sequence.next_entry)
        # There are no states where a text begins, goes on behind cached blocks, or ran while drafts
        # did not pay.
        row_of = dict(zip(states, sequence.state_rows, strict=True))
        return DraftRows(
            positions,
            tuple(sequence.tokens[positions.start : end]),
            tuple(row_of.get(position - 1, -1) for position in positions),
            sequence.table,
            sequence.first_entry // self._info.block_size,
            most,
            _noise(sequence, end),
            sequence.luck,
        )

    def _force(self, sequence: Sequence) -> bool:
        """Draft what the sequence's grammar leaves no choice about; whether there is any."""
        if sequence.grammar is None:
            return False
        self._guess(sequence, sequence.grammar.forced()[:_MOST_FORCED], DraftSource.GRAMMAR)
        return sequence.drafts > 0

    def _guess(self, sequence: Sequence, tokens: list[int], source: DraftSource) -> None:
        """Add guesses as far as the answer's grammar allows them, and its length."""
        tokens = tokens[: self._room(sequence)]
        if sequence.grammar is not None:
            tokens = tokens[: sequence.grammar.allowed(tokens)]
        if tokens:
            self._add(sequence, tokens, source)

    def _add(self, sequence: Sequence, tokens: list[int], source: DraftSource) -> None:
        # Exits guess a token at a time, each behind the one before.
        self._runs += not sequence.drafts
        sequence.add_drafts(tokens, source)
        self._drafted[source] += len(tokens)
