"""A model of a given shape with random weights, and decode loops over it with and without exits.

Speed does not depend on the values of weights, so they are drawn on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from offramp.models.config import ModelConfig
from offramp.models.device_loop import DeviceLoop, NewRow, Recorder
from offramp.models.exits.head import ExitHead
from offramp.models.exits.training.train import TrainOptions, new_head
from offramp.models.kv_cache import KVCache
from offramp.models.loading.formats import as_they_are
from offramp.models.runner import Runner
from offramp.models.sampling_params import NEVER, SamplingParams
from offramp.models.transformer import Transformer
from offramp.server.bench.engine.options import BLOCK, Options

# Gate scores then spread over 0 to 1 instead of lying around a half.
_GATE_SPREAD = 4.0


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """The loader's canonical tensors of a model without biases and head norms.

    Products keep the size of what they are given (std 1 / sqrt(in)) and norms are ones, so a state
    grows with the root of the layers and stays finite in fp16 too.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float | None = None) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=device)
        return made.normal_(0.0, std or shape[-1] ** -0.5, generator=generator)

    d, inner = config.hidden_size, config.intermediate_size
    ones = torch.ones(d, dtype=dtype, device=device)
    weights = {"embed": normal(config.vocab_size, d, std=1.0), "final_norm": ones}
    if not config.tie_word_embeddings:
        weights["lm_head"] = normal(config.vocab_size, d)
    for layer in range(config.num_layers):
        made = {
            "attn_norm": ones.clone(),
            "mlp_norm": ones.clone(),
            "qkv": normal(config.query_size + 2 * config.kv_size, d),
            "o": normal(d, config.query_size),
            "gate_up": normal(2 * inner, d),
            "down": normal(d, inner),
        }
        weights |= {f"layers.{layer}.{name}": tensor for name, tensor in made.items()}
    return weights


def random_heads(model: Transformer, width: int, gate: int, seed: int) -> list[ExitHead]:
    """An exit head for each exit layer of ``model``, in its dtype, with nothing left at zero."""
    options = TrainOptions(width=width, router=gate, seed=seed)
    generator = torch.Generator(model.device).manual_seed(seed)

    def placed(head: ExitHead) -> ExitHead:
        head.down.normal_(0.0, width**-0.5, generator=generator)
        head.router_down.normal_(0.0, _GATE_SPREAD / math.sqrt(gate), generator=generator)
        head.router_down_bias.normal_(generator=generator)
        tensors: dict[str, Any] = {
            field.name: value.to(model.dtype)
            for field in fields(head)
            if isinstance(value := getattr(head, field.name), Tensor)
        }
        return replace(head, **tensors)

    return [placed(new_head(layer, model, options)) for layer in model.exit_layers]


def random_tokens(config: ModelConfig, count: int, seed: int) -> Sequence[int]:
    """Token ids without meaning."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(config.vocab_size, (count,), generator=generator).tolist()
    return tokens


def start_greedy(
    loop: DeviceLoop,
    newest: Sequence[tuple[int, int]],
    tables: Sequence[Sequence[int]],
    thresholds: Sequence[tuple[float, ...]],
    end: int,
) -> None:
    """Give the first sequences to greedy answers and empty all others.

    ``newest`` is the newest token and its position, ``tables`` the K,V blocks and ``thresholds``
    the exits' scores, for each of these sequences. No answer goes beyond position ``end``.
    """
    sampling = SamplingParams(max_tokens=end, temperature=0.0)
    loop.clear(range(len(loop.state.stage)))
    loop.add(
        [
            NewRow(seq, token, position, 0, table, end, sampling, own)
            for seq, ((token, position), table, own) in enumerate(
                zip(newest, tables, thresholds, strict=True)
            )
        ]
    )


class RandomModel:
    """One random model with two decode loops over it.

    ``full`` is a loop without exits, ``exits`` one with those of the options. Both share weights
    and K,V pages, so they are used one after the other. ``blocks`` [sequences, blocks] are the
    numbers of each sequence's K,V blocks.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        config, device, dtype = options.config, options.device, options.dtype
        weights = random_weights(config, dtype, device, options.seed)
        self.cache = KVCache(config, options.seqs * options.blocks, BLOCK, dtype, device)
        # The contexts are not run: keys and values have the size that random weights make.
        generator = torch.Generator(device).manual_seed(options.seed)
        self.cache.pages.normal_(generator=generator)
        order = torch.randperm(self.cache.num_blocks, generator=torch.Generator().manual_seed(0))
        self.blocks: list[list[int]] = order.view(options.seqs, options.blocks).tolist()
        positions = options.blocks * BLOCK
        without = Transformer(config, weights, (), positions, as_they_are())
        self.model = Transformer(config, weights, options.exits, positions, as_they_are())
        self.heads = random_heads(self.model, options.width, options.gate, options.seed)
        # Which tokens the exits choose from does not matter to speed.
        vocab = None if options.vocab is None else torch.arange(options.vocab, device=device)
        seqs = options.seqs, options.blocks
        self.full = RecordedLoop(Runner(without, (), self.cache, 1).device_loop(*seqs), self)
        runner = Runner(self.model, self.heads, self.cache, 1, vocab)
        self.exits = RecordedLoop(runner.device_loop(*seqs), self)


class RecordedLoop:
    """A decode loop whose tokens leave as a trace says, and whose sequences can be set back.

    Both are recorded on the device: ``set_thresholds`` writes the thresholds of the token that each
    sequence is making, ``restore`` puts all sequences back to where ``save`` found them.
    """

    def __init__(self, loop: DeviceLoop, random_model: RandomModel) -> None:
        options = random_model.options
        self.loop = loop
        self._blocks = random_model.blocks
        self._options = options
        device, seqs, exits = options.device, options.seqs, len(options.exits)
        self._trace = torch.full((options.tokens, seqs, exits), NEVER, device=device)
        # A loop without exits reads the trace all the same, for equal cost, and throws it away.
        own = loop.params.thresholds
        self._written = own if own.shape[1] else torch.zeros(seqs, exits, device=device)
        self._seqs = torch.arange(seqs, device=device)
        states = loop.state
        self._states = states.stage, states.waited, states.token, states.position, states.index
        self._saved = [tensor.clone() for tensor in self._states]
        recorder = Recorder(device)
        with torch.inference_mode():
            self.set_thresholds = recorder.record(self._set_thresholds)
            self.restore = recorder.record(self._restore)

    @property
    def num_segments(self) -> int:
        """Segments of the loop."""
        return len(self.loop.params.holds)

    def use_trace(self, trace: Tensor) -> None:
        """Thresholds fp32 [tokens, sequences, exits] for ``set_thresholds``, by a token's index."""
        self._trace.copy_(trace)

    def start(self, batch: int, seed: int) -> None:
        """Put sequences 0 to ``batch`` - 1 at the end of their contexts, and empty all others."""
        options = self._options
        tokens = random_tokens(options.config, batch, seed)
        newest = [(token, options.context) for token in tokens]
        never = [(NEVER,) * self.loop.params.thresholds.shape[1]] * batch
        start_greedy(self.loop, newest, self._blocks[:batch], never, options.length)

    def save(self, stage: int, batch: int) -> None:
        """Remember the sequences' states, with the first ``batch`` waiting at segment ``stage``."""
        for saved, now in zip(self._saved, self._states, strict=True):
            saved.copy_(now)
        self._saved[0][:batch] = stage

    def _set_thresholds(self) -> None:
        rows = self.loop.state.index.remainder(len(self._trace))
        self._written.copy_(self._trace[rows, self._seqs])

    def _restore(self) -> None:
        for now, saved in zip(self._states, self._saved, strict=True):
            now.copy_(saved)
