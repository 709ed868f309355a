"""One segment's ride of decode tokens, in launches that know nothing of how many ride.

Who rides, who leaves and what they owe is decided on the device (kernels/riders.py,
exit_decision.py), so the same launches serve any number of riders up to a limit, and a CUDA graph
can hold them. A token's hidden state stays in its slot's row from embedding to head.
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
from offramp.kernels.masked_linear import Activation, Norm, Residual, Rows, masked_linear
from offramp.kernels.rows import RowTable
from offramp.kernels.sampling import SamplingTable, sample_rows
from offramp.models.exits.checks import Exits
from offramp.models.exits.head import PackedHead
from offramp.models.kv_cache import KVCache
from offramp.models.transformer import Transformer


@dataclass(frozen=True, slots=True)
class DecodeParams:
    """What the host tells the device of every slot.

    ``thresholds`` fp32 [slots, exits], above 1 where a token may not leave; ``holds`` fp32
    [segments, 2] as in `gather_rows`.
    """

    sampling: SamplingTable
    thresholds: Tensor
    holds: Tensor


class DevicePass:
    """Runs segments for slots at the newest token of their answer.

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
        slots = len(states.stage)
        self._scratch = _Scratch(model, exits.heads, slots, len(self._exit_lm_head))

    @property
    def head_rows(self) -> Tensor:
        """Rows int64 [1] that exits' LM heads were run for since the ground segment began."""
        return self._scratch.fired.total

    def run(self, segment: int, limit: int) -> None:
        """Launch ``segment`` for all that wait there, at most ``limit`` slots."""
        states, riders = self._states, self._scratch.riders.first(limit)
        gather_rows(states, riders, segment, self._tables.holds, block_size=self._cache.block_size)
        if segment == 0:
            states.emitted.fill_(EMPTY)
            self._scratch.fired.total.zero_()
            embed_rows(self._model.embeddings, states.token, riders.list, self._scratch.hidden)
        cos, sin = self._model.rotary.at(riders.positions)
        rows = RowTable(
            places=riders.places,
            positions=riders.positions,
            first_blocks=riders.first_blocks,
            blocks=states.table.view(-1),
            block_size=self._cache.block_size,
            longest=states.table.shape[1] * self._cache.block_size,
            cos=cos,
            sin=sin,
            count=riders.count,
        )
        bounds = (0, *self._model.exit_layers, self._config.num_layers)
        for layer in self._layers[bounds[segment] : bounds[segment + 1]]:
            self._layer(layer, riders, rows)
        if segment < len(self._heads):
            self._exit(segment, riders)
        else:
            self._head(riders)

    def _layer(self, layer: LayerWeights, riders: SegmentBatch, rows: RowTable) -> None:
        config, scratch, count, limit = self._config, self._scratch, riders.count, riders.limit
        state = Rows(scratch.hidden, riders.slots)
        k_cache, v_cache = self._cache.layers[layer.index]
        norm = Norm(layer.attn_norm, config.rms_norm_eps)
        _product(state, layer.qkv, Rows(scratch.qkv), count, limit, norm=norm)
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
        norm = Norm(layer.mlp_norm, config.rms_norm_eps)
        inner = Rows(scratch.inner)
        _product(state, layer.gate_up, inner, count, limit, norm, Activation.SWIGLU)
        _product(inner, layer.down, state, count, limit, residual=Residual(state))

    def _exit(self, point: int, riders: SegmentBatch) -> None:
        """Gate for all, logits for those whose gate fires, K,V above for those that leave."""
        head, scratch, states = self._heads[point], self._scratch, self._states
        limit, eps = riders.limit, self._config.rms_norm_eps
        fired, thresholds = scratch.fired.first(limit), self._tables.thresholds[:, point]
        inner = scratch.gate[:, : head.router_down.shape[1]]
        masked_linear(
            Rows(scratch.hidden, riders.slots),
            plain(head.products["router_up"]),
            Rows(inner),
            riders.count,
            limit=limit,
            bias=head.router_up_bias,
            norm=Norm(None, eps),
            activation=Activation.SILU,
        )
        down = head.router_down, head.router_down_bias
        apply_gate(inner[:limit], *down, head.floor, thresholds, states, riders, fired)
        self._adapt(head, fired, limit)
        norm = Norm(head.norm, eps)
        tokens = self._choose(
            Rows(scratch.state),
            self._exit_lm_head,
            scratch.exit_logits[:limit],
            fired.list,
            norm,
            scratch.exit_scores,
        )
        if self._vocab is not None:
            tokens = self._vocab[tokens]
        leavers = scratch.leavers.first(limit)
        depth = head.layer
        apply_exit(
            fired,
            scratch.exit_scores,
            tokens,
            head.fuse,
            thresholds,
            depth,
            states,
            riders,
            leavers,
        )
        pages, angles = self._cache.pages[depth:], self._model.rotary.angles
        fill_kv(scratch.hidden, leavers, self._projections[point], pages, angles, eps)

    def _adapt(self, head: PackedHead, fired: Fired, limit: int) -> None:
        """The exit's own state for those that fired, in the order of the list."""
        scratch, count = self._scratch, fired.count
        gate_up, down = head.products["gate_up"], head.products["down"]
        state, inner = Rows(scratch.hidden, fired.slots), Rows(scratch.adapter[:, : down.shape[1]])
        norm = Norm(None, self._config.rms_norm_eps)
        _product(state, gate_up, inner, count, limit, norm, Activation.SWIGLU)
        residual = Residual(state, head.scale)
        _product(inner, down, Rows(scratch.state), count, limit, residual=residual)

    def _head(self, riders: SegmentBatch) -> None:
        """Full depth's tokens."""
        model, scratch = self._model, self._scratch
        tokens = self._choose(
            Rows(scratch.hidden, riders.slots),
            self._lm_head,
            scratch.logits[: riders.limit],
            riders.list,
            Norm(model.final_norm, self._config.rms_norm_eps),
            scratch.scores,
        )
        finish_rows(self._states, riders, tokens, self._config.num_layers)

    def _choose(
        self,
        state: Rows,
        lm_head: Tensor,
        logits: Tensor,
        slots: ActiveRows,
        norm: Norm,
        scores: LogitScores,
    ) -> Tensor:
        """Tokens [limit] of ``slots`` as their sampling says, with the scores of the logits."""
        limit = len(logits)
        masked_linear(state, lm_head, Rows(logits), slots.count, limit=limit, norm=norm)
        score_logits(logits, slots.count, scores)
        tokens = scores.token[:limit]
        sample_rows(logits, slots, self._tables.sampling, self._states.index, tokens)
        return tokens


class _Scratch:
    """Memory between launches; that of logits and inner states is shared by all layers."""

    def __init__(
        self, model: Transformer, heads: Sequence[PackedHead], slots: int, exit_vocab: int
    ) -> None:
        config, device = model.config, model.device

        def zeros(width: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.zeros(slots, width, dtype=dtype, device=device)

        self.hidden = zeros(config.hidden_size)
        self.qkv = zeros(config.query_size + 2 * config.kv_size)
        self.inner = zeros(config.intermediate_size)
        self.logits = zeros(config.vocab_size, torch.float32)
        self.riders, self.leavers = (
            SegmentBatch.empty(slots, device),
            SegmentBatch.empty(slots, device),
        )
        self.scores = _no_scores(slots, device)
        self.state = zeros(config.hidden_size)
        self.gate = zeros(max((head.router_down.shape[1] for head in heads), default=0))
        inner = [head.products["down"].shape[1] for head in heads]
        self.adapter = zeros(max(inner, default=0))
        self.exit_logits = zeros(exit_vocab if heads else 0, torch.float32)
        self.exit_scores = _no_scores(slots, device)
        self.fired = Fired.empty(slots, device)


def _no_scores(slots: int, device: torch.device) -> LogitScores:
    """Scores whose tokens are real ones from the start: rows that nobody fills are looked up."""
    scores = LogitScores.empty(slots, device)
    scores.token.zero_()
    return scores


def _product(
    x: Rows,
    weight: Linear,
    out: Rows,
    count: Tensor,
    limit: int,
    norm: Norm | None = None,
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
        norm=norm,
        activation=activation,
        residual=residual,
    )


def plain(weight: Linear) -> Tensor:
    """The weight itself."""
    assert weight.plain is not None
    return weight.plain
