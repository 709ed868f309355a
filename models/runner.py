"""Carry out one step on the device: plain data in, tensors inside, plain data out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.kv_fill import Projection, clear_kv, copy_kv, project_kv
from offramp.kernels.linear import Linear
from offramp.kernels.rows import HostRows, Span, flat_places
from offramp.models.cpu import ThreadGovernor
from offramp.models.deciding import Decider
from offramp.models.device_loop import DeviceLoop
from offramp.models.device_pass import plain
from offramp.models.drafting import Drafter
from offramp.models.exits.checks import Exits, check_sequences, prompt_leavers
from offramp.models.exits.head import ExitHead
from offramp.models.kv_cache import KVCache, row_buffer
from offramp.models.sampler import sample_with_logprobs, score
from offramp.models.sampling_params import KVFill
from offramp.models.step import (
    Decide,
    Draft,
    FillKV,
    OwedRows,
    RunSegments,
    ScoredRow,
    SequenceRows,
    Step,
    StepResult,
    TokenLogprobs,
)
from offramp.models.transformer import Transformer, kv_projection

# Rows whose logits over the whole vocabulary are held at once: those of a long prompt's chunk would
# take hundreds of megabytes.
_SCORED_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class _Projection:
    """K,V projections of every layer from an exit up, norms folded in (see kv_fill)."""

    weight: Linear
    k_norm: Tensor | None


class Runner:
    """Owns the device side: weights, K,V pages and the hidden buffer [rows, d].

    ``heads`` are the exit heads, one for each of the model's exit layers; ``vocab`` the token ids
    they tell apart (None: all). ``drafter`` carries out drafts, where there is a draft head, and
    ``decider`` decisions.
    """

    def __init__(
        self,
        model: Transformer,
        heads: Sequence[ExitHead],
        cache: KVCache,
        num_rows: int,
        vocab: Tensor | None = None,
        drafter: Drafter | None = None,
        decider: Decider | None = None,
    ) -> None:
        if tuple(head.layer for head in heads) != model.exit_layers:
            raise ValueError("each exit layer of the model needs its exit head")
        self.model = model
        self.exits = Exits(model, heads, num_rows, vocab)
        self.cache = cache
        self.drafter = drafter
        self.decider = decider
        shape = (num_rows, model.config.hidden_size)
        self.hidden = row_buffer(shape, model.dtype, model.device)
        self._on_gpu = model.device.type == "cuda"
        self.threads: ThreadGovernor | None = None
        """Chooses how many threads a step takes; without one, torch's number."""
        self._running: list[tuple[Sequence[int], tuple[int, ...]]] = []
        self._rows: HostRows | None = None
        self._projections = [self._projection(head) for head in heads]

    def device_loop(self, rows: int, max_blocks: int) -> DeviceLoop:
        """A device loop over the same memory; weights have to be kept as they are.

        ``rows`` sequences may decode at once, each with ``max_blocks`` K,V blocks.
        """
        projections = [
            Projection(plain(own.weight), own.weight.bias, own.k_norm) for own in self._projections
        ]
        return DeviceLoop(self.exits, projections, self.cache, rows, max_blocks)

    def run(self, step: Step) -> StepResult:
        """Run ``step`` and time it, to its end on the device."""
        begun = time.perf_counter()
        threads = self.threads
        before = threads.cpu_seconds() if threads is not None and threads.looks() else None
        with torch.inference_mode():
            result = self._run(step, begun)
        if threads is not None:
            used = None if before is None else threads.cpu_seconds() - before
            threads.observe(time.perf_counter() - begun, used)
        return result

    def _run(self, step: Step, begun: float) -> StepResult:
        match step:
            case RunSegments():
                return self._run_segments(step, begun)
            case FillKV():
                self._fill(step)
            case Draft():
                return self._draft(step, begun)
            case Decide():
                if self.decider is None:
                    raise ValueError("decisions were not prepared for")
                logits = self.decider.run(step)
                return StepResult(self._now() - begun, logits=logits)
        return StepResult(self._now() - begun)

    def _run_segments(self, step: RunSegments, begun: float) -> StepResult:
        model, work = self.model, step.work
        numbers = [row for item in work for row in item.rows]
        start: Tensor | list[int] = [token for item in work for token in item.token_ids]
        if step.first:
            start = self.hidden[self._index(numbers)]
        at = self._rows_of(step.first, work)
        taps = None if self.drafter is None else self.drafter.taps(numbers)
        hidden = model.run((step.first, step.last), start, at, self.cache, taps)
        ran = self._now()
        # A layer takes as long as any other.
        sizes = list(map(len, model.segments[step.first : step.last + 1]))
        seconds = tuple((ran - begun) * size / sum(sizes) for size in sizes)
        if step.last == len(self.exits.heads):
            return self._run_head(step, hidden, numbers, seconds)
        rows = self._index(numbers)
        self.hidden[rows] = hidden
        checked = check_sequences(self.exits, step.last, hidden, rows, work)
        left = prompt_leavers(self.exits, step.last, hidden, work)
        ended = self._now()
        return StepResult(
            ended - begun,
            seconds,
            ended - ran,
            leave=tuple(token is not None for token in checked.tokens),
            token_ids=tuple(-1 if token is None else token for token in checked.tokens),
            scores=checked.scores,
            prompt_left=left,
            exit_head_rows=checked.head_rows,
            exit_logprobs=checked.logprobs,
        )

    def _run_head(
        self,
        step: RunSegments,
        hidden: Tensor,
        numbers: Sequence[int],
        seconds: tuple[float, ...],
    ) -> StepResult:
        """One LM head for those of ``hidden``, the hidden rows ``numbers``, that need a token."""
        begun = self._now()
        tokens: list[int] = []
        logprobs: tuple[TokenLogprobs | None, ...] = ()
        scored: list[TokenLogprobs] = []
        if step.head:
            place = {row: index for index, row in enumerate(numbers)}
            places = [place[item.row] for item in step.head]
            likeliest = None
            if not any(row.needs_logits for row in step.head):
                noises = [row.noise for row in step.head]
                likeliest = self.model.likeliest(hidden, places, noises)
            if likeliest is None:
                logits, best = self.model.head(hidden, places)
                tokens, logprobs = sample_with_logprobs(logits, step.head, best)
            else:
                tokens = likeliest
        spent = self._now() - begun
        if step.scored:
            scored = self._score(step.scored, hidden, numbers)
        return StepResult(
            self._now() - begun + sum(seconds),
            seconds,
            head_seconds=spent,
            head_tokens=tuple(tokens),
            head_logprobs=logprobs,
            scored=tuple(scored),
        )

    def _score(
        self, rows: Sequence[ScoredRow], hidden: Tensor, numbers: Sequence[int]
    ) -> list[TokenLogprobs]:
        """Log-probabilities of the tokens that follow the rows."""
        place = {row: index for index, row in enumerate(numbers)}
        found: list[TokenLogprobs] = []
        for first in range(0, len(rows), _SCORED_AT_ONCE):
            some = rows[first : first + _SCORED_AT_ONCE]
            logits, _ = self.model.head(hidden, [place[item.row] for item in some])
            found += score(logits, some)
        return found

    def _draft(self, step: Draft, begun: float) -> StepResult:
        if self.drafter is None:
            raise ValueError("there is no draft head")
        made = self.drafter.run(step.work, step.bound)
        return StepResult(
            self._now() - begun,
            guesses=made.tokens,
            chances=made.chances,
            guess_seconds=made.seconds,
        )

    def _rows_of(self, segment: int, work: Sequence[SequenceRows]) -> HostRows:
        """Positions and pages of the rows; kept while the same rows go on to the next segment.

        Rows change owners only at the first segment, so above it equal rows are of equal sequences.
        """
        running = [(item.positions, item.rows) for item in work]
        if self._rows is None or segment == 0 or running != self._running:
            spans = [Span(item.positions, item.table, item.coarse) for item in work]
            device, size = self.hidden.device, self.cache.block_size
            self._rows = HostRows(spans, size, self.model.rotary, device)
            self._running = running
        return self._rows

    def _fill(self, step: FillKV) -> None:
        for segment in sorted({item.segment for item in step.work}):
            owed = [item for item in step.work if item.segment == segment]
            if step.method is KVFill.COPY:
                self._copy(segment, owed)
            elif step.method is KVFill.ABSENT:
                pages = self.cache.pages[self.model.segments[segment].first :]
                clear_kv(pages, self._places(owed))
            else:
                self._project(segment, owed)

    def _copy(self, segment: int, owed: Sequence[OwedRows]) -> None:
        first = self.model.segments[segment].first
        copy_kv(self.cache.pages[first - 1], self.cache.pages[first:], self._places(owed))

    def _project(self, segment: int, owed: Sequence[OwedRows]) -> None:
        model = self.model
        first = model.segments[segment].first
        rows = self._index([row for item in owed for row in item.rows])
        positions = [position for item in owed for position in item.positions]
        cos, sin = model.rotary.at(self._index(positions))
        own = self._projections[segment - 1]
        project_kv(
            self.hidden[rows],
            own.weight,
            None,
            own.k_norm,
            self.cache.pages[first:],
            self._places(owed),
            cos,
            sin,
            model.config.rms_norm_eps,
        )

    def _now(self) -> float:
        """The time when all work launched on the device is done."""
        if self._on_gpu:
            torch.cuda.synchronize(self.hidden.device)
        return time.perf_counter()

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.hidden.device)

    def _places(self, owed: Sequence[OwedRows]) -> Tensor:
        size = self.cache.block_size
        places = [place for item in owed for place in flat_places(item.table, item.positions, size)]
        return self._index(places)

    def _projection(self, head: ExitHead) -> _Projection:
        made, forms = kv_projection(self.model, head), self.model.exit_forms
        packed = Linear(made.weight, made.bias, forms)
        return _Projection(packed, made.k_norm)
