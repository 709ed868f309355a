"""The draft head in one call of the C kernels: entries of its layer, and a chain of guesses.

The reference is the composition of the other kernels in models/drafting.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_int64
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.decoder import NativeLayers, Taps, batch_of, matrix_of
from offramp.kernels.linear import Linear
from offramp.kernels.native import DraftCall, DraftHeadWeights, Library, Matrix, library
from offramp.kernels.rows import RowTable


@dataclass(frozen=True, slots=True)
class DraftParts:
    """Weights of a draft head but its layer's: see models/exits/draft_head.py.

    ``embeddings`` are the model's, as a product's weight or plain [vocab, d].
    """

    fuse: Linear
    feedback: Linear
    lm_head: Linear
    embeddings: Linear | Tensor
    norm: Tensor
    vocab: Tensor


class NativeDraft:
    """The draft head, all of whose matrices the C kernels hold."""

    def __init__(
        self, found: Library, layer: NativeLayers, parts: DraftParts, embeddings: Matrix
    ) -> None:
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
        if isinstance(parts.embeddings, Linear):
            embeddings = parts.embeddings.native
        else:
            embeddings = _plain(found, parts.embeddings)
        return None if embeddings is None else cls(found, layer, parts, embeddings)

    def __call__(
        self,
        ids: Tensor,
        taps: Taps,
        entries: RowTable,
        asked: RowTable,
        ends: Sequence[int],
        limits: Sequence[int],
        bound: float,
        pages: Tensor,
    ) -> tuple[Tensor, Tensor, float]:
        """Guesses int64 and their probabilities fp32, both [most guesses, sequences].

        The third result is the time until the first guesses were there, in seconds.

        The entries are made of the tokens ``ids`` [T] and of the states that ``taps`` kept in its
        rows (-1: none). ``ends`` are the sequences' last entries, ``limits`` the guesses they ask
        for; the rows of ``asked`` are those of all sequences for the first guess, for the second,
        and so on. A token is -1 where no guess was made: beyond its limit, or where the product of
        the sequence's probabilities has fallen below ``bound``.
        """
        most, count = max(limits, default=0), len(limits)
        tokens = torch.full((most, count), -1)
        chances = torch.zeros(most, count)
        call = DraftCall(sequences=count, guesses=most, bound=bound)
        at = torch.tensor([*ends, *limits], dtype=torch.int32)
        ids = ids.clone()
        call.ends, call.limits = at.data_ptr(), at[count:].data_ptr()
        call.tokens, call.chances = tokens.data_ptr(), chances.data_ptr()
        call.ids = ids.data_ptr()
        first = c_int64(0)
        call.first = addressof(first)
        own = batch_of(len(ids), entries, pages, taps)
        self._library.draft(
            self._layer.shape,
            self._weights,
            own,
            batch_of(most * count, asked, pages, None),
            call,
        )
        return tokens, chances, first.value / 1e9


def _plain(found: Library, weight: Tensor) -> Matrix | None:
    if (
        weight.dtype is not torch.float32
        or not weight.is_contiguous()
        or weight.device.type != "cpu"
    ):
        return None
    return Matrix(found.constant("FORMAT_FP32"), *weight.shape, weight.data_ptr(), None)
