"""What an engine bench rides on: one random model, and loops over it with and without exits."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.models.device_loop import Boarding, DeviceLoop, Recorder
from offramp.models.kv_cache import KVCache
from offramp.models.loading.formats import as_they_are
from offramp.models.runner import Runner
from offramp.models.sampling_params import NEVER, SamplingParams
from offramp.models.transformer import Transformer
from offramp.server.bench.engine.model import (
    exit_vocab,
    random_heads,
    random_tokens,
    random_weights,
)
from offramp.server.bench.engine.options import BLOCK, Options


class Rig:
    """Both loops share weights and pages, so they are used one after the other.

    ``full`` has no exit points at all, ``exits`` has those of the options.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        config, device, dtype = options.config, options.device, options.dtype
        weights = random_weights(config, dtype, device, options.seed)
        self.cache = KVCache(config, options.slots * options.blocks, BLOCK, dtype, device)
        # Contexts that nobody ran: keys and values of the size that random weights make.
        generator = torch.Generator(device).manual_seed(options.seed)
        self.cache.pages.normal_(generator=generator)
        order = torch.randperm(self.cache.num_blocks, generator=torch.Generator().manual_seed(0))
        self.blocks: list[list[int]] = order.view(options.slots, options.blocks).tolist()
        positions = options.blocks * BLOCK
        without = Transformer(config, weights, (), positions, as_they_are())
        self.model = Transformer(config, weights, options.exits, positions, as_they_are())
        self.heads = random_heads(self.model, options.width, options.gate, options.seed)
        vocab = exit_vocab(options.vocab, device)
        slots = options.slots, options.blocks
        self.full = Seat(Runner(without, (), self.cache, 1).decode_loop(*slots), self)
        runner = Runner(self.model, self.heads, self.cache, 1, vocab)
        self.exits = Seat(runner.decode_loop(*slots), self)


class Seat:
    """A loop with the trace its tokens follow, and the way back to where a ride began."""

    def __init__(self, loop: DeviceLoop, rig: Rig) -> None:
        options = rig.options
        self.loop = loop
        self._blocks = rig.blocks
        self._options = options
        device, slots, exits = options.device, options.slots, len(options.exits)
        self._trace = torch.full((options.tokens, slots, exits), NEVER, device=device)
        # A loop without exits pays for the same reading of the trace, and throws it away.
        own = loop.tables.thresholds
        self._asked = own if own.shape[1] else torch.zeros(slots, exits, device=device)
        self._slots = torch.arange(slots, device=device)
        states = loop.states
        self._states = states.stage, states.waited, states.token, states.position, states.index
        self._kept = [tensor.clone() for tensor in self._states]
        recorder = Recorder(device)
        with torch.inference_mode():
            self.ask = recorder.record(self._ask)
            """Write the thresholds of the token that each slot is making, held or not."""
            self.rewind = recorder.record(self._rewind)
            """Put all slots back to where `keep` found them."""

    @property
    def num_segments(self) -> int:
        """Segments of the loop."""
        return len(self.loop.tables.holds)

    def follow(self, trace: Tensor) -> None:
        """Thresholds fp32 [tokens, slots, exits] for `ask`, from the first token on."""
        self._trace.copy_(trace)

    def board(self, batch: int, seed: int) -> None:
        """Slots 0 to ``batch`` - 1 stand at the end of their contexts, all others are empty."""
        options = self._options
        tokens = random_tokens(options.config, batch, seed)
        sampling = SamplingParams(max_tokens=options.length, temperature=0.0)
        never = (NEVER,) * self.loop.tables.thresholds.shape[1]
        self.loop.clear(range(options.slots))
        self.loop.board(
            [
                Boarding(
                    slot=slot,
                    token=tokens[slot],
                    position=options.context,
                    index=0,
                    table=self._blocks[slot],
                    end=options.length,
                    sampling=sampling,
                    thresholds=never,
                )
                for slot in range(batch)
            ]
        )

    def keep(self, stage: int, batch: int) -> None:
        """Remember where slots stand, the first ``batch`` waiting at ``stage``."""
        for kept, now in zip(self._kept, self._states, strict=True):
            kept.copy_(now)
        self._kept[0][:batch] = stage

    def _ask(self) -> None:
        rows = self.loop.states.index.remainder(len(self._trace))
        self._asked.copy_(self._trace[rows, self._slots])

    def _rewind(self) -> None:
        for now, kept in zip(self._states, self._kept, strict=True):
            now.copy_(kept)
