"""What a forward pass needs besides hidden states; passed down, never global."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offramp.kernels.paged_attention import QueryRun, Window, query_run, windows_of
from offramp.kernels.prefill_attention import RunTable
from offramp.kernels.rotary import RotaryTable
from offramp.kernels.rows import RowTable
from offramp.models.config import ModelConfig
from offramp.models.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Span:
    """Ascending positions of one sequence under its block table."""

    positions: Sequence[int]
    table: Sequence[int]


class ForwardContext:
    """Positions and pages of T rows: those of ``spans``, one after another.

    ``cos`` and ``sin`` [T, 1, head_dim]; ``places`` [T] flat cache places.
    """

    def __init__(
        self, spans: Sequence[Span], config: ModelConfig, cache: KVCache, rotary: RotaryTable
    ) -> None:
        self.cache = cache
        self._spans = spans
        self._config = config
        self._device = cache.pages.device
        places = [at for span in spans for at in cache.places(span.table, span.positions)]
        positions = [position for span in spans for position in span.positions]
        self.places = torch.tensor(places, device=self._device)
        self._positions = torch.tensor(positions, device=self._device)
        self.cos, self.sin = rotary.at(self._positions)

    @functools.cached_property
    def runs(self) -> tuple[QueryRun, ...]:
        """The sequences' consecutive rows."""
        config = self._config
        runs: list[QueryRun] = []
        first = 0
        for span in self._spans:
            runs.append(
                query_run(
                    first,
                    span.positions,
                    span.table,
                    block_size=self.cache.block_size,
                    group=config.num_heads // config.num_kv_heads,
                    window=config.sliding_window,
                    device=self._device,
                )
            )
            first += len(span.positions)
        return tuple(runs)

    @functools.cached_property
    def windows(self) -> tuple[tuple[Window | None, ...], ...]:
        """What the runs see of each layer's K,V."""
        layers = self._config.num_layers
        found = [windows_of(self.cache.flat, run) for run in self.runs]
        return tuple(zip(*(each or (None,) * layers for each in found), strict=True))

    @functools.cached_property
    def rows(self) -> RowTable:
        """The same for kernels that read block tables themselves."""
        tables: list[int] = []
        starts: list[int] = []
        for span in self._spans:
            starts += [len(tables)] * len(span.positions)
            tables += span.table
        return RowTable(
            self.places,
            self._positions,
            torch.tensor(starts, device=self._device),
            torch.tensor(tables, device=self._device),
            self.cache.block_size,
            1 + max(span.positions[-1] for span in self._spans),
            self.cos,
            self.sin,
        )

    @functools.cached_property
    def tiles(self) -> RunTable:
        """The runs cut up for a kernel that takes many rows of one at once."""
        config = self._config
        return RunTable.of(
            [span.positions for span in self._spans],
            config.num_heads // config.num_kv_heads,
            config.sliding_window,
            self._device,
        )
