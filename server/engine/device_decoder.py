"""Decoding decided on the device, one pass of all segments after another (models/device_loop.py).

A sequence is added when its prompt is done and stays until it ends or gives its blocks to another.
The host reads a pass when the next one is already under way, so a sequence that has ended may have
made a token more; it is dropped. What a late pass writes into blocks that were released is
harmless: the device works in order, so their next holder writes later.
"""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass
from heapq import heappop, heappush

from offramp.models.device_loop import DeviceLoop, LaunchResult, NewRow, PendingLaunch
from offramp.models.sampling_params import DEFAULT_CRITERION, NEVER, ExitMode, KVFill
from offramp.server.engine.admission import Admission
from offramp.server.engine.blocks import SequenceMemory
from offramp.server.engine.decoder import TokenResult
from offramp.server.engine.governor import ExitGovernor
from offramp.server.engine.request import EngineInfo, StepStats
from offramp.server.engine.sequence import Sequence

# How K,V of skipped layers may be made: on the device they are projected in the same pass.
_FILLS = frozenset({KVFill.AUTO, KVFill.PROJECT})


@dataclass(slots=True, eq=False)
class _Row:
    """A sequence's row of the device's state, and how many of its blocks the device knows."""

    number: int
    sequence: Sequence
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class _Launch:
    """A pass under way, the rows in it and the exits that were open."""

    pending: PendingLaunch
    rows: list[_Row]
    open_exits: tuple[bool, ...]


class DeviceDecoder:
    """Owns which sequence has which of the device's ``max_num_seqs`` rows."""

    def __init__(
        self,
        info: EngineInfo,
        admission: Admission,
        memory: SequenceMemory,
        governor: ExitGovernor,
        loop: DeviceLoop,
    ) -> None:
        self.governor = governor
        self._info = info
        self._admission = admission
        self._memory = memory
        self._loop = loop
        self._free = list(range(info.max_num_seqs))
        self._rows: dict[int, _Row] = {}
        self._released: list[int] = []
        self._in_force = self._inputs_of_thresholds((True,) * len(info.exit_layers))
        self._in_flight: _Launch | None = None
        self._waiting = (0,) * info.num_segments
        loop.hold(governor.device_holds(info.max_num_seqs))

    def accepts(self, sequence: Sequence) -> bool:
        """See Decoder: plain decoding, with exits only where the device knows their rule."""
        exits, sampling = sequence.request.exits, sequence.request.sampling
        plain = sequence.decoding and not (sequence.audit or sequence.drafts or sequence.lossless)
        if not plain or sampling.adjusts_logits or self._memory.ledger.owed(sequence.id):
            return False
        if sequence.grammar is not None or sampling.logprobs is not None:
            return False
        if exits.mode is ExitMode.OFF or not self._info.exit_layers:
            return True
        if self.governor.thresholds.online is not None or exits.deadline_s is not None:
            return False
        if exits.always:
            return False
        return exits.criterion is DEFAULT_CRITERION and exits.kv_fill in _FILLS

    def add(self, sequence: Sequence, now: float) -> None:
        """See Decoder: the sequence gets a row and is in the next launch."""
        del now
        if sequence.id not in self._rows:
            self._rows[sequence.id] = _Row(heappop(self._free), sequence)
            sequence.decoder = self

    def remove(self, sequence: Sequence) -> None:
        """See Decoder; what a launch under way makes for it is dropped."""
        number = self._rows.pop(sequence.id).number
        self._released.append(number)
        heappush(self._free, number)
        sequence.decoder = None
        if not self._rows:
            self._waiting = (0,) * self._info.num_segments

    @property
    def queue_lengths(self) -> tuple[int, ...]:
        """See Decoder; as of the last pass read."""
        return self._waiting

    def sequence_ids(self) -> list[int]:
        """See Decoder."""
        return list(self._rows)

    def advance(self, now: float) -> tuple[list[TokenResult], StepStats | None]:
        """See Decoder: start a pass for all rows, then wait for the one before and commit it."""
        del now
        if not self._rows:
            return [], None
        begun = time.perf_counter()
        previous, self._in_flight = self._in_flight, None
        for row in list(self._rows.values()):
            if row.sequence.id in self._rows:
                length = min(len(row.sequence.tokens) + 1, self._end(row.sequence))
                self._admission.make_room(row.sequence, length, ())
        if self._rows:
            self._in_flight = self._launch()
        waited = time.perf_counter()
        result = previous.pending.result() if previous else LaunchResult({}, self._waiting, 0)
        read = time.perf_counter()
        self._waiting = result.waiting
        results = self._commit(previous, result) if previous else []
        left = sum(each.layer < self._info.num_layers for each in results)
        stats = StepStats(
            "device",
            -1,
            seconds=read - begun,
            host_seconds=waited - begun + time.perf_counter() - read,
            decode_rows=len(results),
            layers_executed=sum(each.layer for each in results),
            fill_tokens=left,
            fill_method=str(KVFill.PROJECT) if left else "",
            exit_head_rows=result.head_rows,
        )
        return results, stats

    def _launch(self) -> _Launch:
        """Bring the device up to date and start a pass."""
        exits = range(len(self._info.exit_layers))
        open_exits = tuple(self.governor.checks_pay(point, len(self._rows)) for point in exits)
        loop, rows = self._loop, list(self._rows.values())
        loop.clear(self._released)
        self._released = []
        fresh = [row for row in rows if not row.blocks]
        loop.add([self._new_row(row, open_exits) for row in fresh])
        grown = [row for row in rows if row.blocks and row.blocks < len(row.sequence.table)]
        blocks = {
            (row.number, index): row.sequence.table[index]
            for row in grown
            for index in range(row.blocks, len(row.sequence.table))
        }
        loop.grow(blocks, {row.number: self._room(row.sequence) for row in grown})
        in_force = self._inputs_of_thresholds(open_exits)
        if self._in_force != in_force:
            self._in_force = in_force
            known = [row for row in rows if row.blocks]
            loop.set_thresholds(
                {row.number: self._thresholds(row.sequence, open_exits) for row in known}
            )
        for row in (*fresh, *grown):
            row.blocks = len(row.sequence.table)
        return _Launch(loop.launch(len(rows)), rows, open_exits)

    def _commit(self, launch: _Launch, result: LaunchResult) -> list[TokenResult]:
        """Tokens of a pass whose sequences still have the rows they had when it was launched."""
        results: list[TokenResult] = []
        for row in launch.rows:
            made = result.tokens.get(row.number)
            if made is None or self._rows.get(row.sequence.id) is not row:
                continue
            sequence, depth = row.sequence, made.depth
            sequence.tokens.append(made.token)
            # K,V of the position before the token are in all layers now.
            position = len(sequence.tokens) - 2
            sequence.computed = [position + 1] * len(sequence.computed)
            sequence.layers_executed += depth
            sequence.passes += depth == self._info.num_layers
            if depth < self._info.num_layers:
                sequence.left_early += 1
                exact = position if sequence.exact is None else min(sequence.exact, position)
                sequence.exact = exact
            self._memory.publish(sequence)
            results.append(TokenResult(sequence, [made.token], depth))
        self._learn(launch, results)
        return results

    def _learn(self, launch: _Launch, results: abc.Sequence[TokenResult]) -> None:
        """What the depths of tokens say about the exits that were open."""
        depths = [each.layer for each in results if each.sequence.exits_on]
        for point, layer in enumerate(self._info.exit_layers):
            if launch.open_exits[point]:
                checked = sum(depth >= layer for depth in depths)
                self.governor.observe_checks(point, checked, depths.count(layer))
        every = [each.layer for each in results]
        holds = self.governor.observe_depths(every, len(self._rows))
        if holds is not None:
            self._loop.hold(holds)

    def _inputs_of_thresholds(
        self, open_exits: tuple[bool, ...]
    ) -> tuple[tuple[float, ...], int, tuple[bool, ...]]:
        """What changes the thresholds of rows: the server's own, the guard, and what pays."""
        thresholds = self.governor.thresholds
        return thresholds.thresholds, thresholds.guard_level, open_exits

    def _new_row(self, row: _Row, open_exits: tuple[bool, ...]) -> NewRow:
        sequence = row.sequence
        return NewRow(
            row=row.number,
            token=sequence.tokens[-1],
            position=len(sequence.tokens) - 1,
            index=sequence.num_generated,
            table=sequence.table,
            end=self._room(sequence),
            sampling=sequence.request.sampling,
            thresholds=self._thresholds(sequence, open_exits),
        )

    def _thresholds(self, sequence: Sequence, open_exits: tuple[bool, ...]) -> tuple[float, ...]:
        exits, layers = sequence.request.exits, self._info.exit_layers
        if not sequence.exits_on or not self._info.max_exit_debt:
            return (NEVER,) * len(layers)
        wanted = self.governor.thresholds.of(exits, late=False)
        return tuple(
            threshold if is_open and layer >= exits.min_layer else NEVER
            for layer, threshold, is_open in zip(layers, wanted, open_exits, strict=True)
        )

    def _room(self, sequence: Sequence) -> int:
        """The first position that may not be run yet, or ever."""
        return min(len(sequence.table) * self._memory.blocks.block_size, self._end(sequence))

    def _end(self, sequence: Sequence) -> int:
        """The first position whose token is not of the answer: position p makes token p + 1."""
        longest = sequence.num_prompt + sequence.request.sampling.max_tokens
        return min(longest, self._info.max_model_len) - 1
