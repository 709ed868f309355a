"""transformers' own continuous batching as a target, on any device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from offramp.server.bench.errors import LoadError
from offramp.server.bench.load import Trace

_PAGE = 256
# A token that no vocabulary has: answers end by their length alone.
_NO_END = -1


class Batching:
    """The model in ``folder``; ``context`` is the most tokens of prompt and answer.

    Prefix sharing is off. The manager of a batch size is made at its first run and kept, as a
    server would keep it.
    """

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, context: int
    ) -> None:
        model = cast("Any", AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
        self._model = model.to(device).eval()
        self._blocks = -(-context // _PAGE) + 1
        self._concurrency = 0

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
        if concurrency != self._concurrency:
            self.close()
            self._concurrency = concurrency
        options = {} if not ignore_eos else {"eos_token_id": _NO_END}
        begun = time.perf_counter()
        found = self._model.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=GenerationConfig(
                max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, **self._ends | options
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE,
                num_blocks=self._blocks * concurrency,
                max_requests_per_batch=concurrency,
                allow_block_sharing=False,
            ),
            record_timestamps=True,
            persistent_manager=True,
        )
        # Its clock is perf_counter; traces are told in monotonic time.
        shift = time.monotonic() - time.perf_counter()
        traces = [
            Trace(
                prompt,
                begun + shift,
                list(output.generated_tokens),
                [at + shift for at in output.timestamps],
            )
            for prompt, output in zip(prompts, found.values(), strict=False)
        ]
        if len(traces) < len(prompts) or not all(trace.token_ids for trace in traces):
            raise LoadError("transformers' continuous batching gave up; see its messages above")
        return traces

    def close(self) -> None:
        """End the manager, and free its pages."""
        if self._concurrency:
            self._model.destroy_cached_continuous_batching_manager()
        self._concurrency = 0

    @property
    def _ends(self) -> dict[str, object]:
        return {"eos_token_id": self._model.generation_config.eos_token_id}
