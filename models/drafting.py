"""The draft head at work: entries of the draft layer, and guesses of the next tokens."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from offramp.kernels.decoder import Taps, slots_of
from offramp.kernels.draft import FARTHEST, DraftParts, Guesses, NativeDraft
from offramp.kernels.linear import Linear
from offramp.kernels.noise import TokenNoise
from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rows import HostRows, Span
from offramp.models.exits.draft_head import MATRICES, VECTORS, DraftHead, rounded
from offramp.models.kv_cache import KVCache, row_buffer
from offramp.models.layers import DecoderLayer
from offramp.models.step import DraftRows
from offramp.models.transformer import Segment, Transformer


class Drafter:
    """The draft head of ``model``, whose K,V lie in the pages of ``cache`` above the stack's.

    ``states`` [num_rows + 1, F, d] keeps what the stack had in each hidden row after the layers
    that the head reads; the last row is zero.
    """

    def __init__(self, model: Transformer, head: DraftHead, cache: KVCache, num_rows: int) -> None:
        config = model.config
        self._model = model
        self._cache = cache
        forms = model.draft_forms
        own = {
            name: tensor.to(model.device, model.dtype) for name, tensor in head.parameters.items()
        }

        def product(weight: Tensor) -> Linear:
            return Linear(weight, None, forms)

        self._fuse, self._feedback = product(own["fuse"]), product(own["feedback"])
        self._norm = own["norm"]
        self._vocab = head.vocab.to(model.device)
        self._lm_head = product(rounded(model.head_rows(self._vocab)).to(model.dtype))
        index = config.num_layers
        named = {
            f"layers.{index}.{name}": own[name]
            for name in (*VECTORS, *MATRICES)
            if name not in {"fuse", "feedback", "norm"}
        }
        self._layer = Segment([DecoderLayer(config, index, named, forms)])
        parts = DraftParts(
            self._fuse,
            self._feedback,
            self._lm_head,
            model.embedding_weight,
            self._norm,
            self._vocab,
            model.rotary.angles,
        )
        self._native = NativeDraft.of(self._layer.native, parts)
        self._slots = slots_of(head.layers, config.num_layers)
        shape = (num_rows + 1, len(head.layers), config.hidden_size)
        self.states = row_buffer(shape, torch.float32, model.device)

    def taps(self, rows: Sequence[int]) -> Taps:
        """Keep the states of a pass over the hidden ``rows`` [T]."""
        return Taps(self.states, array("q", rows), self._slots)

    def run(self, work: Sequence[DraftRows], bound: float) -> Guesses:
        """Make the entries of ``work``, and guesses of the sequences that ask for them.

        A sequence's guesses end where the product of their chances, times its luck each, falls
        below ``bound``. Those of a random one are made with its noise, so that they are right more
        often.
        """
        begun = time.perf_counter()
        if self._native is not None:
            return self._native(work, bound, self.states, self._cache.pages)
        device, eps = self._model.device, self._model.config.rms_norm_eps
        ids = torch.tensor([token for item in work for token in item.token_ids], device=device)
        rows = torch.tensor([row for item in work for row in item.rows], device=device)
        states = rms_norm(self.states[rows], None, eps).flatten(1).to(self._model.dtype)
        hidden = self._fuse(torch.cat((self._embedded(ids), states), dim=1))
        hidden = self._layer(hidden, self._table(work, 0), self._cache)
        ends = torch.tensor([len(item.rows) for item in work]).cumsum(0) - 1
        tokens: list[list[int]] = [[] for _ in work]
        chances: list[list[float]] = [[] for _ in work]
        going = [index for index, item in enumerate(work) if item.guesses]
        first = 0.0
        hidden = hidden[ends[going].to(device)]
        step = 0
        while going:
            noises = [_later(work[index].noise, step) for index in going]
            for index, token, chance in zip(going, *self._guess(hidden, noises), strict=True):
                tokens[index].append(token)
                chances[index].append(chance)
            step += 1
            first = first or time.perf_counter() - begun
            kept = [
                place
                for place, index in enumerate(going)
                if work[index].guesses > step
                and math.prod(chances[index]) * work[index].luck ** step >= bound
            ]
            going = [going[place] for place in kept]
            if going:
                ids = torch.tensor([tokens[index][-1] for index in going], device=device)
                fed = rms_norm(hidden[torch.tensor(kept, device=device)], None, eps)
                hidden = self._feedback(torch.cat((self._embedded(ids), fed), dim=1))
                table = self._table([work[index] for index in going], step)
                hidden = self._layer(hidden, table, self._cache)
        seconds = first, time.perf_counter() - begun - first
        return Guesses(tuple(map(tuple, tokens)), tuple(map(tuple, chances)), seconds)

    def _embedded(self, ids: Tensor) -> Tensor:
        return rms_norm(self._model.embed(ids), None, self._model.config.rms_norm_eps)

    def _guess(
        self, hidden: Tensor, noises: Sequence[TokenNoise | None]
    ) -> tuple[list[int], list[float]]:
        """The token of each row's largest logit, and its chance: see Guesses."""
        eps = self._model.config.rms_norm_eps
        logits = self._lm_head(rms_norm(hidden, self._norm, eps)).float()
        for row, noise in enumerate(noises):
            if noise is not None:
                keys = noise.keys(logits[row], self._vocab)
                logits[row] = keys.masked_fill(keys < keys.max() - FARTHEST, -torch.inf)
        best, places = logits.max(dim=-1)
        chances = (best - logits.logsumexp(dim=-1)).exp()
        return self._vocab[places].tolist(), chances.tolist()

    def _table(self, work: Sequence[DraftRows], step: int) -> HostRows:
        """Rows of all entries (step 0), or of the one entry ``step`` behind the last.

        Attention begins at a sequence's first block with entries, as if its text did.
        """
        size = self._cache.block_size
        spans, positions = [], []
        for item in work:
            own = [item.positions[-1] + step] if step else list(item.positions)
            before = item.first_block * size
            spans.append(Span([p - before for p in own], item.table[item.first_block :]))
            positions += own
        return HostRows(spans, size, self._model.rotary, self._model.device, positions)


def _later(noise: TokenNoise | None, step: int) -> TokenNoise | None:
    """Of the token so many after."""
    return noise and replace(noise, index=noise.index + step)
