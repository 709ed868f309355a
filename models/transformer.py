"""The whole stack: embedding, segments, final norm and LM head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from offramp.kernels.decoder import NativeLayers, Taps, rows_matrix
from offramp.kernels.kv_fill import Projection
from offramp.kernels.linear import Linear
from offramp.kernels.lm_head import NativeHead
from offramp.kernels.noise import TokenNoise
from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rotary import RotaryTable
from offramp.kernels.rows import HostRows, Span
from offramp.kernels.weight_formats import WeightFormat
from offramp.models.config import ModelConfig
from offramp.models.exits.head import ExitHead
from offramp.models.kv_cache import KVCache
from offramp.models.layers import DecoderLayer
from offramp.models.loading.formats import Recipes

# Prompts of random tokens by which states are known: tokens of each, how many at once, and how
# often at most. Of large models one pass takes long enough, so bytes of weights bound it too.
_SAMPLE_TOKENS = 16
_SAMPLES = 16
_SAMPLE_PASSES = 2
_SAMPLE_BYTES = 1 << 29


class Segment:
    """Layers ``first .. last`` (half-open) of the stack."""

    def __init__(self, layers: list[DecoderLayer]) -> None:
        self.layers = layers
        self._native = NativeLayers.of([layer.weights for layer in layers], layers[0].sizes)

    @property
    def first(self) -> int:
        """Index of the first layer."""
        return self.layers[0].index

    @property
    def native(self) -> NativeLayers | None:
        """All its layers for one call of the C kernels, where those hold them."""
        return self._native

    @property
    def is_native(self) -> bool:
        """Whether one call of the C kernels runs all its layers."""
        return self._native is not None

    def __len__(self) -> int:
        return len(self.layers)

    def __call__(
        self, hidden: Tensor, rows: HostRows, cache: KVCache, taps: Taps | None = None
    ) -> Tensor:
        """Advance ``hidden`` [T, d] through every layer, writing the rows' K,V into the cache.

        ``taps`` keep states on the way.
        """
        if self._native is not None:
            return self._native(hidden, rows, cache.pages, taps)
        for layer in self.layers:
            hidden = layer(hidden, rows.table, cache)
            if taps is not None:
                taps.keep(layer.index, hidden)
        return hidden


class Transformer:
    """A model cut into segments at ``exit_layers`` (ascending, each in 1 .. num_layers - 1).

    ``weights`` are the loader's canonical tensors, all of one dtype on one device; ``recipes`` say
    in which form their matrices are kept (None: exactly).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        exit_layers: tuple[int, ...],
        max_positions: int,
        recipes: Recipes | None = None,
    ) -> None:
        self.config = config
        self.exit_layers = exit_layers
        embed = weights["embed"]
        self.dtype, self.device = embed.dtype, embed.device
        self.final_norm = weights["final_norm"]
        self._tied = "lm_head" not in weights
        head = embed if self._tied else weights["lm_head"]
        self.lm_head = Linear(head, None, recipes.head if recipes else None)
        # What can be read row by row is kept as small as for products; a tied head not twice.
        rows = self.lm_head if self._tied else _rows(embed, recipes)
        self._embed = embed if rows.native is None else rows
        del embed, head, rows
        self.exit_forms = recipes.exits if recipes else None
        self.draft_forms = recipes.drafts if recipes else None
        own = recipes.layers if recipes else None
        layers = [DecoderLayer(config, index, weights, own) for index in range(config.num_layers)]
        bounds = [0, *exit_layers, config.num_layers]
        self.segments = [Segment(layers[begin:end]) for begin, end in pairwise(bounds)]
        self._joined: dict[tuple[int, int], Segment] = {}
        self._native_head = NativeHead.of(self.final_norm, self.lm_head, config.rms_norm_eps)
        self._native_embed = rows_matrix(self.embedding_weight)
        self.rotary = RotaryTable(
            torch.tensor(config.inv_freq),
            max_positions,
            config.rope_scale,
            self.dtype,
            self.device,
        )

    @property
    def layers(self) -> list[DecoderLayer]:
        """All layers, bottom up."""
        return [layer for segment in self.segments for layer in segment.layers]

    def joined(self, first: int, last: int) -> Segment:
        """Segments ``first`` to ``last`` as one, which the C kernels run in one call."""
        if first == last:
            return self.segments[first]
        key = first, last
        if key not in self._joined:
            own = self.segments[first : last + 1]
            self._joined[key] = Segment([layer for segment in own for layer in segment.layers])
        return self._joined[key]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a token reads on its way through all layers and the LM head."""
        products = [each for layer in self.layers for each in layer.weights.products]
        return sum(product.nbytes for product in (*products, self.lm_head))

    @property
    def embeddings(self) -> Tensor:
        """All embeddings [vocab, d], where they are kept as they are."""
        assert isinstance(self._embed, Tensor)
        return self._embed

    @property
    def embedding_weight(self) -> Linear | Tensor:
        """The embeddings [vocab, d] in the form in which they are kept."""
        return self._embed

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [n, d] of token ids [n]."""
        return self._embed.rows(ids) if isinstance(self._embed, Linear) else self._embed[ids]

    def head_rows(self, vocab: Tensor | None) -> Tensor:
        """LM-head rows [n, d] of token ids ``vocab`` [n] (None: all)."""
        if vocab is None:
            vocab = torch.arange(self.config.vocab_size, device=self.device)
        return self.embed(vocab) if self._tied else self.lm_head.rows(vocab)

    def run(
        self,
        segments: tuple[int, int],
        start: Tensor | Sequence[int],
        rows: HostRows,
        cache: KVCache,
        taps: Taps | None = None,
    ) -> Tensor:
        """Hidden states [T, d] after ``segments``, first and last.

        ``start`` are the states [T, d] before them, or token ids [T]. Writes the rows' K,V into
        the cache; ``taps`` keep states on the way.
        """
        joined = self.joined(*segments)
        if isinstance(start, Tensor):
            return joined(start, rows, cache, taps)
        if joined.native is not None and self._native_embed is not None:
            return joined.native.from_tokens(start, self._native_embed, rows, cache.pages, taps)
        return joined(self.embed(torch.tensor(start, device=self.device)), rows, cache, taps)

    def head(self, hidden: Tensor, places: Sequence[int]) -> tuple[Tensor, list[int] | None]:
        """Logits fp32 [n, vocab] of the full-depth states at ``places`` [n] of ``hidden`` [T, d].

        With them the likeliest tokens, where the C kernels find them on the way.
        """
        if self._native_head is not None:
            return self._native_head(hidden, places)
        states = hidden[torch.tensor(places, device=self.device)]
        return self.logits(self.normed(states)), None

    def likeliest(
        self, hidden: Tensor, places: Sequence[int], noises: Sequence[TokenNoise | None]
    ) -> list[int] | None:
        """The tokens of the same rows' largest logits with noise; None if `head` is as fast."""
        if self._native_head is None:
            return None
        return self._native_head.likeliest(hidden, places, noises)

    def screen_head(self, cache: KVCache) -> None:
        """Make `likeliest` faster, where that is possible.

        Prompts of random tokens show where states lie (kernels/lm_head.py). Their K,V go into the
        first blocks of the cache, which no request may hold yet.
        """
        if self._native_head is None or not self._native_head.can_screen:
            return
        length = min(_SAMPLE_TOKENS, cache.block_size, self.rotary.length)
        spans = [Span(range(length), (block,)) for block in range(min(_SAMPLES, cache.num_blocks))]
        rows = HostRows(spans, cache.block_size, self.rotary, self.device)
        passes = max(1, min(_SAMPLE_PASSES, _SAMPLE_BYTES // self.weight_bytes))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.vocab_size, (passes, len(rows)), generator=generator)
        every = 0, len(self.segments) - 1
        with torch.inference_mode():
            states = [self.run(every, some, rows, cache) for some in ids.tolist()]
            self._native_head.screen(self.normed(torch.cat(states)))

    def normed(self, hidden: Tensor) -> Tensor:
        """Final norm of full-depth states [n, d]."""
        return rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)

    def logits(self, normed: Tensor) -> Tensor:
        """LM head: normalised states [n, d] to logits [n, vocab] in fp32."""
        return self.lm_head(normed).float()


def identity_projection(model: Transformer, first: int) -> tuple[Tensor, Tensor | None]:
    """K,V projections of layers ``first`` and up for one shared normalised input.

    Weight [layers * 2 * kv_size, d] with each layer's norm folded in, per layer K rows then V rows,
    and bias or None: right if the state at ``first`` were the input of every layer above.
    """
    start = model.config.query_size
    layers = model.layers[first:]
    weight = torch.cat([layer.qkv.weight[start:] * layer.attn_norm for layer in layers])
    biases = [layer.qkv.bias[start:] for layer in layers if layer.qkv.bias is not None]
    return weight, torch.cat(biases) if biases else None


def _rows(embed: Tensor, recipes: Recipes | None) -> Linear:
    """Embeddings that are not the LM head's, in the format that would be best for such a head."""
    return Linear(embed, None, recipes.head if recipes else (WeightFormat.PLAIN,))


def kv_projection(model: Transformer, head: ExitHead) -> Projection:
    """What fills K,V above an exit: its own learned map, else the identity projection."""
    layers = model.layers[head.layer :]
    norms = [layer.k_norm for layer in layers if layer.k_norm is not None]
    weight, bias = head.kv_map, head.kv_bias
    if weight is None:
        weight, bias = identity_projection(model, head.layer)
    return Projection(weight, bias, torch.stack(norms) if norms else None)
