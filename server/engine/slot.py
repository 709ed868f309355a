"""One admitted request's place in the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from offramp.models.sampling_params import ExitMode, KVFill
from offramp.server.engine.lookup import PromptLookup, Shares
from offramp.server.engine.request import GenerationRequest, RequestStats


class Place(StrEnum):
    """Where a slot is; it is in exactly one place at any time."""

    WAITING = "waiting"
    SEGMENT = "segment"
    HEAD = "head"
    ABOARD = "aboard"
    RUNNING = "running"
    RELEASED = "released"


@dataclass(slots=True, eq=False)
class Slot:
    """State of one request, owned by the scheduler.

    ``tokens`` are prompt and answer; the last ``drafts`` of them are guesses that full depth has
    yet to verify (lossless). ``computed[i]`` is the number of leading positions segment i is done
    with, so it may run positions ``computed[i] ..`` next. The *ride* is the positions now inside
    the stack, ascending, with their hidden rows; ``filled`` are prompt positions that left it and
    already have their K,V. ``exact`` is the number of leading positions
    whose K,V are what full depth would give (None: all); the first ``published`` blocks are
    findable by other requests. ``depth`` is the exit chosen for the whole answer (prompt_depth).
    ``scores`` tells of tokens that left early, by their index, the exit point and the score.
    ``match`` is the length of the match that the drafts were looked up by, 0 if they were not, and
    ``shares`` how such guesses fared. An ``audit`` slot re-reads a finished answer at full depth;
    all its answer counts as drafts.
    """

    id: int
    request: GenerationRequest
    submitted_at: float
    num_segments: int
    tokens: list[int] = field(init=False)
    computed: list[int] = field(init=False)
    drafts: int = 0
    table: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    place: Place = Place.WAITING
    segment: int = 0
    since: float = 0.0
    ride: list[int] = field(default_factory=list)
    ride_rows: list[int] = field(default_factory=list)
    filled: set[int] = field(default_factory=set)
    depth: int | None = None
    exact: int | None = None
    published: int = 0
    admitted_at: float | None = None
    first_token_at: float | None = None
    cached_tokens: int = 0
    layers_executed: int = 0
    prompt_layers_skipped: int = 0
    left_early: int = 0
    scores: dict[int, tuple[int, float]] = field(default_factory=dict)
    stayed: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0
    audit: bool = False
    lookup: PromptLookup = field(default_factory=PromptLookup)
    match: int = 0
    shares: Shares | None = None
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.computed = [0] * self.num_segments

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def verified(self) -> int:
        """Tokens that are no guesses."""
        return len(self.tokens) - self.drafts

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far, guesses left out."""
        return self.verified - self.num_prompt

    @property
    def remaining(self) -> int:
        """Positions the ground segment has yet to run."""
        return len(self.tokens) - self.computed[0]

    @property
    def decoding(self) -> bool:
        """Whether all that is left to compute is the newest token of the answer and guesses."""
        return self.num_generated > 0 and self.computed[0] >= self.verified - 1

    @property
    def riding_to_end(self) -> bool:
        """Whether the ride's last row is the newest token, so that a token comes of it."""
        return bool(self.ride) and self.ride[-1] + 1 == len(self.tokens)

    @property
    def lossless(self) -> bool:
        """Whether tokens that leave early are guesses to be verified."""
        return self.request.exits.mode is ExitMode.LOSSLESS

    @property
    def exits_on(self) -> bool:
        """Whether this request's tokens may leave early at all."""
        return self.request.exits.mode is not ExitMode.OFF and not self.audit

    @property
    def fill(self) -> KVFill:
        """How its debts are paid."""
        return KVFill.RECOMPUTE if self.lossless else self.request.exits.kv_fill

    def guess(self, tokens: list[int]) -> None:
        """Add tokens that full depth has yet to verify."""
        self.tokens += tokens
        self.drafts += len(tokens)
        self.drafted += len(tokens)

    def read_again(self, tokens: list[int]) -> None:
        """Make this an audit of ``tokens``: the same prompt with its finished answer."""
        self.audit = True
        self.tokens = list(tokens)
        self.drafts = len(tokens) - self.num_prompt

    def drop_drafts(self, verified: int) -> None:
        """Forget guesses from the ``verified``-th token on, and what was computed of them."""
        del self.tokens[verified:]
        self.drafts = 0
        self.scores = {index: left for index, left in self.scores.items() if index < verified}
        self.computed = [min(done, verified) for done in self.computed]

    def restart(self) -> None:
        """Forget all K,V: everything, the answer so far included, will be prefilled again."""
        if not self.audit:
            self.drop_drafts(self.verified)
        self.computed = [0] * self.num_segments
        self.table, self.ride, self.ride_rows = [], [], []
        self.exact = None
        self.published = 0
        self.preemptions += 1

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
            drafted=self.drafted,
            accepted=self.accepted,
            rejected=self.rejected,
            preemptions=self.preemptions,
        )
