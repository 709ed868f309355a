"""One segment's pass over decode tokens, in launches that do not depend on how many there are.

Which sequences run, which leave and what they owe is decided on the device (kernels/active_rows.py,
exit_decision.py), so the same launches serve any number up to a limit, and a CUDA graph can hold
them. A token's hidden state stays in its sequence's row from embedding to head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.active_rows import (
    EMPTY,
    ActiveRows,
    DecodeState,
    SegmentBatch,
    finish_rows,
    gather_rows,
)
from offramp.kernels.decode_attention import decode_attention
from offramp.kernels.decoder import LayerWeights
from offramp.kernels.embed_rows import embed_rows
from offramp.kernels.exit_decision import Fired, apply_exit, apply_gate
from offramp.kernels.kv_fill import Projection, fill_kv
from offramp.kernels.kv_store import rope_and_store
from offramp.kernels.linear import Linear
from offramp.kernels.logit_scores import LogitScores, score_logits
from offramp.kernels.masked_linear import Activation, Residual, Rows, masked_linear
from offramp.kernels.rms_norm import masked_rms_norm
from offramp.kernels.rows import RowTable
from offramp.kernels.sampling import SamplingTable, sample_rows
from offramp.models.exits.checks import Exits
from offramp.models.exits.head import PackedHead
from offramp.models.kv_cache import KVCache
from offramp.models.transformer import Transformer


@dataclass(frozen=True, slots=True)
class DecodeParams:
    """What the host sets for every sequence on the device.

    ``thresholds`` fp32 [sequences, exits], above 1 where a token may not leave; ``holds`` fp32
    [segments, 2] as in `gather_rows`.
    """

    sampling: SamplingTable
    thresholds: Tensor
    holds: Tensor


class DevicePass:
    """Runs segments for sequences at the newest token of their answer.

    Needs a model, exits and ``projections`` (one an exit, see kv_fill) whose weights are kept as
    they are.
    """

    def __init__(
        self,
        exits: Exits,
        projections: Sequence[Projection],
        cache: KVCache,
        states: DecodeState,
        tables: DecodeParams,
    ) -> None:
        model = exits.model
        self._model = model
        self._config = model.config
        self._heads = exits.heads
        self._vocab = exits.vocab
        self._cache = cache
        self._states = states
        self._tables = tables
        self._layers = [layer.weights for layer in model.layers]
        self._lm_head = plain(model.lm_head)
        self._exit_lm_head = plain(exits.lm_head)
        self._projections = projections
        seqs = len(states.stage)
        self._scratch = _Scratch(model, exits.heads, seqs, len(self._exit_lm_head))

    @property
    def head_rows(self) -> Tensor:
        """Rows int64 [1] that exits' LM heads were run for since the first segment began."""
        return self._scratch.fired.total

    def run(self, segment: int, limit: int) -> None:
        """Launch ``segment`` for all that wait there, at most ``limit`` sequences."""
        states, active = self._states, self._scratch.active.first(limit)
        gather_rows(states, active, segment, self._tables.holds, block_size=self._cache.block_size)
        if segment == 0:
            states.emitted.fill_(EMPTY)
            self._scratch.fired.total.zero_()
            embed_rows(self._model.embeddings, states.token, active.list, self._scratch.hidden)
        cos, sin = self._model.rotary.at(active.positions)
        rows = RowTable(
            places=active.places,
            positions=active.positions,
            first_blocks=active.first_blocks,
            blocks=states.table.view(-1),
            block_size=self._cache.block_size,
            longest=states.table.shape[1] * self._cache.block_size,
            cos=cos,
            sin=sin,
            count=active.count,
        )
        bounds = (0, *self._model.exit_layers, self._config.num_layers)
        for layer in self._layers[bounds[segment] : bounds[segment + 1]]:
            self._layer(layer, active, rows)
        if segment < len(self._heads):
            self._exit(segment, active)
        else:
            self._head(active)

    def _layer(self, layer: LayerWeights, active: SegmentBatch, rows: RowTable) -> None:
        config, scratch, count, limit = self._config, self._scratch, active.count, active.limit
        state = Rows(scratch.hidden, active.seqs)
        k_cache, v_cache = self._cache.layers[layer.index]
        x = self._normed(state, layer.attn_norm, count, limit)
        _product(x, layer.qkv, Rows(scratch.qkv), count, limit)
        q = rope_and_store(
            scratch.qkv[:limit],
            layer.q_norm,
            layer.k_norm,
            rows.cos,
            rows.sin,
            k_cache,
            v_cache,
            rows.places,
            config.rms_norm_eps,
            heads=config.num_heads,
            count=count,
        )
        attended = decode_attention(q, k_cache, v_cache, rows, config.sliding_window).flatten(1)
        _product(Rows(attended), layer.o, state, count, limit, residual=Residual(state))
        x, inner = self._normed(state, layer.mlp_norm, count, limit), Rows(scratch.inner)
        _product(x, layer.gate_up, inner, count, limit, Activation.SWIGLU)
        _product(inner, layer.down, state, count, limit, residual=Residual(state))

    def _exit(self, point: int, active: SegmentBatch) -> None:
        """Gate for all, logits for those whose gate fires, K,V above for those that leave."""
        head, scratch, states = self._heads[point], self._scratch, self._states
        limit, eps = active.limit, self._config.rms_norm_eps
        fired, thresholds = scratch.fired.first(limit), self._tables.thresholds[:, point]
        inner = scratch.gate[:, : head.router_down.shape[1]]
        x = self._normed(Rows(scratch.hidden, active.seqs), None, active.count, limit)
        masked_linear(
            x,
            plain(head.products["router_up"]),
            Rows(inner),
            active.count,
            limit=limit,
            bias=head.router_up_bias,
            activation=Activation.SILU,
        )
        down = head.router_down, head.router_down_bias
        apply_gate(inner[:limit], *down, head.floor, thresholds, states, active, fired)
        self._adapt(head, fired, limit)
        x = self._normed(Rows(scratch.state), head.norm, fired.count, limit)
        logits = scratch.exit_logits[:limit]
        tokens = self._choose(
            x, self._exit_lm_head, logits, fired.list, scratch.exit_scores, self._vocab
        )
        if self._vocab is not None:
            tokens = self._vocab[tokens]
        exited = scratch.exited.first(limit)
        depth = head.layer
        apply_exit(
            fired,
            scratch.exit_scores,
            tokens,
            head.fuse,
            thresholds,
            depth,
            states,
            active,
            exited,
        )
        pages, angles = self._cache.pages[depth:], self._model.rotary.angles
        fill_kv(scratch.hidden, exited, self._projections[point], pages, angles, eps)

    def _adapt(self, head: PackedHead, fired: Fired, limit: int) -> None:
        """The exit's own state for those that fired, in the order of the list."""
        scratch, count = self._scratch, fired.count
        gate_up, down = head.products["gate_up"], head.products["down"]
        state, inner = Rows(scratch.hidden, fired.seqs), Rows(scratch.adapter[:, : down.shape[1]])
        x = self._normed(state, None, count, limit)
        _product(x, gate_up, inner, count, limit, Activation.SWIGLU)
        residual = Residual(state, head.scale)
        _product(inner, down, Rows(scratch.state), count, limit, residual=residual)

    def _head(self, active: SegmentBatch) -> None:
        """Full depth's tokens."""
        model, scratch, limit = self._model, self._scratch, active.limit
        state = Rows(scratch.hidden, active.seqs)
        x = self._normed(state, model.final_norm, active.count, limit)
        logits = scratch.logits[:limit]
        tokens = self._choose(x, self._lm_head, logits, active.list, scratch.scores)
        finish_rows(self._states, active, tokens, self._config.num_layers)

    def _normed(self, x: Rows, weight: Tensor | None, count: Tensor, limit: int) -> Rows:
        """Inputs of a product, until the next call."""
        out, eps = self._scratch.normed, self._config.rms_norm_eps
        masked_rms_norm(x.data, x.index, weight, out, count, eps, limit=limit)
        return Rows(out)

    def _choose(
        self,
        x: Rows,
        lm_head: Tensor,
        logits: Tensor,
        seqs: ActiveRows,
        scores: LogitScores,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Tokens [limit] of ``seqs`` as their sampling says, with the scores of the logits.

        They are places in the logits, whose token ids may be ``ids``.
        """
        limit = len(logits)
        masked_linear(x, lm_head, Rows(logits), seqs.count, limit=limit)
        score_logits(logits, seqs.count, scores)
        tokens = scores.token[:limit]
        sample_rows(logits, seqs, self._tables.sampling, self._states.index, tokens, ids)
        return tokens


class _Scratch:
    """Memory between launches; that of logits and inner states is shared by all layers."""

    def __init__(
        self, model: Transformer, heads: Sequence[PackedHead], seqs: int, exit_vocab: int
    ) -> None:
        config, device = model.config, model.device

        def zeros(width: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.zeros(seqs, width, dtype=dtype, device=device)

        self.hidden = zeros(config.hidden_size)
        self.normed = zeros(config.hidden_size)
        self.qkv = zeros(config.query_size + 2 * config.kv_size)
        self.inner = zeros(config.intermediate_size)
        self.logits = zeros(config.vocab_size, torch.float32)
        self.active, self.exited = (
            SegmentBatch.empty(seqs, device),
            SegmentBatch.empty(seqs, device),
        )
        self.scores = _no_scores(seqs, device)
        self.state = zeros(config.hidden_size)
        self.gate = zeros(max((head.router_down.shape[1] for head in heads), default=0))
        inner = [head.products["down"].shape[1] for head in heads]
        self.adapter = zeros(max(inner, default=0))
        self.exit_logits = zeros(exit_vocab if heads else 0, torch.float32)
        self.exit_scores = _no_scores(seqs, device)
        self.fired = Fired.empty(seqs, device)


def _no_scores(seqs: int, device: torch.device) -> LogitScores:
    """Scores whose tokens are valid from the start: rows that are never filled are looked up."""
    scores = LogitScores.empty(seqs, device)
    scores.token.zero_()
    return scores


def _product(
    x: Rows,
    weight: Linear,
    out: Rows,
    count: Tensor,
    limit: int,
    activation: Activation = Activation.NONE,
    residual: Residual | None = None,
) -> None:
    masked_linear(
        x,
        plain(weight),
        out,
        count,
        limit=limit,
        bias=weight.bias,
        activation=activation,
        residual=residual,
    )


def plain(weight: Linear) -> Tensor:
    """The weight itself."""
    assert weight.plain is not None
    return weight.plain
