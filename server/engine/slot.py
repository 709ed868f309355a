"""One admitted request's place in the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from offramp.models.sampling_params import ExitMode, KVFill
from offramp.server.engine.request import GenerationRequest, RequestStats


class Place(StrEnum):
    """Where a slot is; it is in exactly one place at any time."""

    WAITING = "waiting"
    SEGMENT = "segment"
    HEAD = "head"
    RUNNING = "running"
    RELEASED = "released"


@dataclass(slots=True, eq=False)
class Slot:
    """State of one request, owned by the scheduler.

    ``computed[i]`` is the number of leading positions with K,V in all layers of segment i, so
    segment i may run positions ``computed[i] ..`` next. The *ride* is the positions now inside the
    stack, ``ride_start .. ride_start + len(ride_rows)``, with their hidden rows.
    ``exact`` is the number of leading positions whose K,V are what full depth would give (None:
    all); the first ``published`` blocks are findable by other requests.
    """

    id: int
    request: GenerationRequest
    submitted_at: float
    num_segments: int
    tokens: list[int] = field(init=False)
    computed: list[int] = field(init=False)
    table: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    place: Place = Place.WAITING
    segment: int = 0
    since: float = 0.0
    ride_start: int = 0
    ride_rows: list[int] = field(default_factory=list)
    leaving: int | None = None
    exact: int | None = None
    published: int = 0
    admitted_at: float | None = None
    first_token_at: float | None = None
    cached_tokens: int = 0
    layers_executed: int = 0
    stayed: int = 0
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.computed = [0] * self.num_segments

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Positions the ground segment has yet to run."""
        return len(self.tokens) - self.computed[0]

    @property
    def decoding(self) -> bool:
        """Whether all that is left to compute is the newest token of the answer."""
        return self.num_generated > 0 and self.remaining <= 1

    @property
    def riding_to_end(self) -> bool:
        """Whether the ride's last row is the newest token, so that a token comes of it."""
        return self.ride_start + len(self.ride_rows) == len(self.tokens)

    @property
    def exits_on(self) -> bool:
        """Whether this request's tokens may leave early at all."""
        return self.request.exits.mode is ExitMode.ADAPTIVE

    @property
    def recomputes(self) -> bool:
        """Whether debts are paid by running the skipped layers."""
        return self.request.exits.kv_fill is KVFill.RECOMPUTE

    def restart(self) -> None:
        """Forget all K,V: everything, the answer so far included, will be prefilled again."""
        self.computed = [0] * self.num_segments
        self.table, self.ride_rows = [], []
        self.leaving = self.exact = None
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
            stayed=self.stayed,
            preemptions=self.preemptions,
        )
