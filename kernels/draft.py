"""The draft head in one call of the C kernels: entries of its layer, and a chain of guesses.

The reference is the composition of the other kernels in models/drafting.py.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from ctypes import addressof, c_int64
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offramp.kernels.bounds import check_indices, check_shape
from offramp.kernels.decoder import NativeLayers, address_of, matrix_of, rows_matrix
from offramp.kernels.linear import Linear
from offramp.kernels.native import (
    Batch,
    DraftCall,
    DraftHeadWeights,
    Library,
    Matrix,
    library,
)


@dataclass(frozen=True, slots=True)
class DraftParts:
    """Weights of a draft head but its layer's: see models/exits/draft_head.py.

    ``embeddings`` are the model's, as a product's weight or plain [vocab, d], and ``angles`` those
    of all positions (see RotaryTable).
    """

    fuse: Linear
    feedback: Linear
    lm_head: Linear
    embeddings: Linear | Tensor
    norm: Tensor
    vocab: Tensor
    angles: tuple[Tensor, Tensor]


class DraftSpan(Protocol):
    """Entries of one sequence; see DraftRows in models/step.py."""

    @property
    def positions(self) -> range:
        """Of the entries."""
        ...

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the entries."""
        ...

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows with the states that the entries are made of."""
        ...

    @property
    def table(self) -> Sequence[int]:
        """Blocks of the sequence."""
        ...

    @property
    def first_block(self) -> int:
        """The first block with entries."""
        ...

    @property
    def guesses(self) -> int:
        """Wanted at most."""
        ...


@dataclass(frozen=True, slots=True)
class Guesses:
    """For each sequence its guesses and the draft head's probability of each.

    ``seconds`` are until the first ones were there, and for the others.
    """

    tokens: tuple[tuple[int, ...], ...]
    chances: tuple[tuple[float, ...], ...]
    seconds: tuple[float, float]


class NativeDraft:
    """The draft head, all of whose matrices the C kernels hold.

    Raises ValueError for sizes that do not fit one another.
    """

    def __init__(
        self, found: Library, layer: NativeLayers, parts: DraftParts, embeddings: Matrix
    ) -> None:
        _check_parts(parts, layer, embeddings)
        self._library = found
        self._layer = layer
        self._parts = parts
        self._weights = DraftHeadWeights(
            layer.layers[0],
            matrix_of(parts.fuse),
            matrix_of(parts.feedback),
            embeddings,
            matrix_of(parts.lm_head),
            parts.norm.data_ptr(),
            parts.vocab.data_ptr(),
        )

    @classmethod
    def of(cls, layer: NativeLayers | None, parts: DraftParts) -> NativeDraft | None:
        """The draft head, or None where the reference must serve."""
        found = library()
        products = (parts.fuse, parts.feedback, parts.lm_head)
        if found is None or layer is None or any(each.native is None for each in products):
            return None
        embeddings = rows_matrix(parts.embeddings)
        return None if embeddings is None else cls(found, layer, parts, embeddings)

    def __call__(
        self, work: Sequence[DraftSpan], bound: float, states: Tensor, pages: Tensor
    ) -> Guesses:
        """Make the entries of ``work``, and guesses of the sequences that ask for them.

        An entry's states are in its row of ``states`` [n, F, d] (-1: none). A sequence's guesses
        end where the product of their probabilities falls below ``bound``. ``pages`` are those of
        all layers, fp32 or fp16. Raises ValueError for tensors of other shapes, IndexError for
        tokens, rows, positions and blocks that there are not.
        """
        begun = time.perf_counter()
        self._layer.check_pages(pages)
        size = pages.shape[3]
        asking = [span for span in work if span.guesses]
        limits = array("i", [span.guesses for span in asking])
        most, count = max(limits, default=0), len(asking)
        own, asked = _Rows(size), _Rows(size)
        for span in work:
            own.add_table(span)
            own.add(span, span.positions)
        for span in asking:
            asked.add_table(span)
        for step in range(most):
            for index, span in enumerate(asking):
                # What lies beyond a sequence's last guess is never run.
                at = span.positions[-1] + min(step, span.guesses - 1)
                asked.add(span, range(at, at + 1), index)
        ends = array("i", [own.ends[index] for index, span in enumerate(work) if span.guesses])
        ids = array("q", [token for span in work for token in span.token_ids])
        rows = array("q", [row for span in work for row in span.rows])
        self._check(ids, rows, (own, asked), states, pages)
        tokens, chances = array("q", [-1]) * (most * count), array("f", [0]) * (most * count)
        first = c_int64(0)
        call = DraftCall(
            sequences=count,
            guesses=most,
            bound=bound,
            ends=address_of(ends),
            limits=address_of(limits),
            tokens=address_of(tokens),
            chances=address_of(chances),
            first=addressof(first),
            ids=address_of(ids),
        )
        entries = self._batch(own, pages)
        entries.states, entries.state_stride = states.data_ptr(), states.stride(0)
        entries.state_rows = address_of(rows)
        prepared = time.perf_counter()
        self._library.draft(
            self._layer.shape, self._weights, entries, self._batch(asked, pages), call
        )
        ran = time.perf_counter() - prepared
        seconds = prepared - begun + first.value / 1e9, ran - first.value / 1e9
        columns = iter(range(count))
        # A sequence that did not ask has no column.
        places = [slice(next(columns), None, count) if span.guesses else slice(0) for span in work]
        found = [tuple(token for token in tokens[place] if token >= 0) for place in places]
        sure = [tuple(chances[at][: len(own)]) for at, own in zip(places, found, strict=True)]
        return Guesses(tuple(found), tuple(sure), seconds)

    def _check(
        self,
        ids: array[int],
        rows: array[int],
        tables: Sequence[_Rows],
        states: Tensor,
        pages: Tensor,
    ) -> None:
        width, weights = self._layer.shape.width, self._weights
        check_shape("states", states, (len(states), weights.fuse.columns // width - 1, width))
        if not len(ids) == len(rows) == len(tables[0].positions):
            raise ValueError("tokens, rows and positions are not as many")
        check_indices("tokens", min(ids), max(ids), weights.embeddings.outs)
        check_indices("rows", min(rows), max(rows), len(states), -1)
        for table in tables:
            if table.positions:
                check_indices(
                    "positions", min(table.positions), max(table.angles), len(self._parts.angles[0])
                )
                check_indices("blocks", min(table.blocks), max(table.blocks), pages.shape[2])

    def _batch(self, rows: _Rows, pages: Tensor) -> Batch:
        cos, sin = self._parts.angles
        return Batch(
            rows=len(rows.positions),
            block_size=rows.block_size,
            longest=max(rows.positions, default=0) + 1,
            half=pages.dtype is torch.float16,
            pages=pages.data_ptr(),
            page_size=pages.stride(1),
            places=address_of(rows.places),
            positions=address_of(rows.positions),
            first_blocks=address_of(rows.first_blocks),
            blocks=address_of(rows.blocks),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            angles=address_of(rows.angles),
        )


class _Rows:
    """Where rows stand, as the C kernels take it.

    Attention begins at a sequence's first block with entries, as if its text did.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.places, self.positions, self.first_blocks = array("q"), array("q"), array("q")
        self.blocks, self.angles = array("q"), array("q")
        self.ends: list[int] = []
        """Of each sequence the last row added with its table."""
        self._starts: list[int] = []

    def add_table(self, span: DraftSpan) -> None:
        """Append a sequence's blocks."""
        self._starts.append(len(self.blocks))
        self.blocks.extend(span.table[span.first_block :])

    def add(self, span: DraftSpan, positions: range, index: int = -1) -> None:
        """Append rows of the ``index``-th sequence."""
        size, before = self.block_size, span.first_block * self.block_size
        for position in positions:
            self.places.append(span.table[position // size] * size + position % size)
            self.positions.append(position - before)
            self.first_blocks.append(self._starts[index])
            self.angles.append(position)
        self.ends.append(len(self.places) - 1)


def _check_parts(parts: DraftParts, layer: NativeLayers, embeddings: Matrix) -> None:
    width, (cos, sin) = layer.shape.width, parts.angles
    fuse, feedback = tuple(parts.fuse.shape), tuple(parts.feedback.shape)
    if fuse[0] != width or fuse[1] % width or fuse[1] < 2 * width:
        raise ValueError(f"fuse is {fuse}; the layer has {width} columns")
    if feedback != (width, 2 * width):
        raise ValueError(f"feedback is {feedback}; the layer has {width} columns")
    if {embeddings.columns, parts.lm_head.shape[1]} != {width}:
        raise ValueError(f"embeddings and head do not have the layer's {width} columns")
    check_shape("norm", parts.norm, (width,))
    check_shape("vocab", parts.vocab, (parts.lm_head.shape[0],), torch.int64)
    lowest, highest = parts.vocab.aminmax()
    check_indices("vocab", int(lowest), int(highest), embeddings.outs)
    for angles in (cos, sin):
        check_shape("angles", angles, (len(cos), 1, layer.shape.head_dim))
