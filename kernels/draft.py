"""The draft head in one call of the C kernels: entries of its layer, and a chain of guesses.

The reference is the composition of the other kernels in models/drafting.py.
"""

from __future__ import annotations

import ctypes
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offramp.kernels.bounds import check_indices, check_shape
from offramp.kernels.decoder import (
    NativeLayers,
    address_of,
    matrix_of,
    memory_of,
    rows_matrix,
    same,
)
from offramp.kernels.linear import Linear
from offramp.kernels.native import Library, library
from offramp.kernels.native_structures import Batch, DraftCall, DraftHeadWeights, Matrix
from offramp.kernels.noise import TokenNoise, native_noises

FARTHEST = 8.0
"""Logits with noise that are so far below the largest have no part in its chance."""


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

    @property
    def noise(self) -> TokenNoise | None:
        """Of the first guess."""
        ...

    @property
    def luck(self) -> float:
        """How many times as often as their chance guesses are right."""
        ...


@dataclass(frozen=True, slots=True)
class Guesses:
    """For each sequence its guesses, and the chance of each that it is right.

    The chance is the draft head's probability, or, of a random token, its share of the softmax of
    logits with noise, without those that are FARTHEST below the largest.
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
        self._vocab = parts.vocab.to(torch.int32)
        self._weights = DraftHeadWeights(
            layer.layers[0],
            matrix_of(parts.fuse),
            matrix_of(parts.feedback),
            embeddings,
            matrix_of(parts.lm_head),
            parts.norm.data_ptr(),
            self._vocab.data_ptr(),
        )
        self._known: tuple[object, ...] = ()
        self._memory = Batch()

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
        end where the product of their chances, times its luck each, falls below ``bound``; those of
        a random one are made with its noise. ``pages`` are those of all layers, fp32 or fp16.
        Raises ValueError for tensors of other shapes, IndexError for tokens, rows, positions and
        blocks that there are not.
        """
        begun = time.perf_counter()
        if not same((pages, states), self._known):
            self._check_memory(pages, states)
        size = self._memory.block_size
        spans, blocks, ids, rows = array("q"), array("q"), array("q"), array("q")
        most = longest = 0
        for span in work:
            positions, before, start = span.positions, span.first_block * size, len(blocks)
            blocks.extend(span.table[span.first_block :])
            ids.extend(span.token_ids)
            rows.extend(span.rows)
            # Read as a struct draft_span; what lies beyond the last guess is never run.
            spans.extend((positions[0], len(positions), span.guesses, start, before))
            end = positions[-1] + max(1, span.guesses)
            most, longest = max(most, span.guesses), max(longest, end - before)
            self._check_span(span, end, before, before + size * (len(blocks) - start))
        check_indices("tokens", min(ids), max(ids), self._weights.embeddings.outs)
        check_indices("rows", min(rows), max(rows), states.shape[0], -1)
        check_indices("blocks", min(blocks), max(blocks), pages.shape[2])
        count = len(work)
        tokens, chances = array("q", bytes(8 * most * count)), array("f", bytes(4 * most * count))
        made = array("i", bytes(4 * count))
        noise = native_noises([span.noise for span in work])
        lucks = array("f", [span.luck for span in work])
        call = DraftCall(
            sequences=count,
            entries=len(ids),
            guesses=most,
            bound=bound,
            spans=address_of(spans),
            noise=None if noise is None else ctypes.addressof(noise),
            luck=address_of(lucks),
            tokens=address_of(tokens),
            chances=address_of(chances),
            made=address_of(made),
            ids=address_of(ids),
        )
        batch = Batch.from_buffer_copy(self._memory)
        batch.longest, batch.blocks = longest, address_of(blocks)
        batch.state_rows = address_of(rows)
        prepared = time.perf_counter()
        self._library.draft(self._layer.shape, self._weights, batch, call)
        ran = time.perf_counter() - prepared
        seconds = prepared - begun + call.first / 1e9, ran - call.first / 1e9
        places = [slice(most * index, most * index + n) for index, n in enumerate(made)]
        return Guesses(
            tuple(tuple(tokens[place]) for place in places),
            tuple(tuple(chances[place]) for place in places),
            seconds,
        )

    def _check_span(self, span: DraftSpan, end: int, before: int, room: int) -> None:
        """Check positions, ``end`` exclusive; the span's blocks hold those [before, room)."""
        first = span.positions[0]
        if not len(span.token_ids) == len(span.rows) == len(span.positions):
            raise ValueError("tokens, rows and positions are not as many")
        check_indices("positions", first, end - 1, len(self._parts.angles[0]), max(0, before))
        check_indices("positions in blocks", first, end - 1, room)

    def _check_memory(self, pages: Tensor, states: Tensor) -> None:
        """Check what is the same at every call: looking at tensors is not free."""
        width, columns = self._layer.shape.width, self._weights.fuse.columns
        self._layer.check_pages(pages)
        check_shape("states", states, (states.shape[0], columns // width - 1, width))
        self._memory = memory_of(self._library, pages, self._parts.angles, states)
        self._known = pages, states


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
