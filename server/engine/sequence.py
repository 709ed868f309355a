"""One admitted request inside the engine, and the queues it waits in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offramp.models.sampling_params import DraftSource, ExitMode, KVFill
from offramp.models.step import TokenLogprobs
from offramp.server.engine.drafts import AcceptanceRates, NgramProposer
from offramp.server.engine.request import GenerationRequest, RequestStats
from offramp.server.text.grammars import GrammarState

if TYPE_CHECKING:
    from offramp.server.engine.decoder import Decoder


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request; a decoder or the waiting line has it, never both.

    ``tokens`` are prompt and answer; the last ``drafts`` of them are guesses that full depth has
    yet to verify; where it is ``lossless``, so are tokens that leave early. ``computed[i]`` is the
    number of leading positions segment i is done with, so it may run those behind them next. The
    *chunk* is the positions now inside the stack, ascending, with their hidden rows: one token, a
    token with drafts behind it, or a part of the prompt; ``filled`` are prompt positions that left
    it early and have their K,V already, ``prompt_debt`` says that some left and have none yet.
    ``exact`` is the number of leading positions whose K,V are what full depth would give (None:
    all); the first ``published``
    blocks are findable by other requests. ``depth`` is the exit chosen for the whole answer, if its
    criterion chooses one; ``kept`` says that the token in the stack might have left by its score.
    ``scores`` holds of tokens that left early, by their index, the exit point and the score. Drafts
    are by ``source``: an n-gram's after a ``match`` of so many tokens, ``acceptance`` saying how
    such drafts fared; the draft head's with its probabilities,
    ``chances``, right ``luck`` times as often as others' of the kind. The head has made its entries
    of positions ``first_entry`` to ``next_entry`` (exclusive), noted of the first ``entry_blocks``
    blocks; the stack's states at ``state_positions`` are in ``state_rows`` for the next ones. An
    ``audit`` reads a finished answer again at full depth; all of the answer counts as drafts.
    One that is ``aged`` has waited so long that it goes before all others. Layers take inputs of 8
    bits of a ``coarse`` one; with ``exits_closed`` its quality is spent on these, and no token may
    leave.
    ``grammar`` is where the answer is in its form, ``prompt_logprobs`` are those known so far.
    """

    id: int
    request: GenerationRequest
    submitted_at: float
    num_segments: int
    coarse: bool = False
    exits_closed: bool = False
    tokens: list[int] = field(init=False)
    lossless: bool = field(init=False)
    computed: list[int] = field(init=False)
    decoder: Decoder | None = None
    queue: SequenceQueue | None = None
    since: float = 0.0
    aged: bool = False
    drafts: int = 0
    table: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    chunk: list[int] = field(default_factory=list)
    chunk_rows: list[int] = field(default_factory=list)
    filled: set[int] = field(default_factory=set)
    prompt_debt: bool = False
    depth: int | None = None
    exact: int | None = None
    published: int = 0
    admitted_at: float | None = None
    first_token_at: float | None = None
    cached_tokens: int = 0
    layers_executed: int = 0
    prompt_layers_skipped: int = 0
    left_early: int = 0
    kept: bool = False
    scores: dict[int, tuple[int, float]] = field(default_factory=dict)
    stayed: int = 0
    passes: int = 0
    drafted: Counter[DraftSource] = field(default_factory=Counter)
    accepted: Counter[DraftSource] = field(default_factory=Counter)
    rejected: int = 0
    audit: bool = False
    proposer: NgramProposer = field(default_factory=NgramProposer)
    source: DraftSource = DraftSource.EXIT
    match: int = 0
    acceptance: AcceptanceRates | None = None
    chances: tuple[float, ...] = ()
    luck: float = 1.0
    first_entry: int = 0
    next_entry: int = 0
    entry_blocks: int = 0
    state_positions: list[int] = field(default_factory=list)
    state_rows: list[int] = field(default_factory=list)
    preemptions: int = 0
    grammar: GrammarState | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.request.grammar is not None:
            self.grammar = self.request.grammar.start()
        self.tokens = list(self.request.prompt)
        self.computed = [0] * self.num_segments
        self.lossless = self.request.exits.mode is ExitMode.LOSSLESS

    @property
    def sampled(self) -> bool:
        """Whether its tokens are drawn."""
        return self.request.sampling.temperature > 0

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def verified(self) -> int:
        """Tokens of prompt and answer, drafts left out."""
        return len(self.tokens) - self.drafts

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far, drafts left out."""
        return self.verified - self.num_prompt

    @property
    def remaining(self) -> int:
        """Positions the first segment has yet to run."""
        return len(self.tokens) - self.computed[0]

    @property
    def decoding(self) -> bool:
        """Whether all that is left to compute is the newest token of the answer and drafts."""
        return self.num_generated > 0 and self.computed[0] >= self.verified - 1

    @property
    def makes_token(self) -> bool:
        """Whether the chunk's last row is the newest token, so that a token comes of it."""
        return bool(self.chunk) and self.chunk[-1] + 1 == len(self.tokens)

    @property
    def unscored(self) -> range:
        """Positions of the prompt whose next token's log-probability is still wanted."""
        wanted = self.request.sampling.prompt_logprobs is not None and not self.audit
        return range(len(self.prompt_logprobs), self.num_prompt - 1) if wanted else range(0)

    @property
    def may_guess(self) -> bool:
        """Whether its next tokens may be guessed, for full depth to verify.

        Not where tokens leave early whatever that costs: what is asked for then are exits.
        """
        exits = self.request.exits
        return self.lossless or (exits.mode is ExitMode.ADAPTIVE and not exits.always)

    @property
    def exits_on(self) -> bool:
        """Whether this request's tokens may leave early at all."""
        closed = self.audit or self.exits_closed
        return self.request.exits.mode is not ExitMode.OFF and not closed

    @property
    def fill(self) -> KVFill:
        """How its debts are paid."""
        return KVFill.RECOMPUTE if self.lossless else self.request.exits.kv_fill

    def add_drafts(self, tokens: list[int], source: DraftSource) -> None:
        """Add tokens that full depth has yet to verify."""
        self.source = source
        self.drafted[source] += len(tokens)
        self.tokens += tokens
        self.drafts += len(tokens)

    def drop_drafts(self, verified: int) -> None:
        """Forget drafts from the ``verified``-th token on, and what was computed of them."""
        del self.tokens[verified:]
        self.drafts = 0
        self.scores = {index: left for index, left in self.scores.items() if index < verified}
        self.computed = [min(done, verified) for done in self.computed]

    def make_audit(self, tokens: list[int]) -> None:
        """Make this an audit of ``tokens``: the same prompt with its finished answer."""
        self.audit = True
        self.coarse = self.coarse and not self.exits_closed
        self.tokens = list(tokens)
        self.drafts = len(tokens) - self.num_prompt

    def restart(self) -> None:
        """Forget all K,V: everything, the answer so far included, will be prefilled again."""
        if not self.audit:
            self.drop_drafts(self.verified)
        self.computed = [0] * self.num_segments
        self.table, self.chunk, self.chunk_rows = [], [], []
        self.prompt_debt = self.kept = False
        self.exact = None
        self.published = 0
        self.preemptions += 1

    def is_late(self, now: float) -> bool:
        """Whether the answer, at its pace so far, would end after its deadline.

        An answer that may be of any length is expected to use all the tokens it was given.
        """
        deadline = self.request.exits.deadline_s
        if deadline is None or self.first_token_at is None or self.num_generated < 2:
            return False
        pace = (now - self.first_token_at) / (self.num_generated - 1)
        left = self.request.sampling.max_tokens - self.num_generated
        return now + left * pace > self.submitted_at + deadline

    @property
    def rank(self) -> tuple[bool, int]:
        """The lower, the earlier it runs and the later it is preempted."""
        return not self.aged, self.request.priority

    def stats(self, now: float | None = None) -> RequestStats:
        """What the request cost so far; ``now`` if it ends here."""
        return RequestStats(
            submitted_at=self.submitted_at,
            admitted_at=self.admitted_at,
            first_token_at=self.first_token_at,
            finished_at=now,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.num_generated,
            layers_executed=self.layers_executed,
            prompt_layers_skipped=self.prompt_layers_skipped,
            stayed=self.stayed,
            passes=self.passes,
            drafts={each: (n, self.accepted[each]) for each, n in self.drafted.items() if n},
            rejected=self.rejected,
            preemptions=self.preemptions,
            coarse=self.coarse,
        )


class SequenceQueue:
    """Sequences that wait for the same thing, in order of arrival."""

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """Over a copy, so that sequences may be removed on the way."""
        return iter(list(self._sequences.values()))

    def put(self, sequence: Sequence, now: float) -> None:
        """Append a sequence that is in no queue."""
        sequence.queue, sequence.since = self, now
        self._sequences[sequence.id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Take one sequence out."""
        del self._sequences[sequence.id]
        sequence.queue = None

    def take_all(self) -> list[Sequence]:
        """Empty the queue."""
        sequences = list(self._sequences.values())
        self._sequences.clear()
        for sequence in sequences:
            sequence.queue = None
        return sequences

    def oldest_age(self, now: float) -> float:
        """Seconds the first sequence has waited; 0 if empty."""
        return now - next(iter(self._sequences.values())).since if self._sequences else 0.0
