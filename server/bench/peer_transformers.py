"""transformers' generate as a target: static batches, padded on the left, fp32, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from offramp.server.bench.load import Trace

_PAD = 0


class Transformers:
    """The model in ``folder``. A batch starts when the one before has ended."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ends = self._model.generation_config.eos_token_id
        self._ends = [ends] if isinstance(ends, int) else list(ends or ())

    def run(
        self,
        prompts: Sequence[tuple[int, ...]],
        *,
        mode: str,
        concurrency: int,
        max_tokens: int,
        ignore_eos: bool = False,
    ) -> list[Trace]:
        """See Target."""
        del mode
        ends = [] if ignore_eos else self._ends
        traces: list[Trace] = []
        for first in range(0, len(prompts), concurrency):
            traces += self._batch(prompts[first : first + concurrency], max_tokens, ends)
        return traces

    def _batch(
        self, prompts: Sequence[tuple[int, ...]], max_tokens: int, ends: list[int]
    ) -> list[Trace]:
        begun = time.monotonic()
        width = max(map(len, prompts))
        ids = torch.tensor([[_PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        clock = _Clock()
        # A keyword of None would be replaced by the model's own ends.
        self._model.generation_config.eos_token_id = ends or None
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=_PAD,
                streamer=clock,
            )
        answers = [_ended(row, ends) for row in out[:, width:].tolist()]
        return [
            Trace(prompt, begun, answer, clock.times[: len(answer)])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


class _Clock(BaseStreamer):
    """Notes when each step's tokens are known; the first call brings the prompt."""

    def __init__(self) -> None:
        self._calls = 0
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        del value
        self._calls += 1
        if self._calls > 1:
            self.times.append(time.monotonic())

    def end(self) -> None:
        """Nothing is held back."""


def _ended(row: list[int], ends: list[int]) -> list[int]:
    """The row up to its first end, without the padding that follows."""
    stop = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: stop + 1]
