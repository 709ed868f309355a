"""The model that a server would load: its files, its exits, and the memory it needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from offramp.models.families import config_from_hf
from offramp.models.kv_cache import bytes_per_block
from offramp.models.loading.formats import choose, keeps_integers, rounded
from offramp.models.loading.safetensors import StoredWeights
from offramp.models.loading.sources import ALIASES, CARRIERS, TINY
from offramp.paths import cache_folder
from offramp.server.config import GIB, EngineConfig
from offramp.server.doctor.findings import Finding, Level
from offramp.server.doctor.limits import memory_available
from offramp.server.doctor.machine import disk_free, writable
from offramp.server.engine.build import decision_file, draft_file, exit_file, tuned_weights
from offramp.server.engine.device import (
    blocks_that_fit,
    check_shape,
    context_length,
    kv_cache_dtype,
    native_kernels,
    placement,
    takes_coarse_inputs,
)
from offramp.server.text.tokenizer import Tokenizer

# Python and its libraries, and what steps hold.
_BESIDE = GIB / 2
# 4-bit weights with their scales, the smallest form there is.
_LEAST_BYTES_A_WEIGHT = 0.625


def absent(config: EngineConfig) -> Iterator[Finding]:
    """What the first start would do about a model that is not here."""
    folder, name = cache_folder(), config.model
    alias = ALIASES.get(name.lower())
    if alias is None and name != TINY:
        yield Finding("model", f"{name} is not here; the first start fetches it from the hub")
        return
    if not writable(folder):
        advice = "make it writable, or set OFFRAMP_CACHE_DIR to another folder"
        yield Finding("model", f"{name} has to be written to {folder}", Level.ERROR, advice)
    elif alias is not None:
        needed = CARRIERS[alias].size + CARRIERS[alias].converted_size
        text = f"{name} is not here; the first start fetches it ({needed / GIB:.1f} GiB of disk)"
        lacks = disk_free(folder) < needed
        advice = "free disk space, or set OFFRAMP_CACHE_DIR" if lacks else "or: offramp pull"
        yield Finding("model", text, Level.ERROR if lacks else Level.OK, advice)
    else:
        yield Finding("model", f"{name} is made at the first start")


def model(config: EngineConfig, folder: Path) -> Iterator[Finding]:
    """Read all of a model's files, as a start does; raises what that raises."""
    device, dtype = placement(config)
    shape = config_from_hf(folder)
    check_shape(shape, device)
    stored = StoredWeights(folder, shape, dtype=dtype)
    for name in stored:
        # Reading a tensor checks that its values are numbers.
        stored[name]
    weights, own = tuned_weights(config.exits, stored)
    count = stored.count
    yield Finding(
        "model",
        f"{config.model} in {folder}: {shape.architecture}, {shape.num_layers} layers, "
        f"{count / 1e6:.1f} million weights, all of them numbers",
    )
    tokenizer = Tokenizer.load(folder)
    template = "a chat template" if tokenizer.template else "no chat template: only completions"
    yield Finding("tokenizer", template)
    exits = exit_file(config.exits, own, weights, shape, dtype, device)
    drafts = draft_file(config.draft_head, own, shape, on_device=device.type == "cuda")
    decisions = decision_file(config.decision_heads, own, shape, device)
    layers = ", ".join(str(head.layer) for head in exits.heads)
    found = [f"exits after {layers}" if layers else "no exit file: every token runs every layer"]
    found.append("a draft head" if drafts else "no draft head")
    if decisions and decisions.tasks:
        found.append(f"decisions: {', '.join(decisions.tasks)}")
    yield Finding("early exit", ", ".join(found))
    longest = context_length(shape, config)
    extra = 0 if drafts is None else 1
    if device.type == "cpu":
        native = native_kernels(config)
        weights = rounded(config.weights, weights, quantized=stored.quantized, native=native)
    recipes = choose(config.weights, weights, native=native_kernels(config))
    integers = keeps_integers(recipes, weights)
    takes_coarse_inputs(config, shape, integers=integers)
    cache_dtype = kv_cache_dtype(config, shape, dtype, device, integers=integers)
    blocks = blocks_that_fit(shape, config, exits.heads, longest, dtype, cache_dtype, device, extra)
    size = bytes_per_block(shape, config.block_size, cache_dtype, extra)
    yield Finding("K,V cache", f"{blocks * config.block_size} tokens, {longest} for a request")
    if device.type == "cpu":
        yield _memory(count, count * dtype.itemsize, blocks * size)


def _memory(count: int, weights: float, cache: float) -> Finding:
    """What is needed against what is free; weights are smaller where their form is."""
    free, needed = memory_available(), weights + cache + _BESIDE
    text = f"needs up to {needed / GIB:.1f} GiB ({weights / GIB:.1f} for weights, "
    text += f"{cache / GIB:.1f} for K,V)"
    if free is None:
        return Finding("memory needed", text)
    text += f", {free / GIB:.1f} are free"
    if count * _LEAST_BYTES_A_WEIGHT + _BESIDE > free:
        return Finding("memory needed", text, Level.ERROR, "take a smaller model or more memory")
    if needed > free:
        advice = "lower --kv-cache-memory"
        return Finding("memory needed", text, Level.WARNING, advice)
    return Finding("memory needed", text)
