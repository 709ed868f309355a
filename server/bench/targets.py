"""What answers prompts: an engine here or transformers (servers: over_http.py); all tokens timed.

A load is closed: ``concurrency`` answers are under way, and the next begins when one ends.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from offramp.models.loading import gguf_weights
from offramp.models.sampling_params import ExitMode, ExitSettings, KVFill, SamplingParams
from offramp.server.bench.common import BenchError
from offramp.server.engine.engine import Engine
from offramp.server.engine.offline import run_all
from offramp.server.engine.request import GenerationRequest

Prompt = tuple[int, ...]
"""Token ids."""

_PAD = 0
_PAGE = 256
# A token that no vocabulary has: answers end by their length alone.
_NO_END = -1


@dataclass(slots=True)
class Trace:
    """One answer as its client saw it; ``times`` [tokens] in seconds.

    ``layers_executed`` is summed over tokens, None where the target does not report it; ``passes``
    through the whole stack made them, and ``drafts`` are drafted and accepted tokens by source.
    Layers took inputs of 8 bits of a ``coarse`` one.
    """

    prompt: Prompt
    submitted_at: float
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    layers_executed: int | None = None
    passes: int | None = None
    drafts: dict[str, tuple[int, int]] = field(default_factory=dict)
    coarse: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """How prompts are answered; see Target.run.

    Tokens are drawn at ``temperature`` (0: the likeliest), the i-th answer's with ``seed`` + i.
    """

    mode: str
    concurrency: int
    max_tokens: int
    ignore_eos: bool
    temperature: float = 0.0
    seed: int = 0


class Target(ABC):
    """Something that answers prompts."""

    def run(
        self,
        prompts: Sequence[Prompt],
        *,
        mode: str,
        concurrency: int,
        max_tokens: int,
        ignore_eos: bool = False,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Trace]:
        """Answers of at most ``max_tokens`` tokens, ``concurrency`` at a time.

        ``ignore_eos`` makes all of them that long; peers have no modes. Raises BenchError.
        """
        load = Load(mode, concurrency, max_tokens, ignore_eos, temperature, seed)
        return self.answers(prompts, load)

    @abstractmethod
    def answers(self, prompts: Sequence[Prompt], load: Load) -> list[Trace]:
        """The same, for ``load``."""


class InProcess(Target):
    """An engine on this thread: what the machine can do, without HTTP.

    ``threshold`` replaces the scores the exits were calibrated to.
    """

    def __init__(
        self, engine: Engine, threshold: float | None = None, kv_fill: str = "project"
    ) -> None:
        self.engine = engine
        exits = len(engine.info.exit_layers)
        self._thresholds = None if threshold is None else (threshold,) * exits
        self._fill = KVFill(kv_fill)
        self._count = 0

    def answers(self, prompts: Sequence[Prompt], load: Load) -> list[Trace]:
        """See Target."""
        ends = () if load.ignore_eos else self.engine.info.eos_token_ids
        sampling = SamplingParams(
            max_tokens=load.max_tokens,
            temperature=load.temperature,
            stop_token_ids=frozenset(ends),
        )
        exits = ExitSettings(ExitMode(load.mode), thresholds=self._thresholds, kv_fill=self._fill)
        requests = [
            GenerationRequest(
                str(self._count + 1 + i), prompt, replace(sampling, seed=load.seed + i), exits
            )
            for i, prompt in enumerate(prompts)
        ]
        self._count += len(requests)
        traces = []
        for item in run_all(self.engine, requests, concurrency=load.concurrency):
            if item.stats is None or not item.token_ids:
                raise BenchError(f"an answer ended early: {item.reason}")
            stats = item.stats
            traces.append(
                Trace(
                    item.request.prompt,
                    item.submitted_at,
                    item.token_ids,
                    item.times,
                    stats.layers_executed,
                    stats.passes,
                    {source.value: counts for source, counts in stats.drafts.items()},
                    stats.coarse,
                )
            )
        return traces


def transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    """Transformers' own model of ``folder``; that of a GGUF file with weights as read here."""
    index = folder / gguf_weights.INDEX
    if not index.exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    file = gguf_weights.GgufFile(index)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = getattr(transformers, config.architectures[0]).from_pretrained(
        None,
        config=config,
        state_dict={name: file.get_tensor(name) for name in sorted(file.keys())},
        dtype=dtype,
    )
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


class Transformers(Target):
    """transformers' generate for the model in ``folder``, fp32, on the CPU.

    Batches are static and padded on the left; one starts when the one before has ended.
    """

    def __init__(self, folder: Path) -> None:
        self._model = transformers_model(folder, torch.float32).eval()
        ends = self._model.generation_config.eos_token_id
        self._ends = [ends] if isinstance(ends, int) else list(ends or ())

    def answers(self, prompts: Sequence[Prompt], load: Load) -> list[Trace]:
        """See Target."""
        ends = [] if load.ignore_eos else self._ends
        traces: list[Trace] = []
        for first in range(0, len(prompts), load.concurrency):
            batch = prompts[first : first + load.concurrency]
            traces += self._batch(batch, load.max_tokens, ends)
        return traces

    def _batch(self, prompts: Sequence[Prompt], max_tokens: int, ends: list[int]) -> list[Trace]:
        begun = time.monotonic()
        width = max(map(len, prompts))
        ids = torch.tensor([[_PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        clock = _StepTimes()
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


class _StepTimes(BaseStreamer):
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


class Batching(Target):
    """transformers' own continuous batching for the model in ``folder``, on any device.

    ``context`` is the most tokens of prompt and answer. Prefix sharing is off. The manager of a
    batch size is made at its first run and kept, as a server would keep it.
    """

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, context: int
    ) -> None:
        model = cast(
            "Any",
            transformers_model(folder, dtype),
        )
        self._model = model.to(device).eval()
        self._blocks = -(-context // _PAGE) + 1
        self._concurrency = 0

    def answers(self, prompts: Sequence[Prompt], load: Load) -> list[Trace]:
        """See Target."""
        if load.concurrency != self._concurrency:
            self.close()
            self._concurrency = load.concurrency
        ends = _NO_END if load.ignore_eos else self._model.generation_config.eos_token_id
        begun = time.perf_counter()
        found = self._model.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=GenerationConfig(
                max_new_tokens=load.max_tokens, do_sample=False, pad_token_id=0, eos_token_id=ends
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE,
                num_blocks=self._blocks * load.concurrency,
                max_requests_per_batch=load.concurrency,
                allow_block_sharing=False,
            ),
            record_timestamps=True,
            persistent_manager=True,
        )
        # Its clock is perf_counter; traces are in monotonic time.
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
            raise BenchError("transformers' continuous batching gave up; see its messages above")
        return traces

    def close(self) -> None:
        """End the manager, and free its pages."""
        if self._concurrency:
            self._model.destroy_cached_continuous_batching_manager()
        self._concurrency = 0
