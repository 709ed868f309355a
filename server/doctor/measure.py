"""A few seconds of decoding: what a step takes on this machine, and what would be fast here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from offramp.kernels.weight_formats import first_to_hold
from offramp.models.loading.formats import choose, rounded
from offramp.models.loading.safetensors import StoredWeights
from offramp.models.sampling_params import ExitMode, ExitSettings, SamplingParams
from offramp.server.bench.device import bandwidth
from offramp.server.config import EngineConfig
from offramp.server.doctor.findings import Finding, Level
from offramp.server.engine.build import build_engine, runner_of
from offramp.server.engine.device import native_kernels
from offramp.server.engine.engine import Engine
from offramp.server.engine.offline import run_all
from offramp.server.engine.request import GenerationRequest
from offramp.server.text.prompts import BUILT_IN
from offramp.server.text.tokenizer import Tokenizer

_TOKENS = 48
# After so long nothing more is begun, however slow the model is.
_PATIENCE_S = 20.0
_PROMPTS = 6
# Gains below this are noise of so short a measurement.
_NOISE = 0.03


def measure(config: EngineConfig, folder: Path) -> Iterator[Finding]:
    """Build the engine as a start does, and run it; raises what that raises."""
    engine = build_engine(config, folder, model_name=config.model)
    runner = runner_of(engine)
    device = runner.model.device
    copied, read = bandwidth(device)
    text = f"{read / 1e9:.1f} GB/s read, {copied / 1e9:.1f} copied"
    yield Finding("memory bandwidth", text)
    if device.type == "cpu":
        found = StoredWeights(folder, runner.model.config, dtype=runner.model.dtype)
        native = native_kernels(config)
        stored = rounded(config.weights, found, quantized=found.quantized, native=native)
        recipes = choose(config.weights, stored, native=native)
        head = first_to_hold(recipes.head, stored["lm_head" if "lm_head" in stored else "embed"])
        layers = first_to_hold(recipes.layers, stored["layers.0.gate_up"])
        forms = f"{layers} in the layers, {head} in the head"
        inputs = ", inputs in 8 bits" if config.activation_dtype == "int8" else ""
        yield Finding("weights in use", f"{forms}{inputs}")
    modes = [ExitMode.OFF, *([ExitMode.LOSSLESS] if engine.info.draft_head else [])]
    speeds = _speeds(engine, _prompts(folder, engine), modes)
    off = speeds[ExitMode.OFF]
    text = f"{1000 / off:.2f} ms a token, {off:.0f} tokens/s, exits off, one stream"
    yield Finding("decoding", text)
    if ExitMode.LOSSLESS not in speeds:
        yield Finding("lossless", "no draft head: guesses come from exits and the text so far only")
        return
    gain = speeds[ExitMode.LOSSLESS] / off
    text = f"{speeds[ExitMode.LOSSLESS]:.0f} tokens/s, {gain:.2f} times off, one stream"
    if gain < 1 - _NOISE:
        yield Finding("lossless", text, Level.WARNING, "it does not pay here: --early-exit off")
    else:
        yield Finding("lossless", f"{text}{': it pays' if gain > 1 + _NOISE else ''}")


def _prompts(folder: Path, engine: Engine) -> list[tuple[int, ...]]:
    tokenizer, most = Tokenizer.load(folder), engine.info.max_model_len
    texts = BUILT_IN[:_PROMPTS]
    if tokenizer.template:
        made = [tokenizer.encode_chat([{"role": "user", "content": text}], most) for text in texts]
    else:
        made = tokenizer.encode(texts, most)
    return [ids[: max(1, most - _TOKENS)] for ids in made]


def _speeds(
    engine: Engine, prompts: list[tuple[int, ...]], modes: list[ExitMode]
) -> dict[ExitMode, float]:
    """Tokens a second by mode, without prompts; modes take turns, as others use the machine."""
    tokens = dict.fromkeys(modes, 0)
    seconds = dict.fromkeys(modes, 0.0)
    begun = time.monotonic()
    # The first prompt warms up.
    for number, prompt in enumerate([prompts[0], *prompts]):
        if number > 1 and time.monotonic() - begun > _PATIENCE_S:
            break
        for mode in modes:
            count = min(_TOKENS, engine.info.max_model_len - len(prompt))
            request = GenerationRequest(
                f"doctor-{number}-{mode}",
                prompt,
                SamplingParams(max_tokens=count, temperature=0.0),
                ExitSettings(mode=mode),
            )
            (answer,) = run_all(engine, [request], concurrency=1)
            if number:
                tokens[mode] += len(answer.times) - 1
                seconds[mode] += answer.times[-1] - answer.times[0]
    return {mode: tokens[mode] / seconds[mode] for mode in modes}
