"""Tiny random models of every family, with transformers' own beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from offramp.kernels.rows import HostRows, Span
from offramp.models.families import config_from_hf
from offramp.models.kv_cache import KVCache
from offramp.models.loading.formats import Recipes
from offramp.models.loading.safetensors import load_weights
from offramp.models.transformer import Transformer

LAYERS = 6
EXITS = (2, 4)
VOCAB = 96
POSITIONS = 128
BLOCK = 4
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-biased-tied": LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama3-rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "yarn-rope": LlamaConfig(**SIZES, rope_parameters=YARN_ROPE),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": MistralConfig(**SIZES, sliding_window=9),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3-wide-heads": Qwen3Config(**SIZES, head_dim=16),
}


def make(
    hf_config: PreTrainedConfig, folder: Path, recipes: Recipes | None = None
) -> tuple[Any, Transformer]:
    """Transformers' model with random weights, and ours loaded from its files."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    for name, parameter in theirs.named_parameters():
        # Norm weights around one, others large enough that every layer changes the state.
        mean = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean, 0.2)
    theirs.save_pretrained(folder)
    config = config_from_hf(folder)
    weights = load_weights(folder, config, dtype=torch.float32)
    return theirs, Transformer(config, weights, EXITS, POSITIONS, recipes)


def new_cache(model: Transformer, blocks: int = 40) -> KVCache:
    """Pages full of NaN: reading a place that was never written shows."""
    cache = KVCache(model.config, blocks, BLOCK, torch.float32, CPU)
    for pair in cache.layers:
        for pages in pair:
            pages.fill_(float("nan"))
    return cache


@torch.inference_mode()
def forward(
    model: Transformer, cache: KVCache, work: Sequence[tuple[int, Sequence[int], Sequence[int]]]
) -> Tensor:
    """Logits [T, vocab] of runs of tokens: each a first position, token ids and block table."""
    spans = [Span(range(start, start + len(ids)), table) for start, ids, table in work]
    rows = HostRows(spans, cache.block_size, model.rotary, model.device)
    hidden = model.embed(torch.tensor([token for _, ids, _ in work for token in ids]))
    for segment in model.segments:
        hidden = segment(hidden, rows, cache)
    return model.logits(model.normed(hidden))


@torch.inference_mode()
def their_logits(theirs: Any, ids: Sequence[int]) -> Tensor:
    """Logits [T, vocab] by transformers, the whole text at once."""
    logits: Tensor = theirs(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits


def random_ids(count: int) -> list[int]:
    """Token ids without meaning."""
    return torch.randint(3, VOCAB, (count,)).tolist()
