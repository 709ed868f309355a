"""GGUF files for tests: any model of the families with random weights, and a small vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray

from offramp.models.config import ModelConfig
from offramp.models.families import FAMILIES

Array = NDArray[Any]
BYTES = [chr(index) for index in range(33, 127)]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIALS, *BYTES, "Ġ", "Ċ", "he", "ll", "hell"]
MERGES = ["h e", "l l", "he ll"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass
class Wish:
    """What a file is to be like: ``stored`` chooses the type of a matrix by its name."""

    arch: str = "llama"
    pre: str | None = "smollm"
    model: str = "gpt2"
    tokens: list[str] = field(default_factory=lambda: list(TOKENS))
    merges: list[str] = field(default_factory=lambda: list(MERGES))
    stored: Callable[[str], gguf.GGMLQuantizationType] = lambda _: gguf.GGMLQuantizationType.F32
    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Array] = field(default_factory=dict)
    add_bos: bool = False


def paired(weight: Array, heads: int) -> Array:
    """Rows of queries or keys in the order of llama.cpp's rotation: pairs of neighbours."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, config: ModelConfig, weights: Mapping[str, Array], wish: Wish | None = None
) -> None:
    """Write ``weights``, by transformers' names, as llama.cpp's converter would."""
    wish = wish or Wish()
    arch = wish.arch
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, value in wish.values.items():
        key = f"{arch}{name}" if name.startswith(".") else name
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        (writer.add_float32 if isinstance(value, float) else add)(key, value)
    writer.add_tokenizer_model(wish.model)
    if wish.pre is not None:
        writer.add_tokenizer_pre(wish.pre)
    writer.add_token_list(wish.tokens)
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.CONTROL if token in SPECIALS else kinds.NORMAL for token in wish.tokens]
    )
    writer.add_token_merges(wish.merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(wish.add_bos)
    writer.add_chat_template(TEMPLATE)
    for name, value in weights.items():
        _add(writer, config, name, value, wish)
    for name, value in wish.tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, config: ModelConfig, name: str, value: Array, wish: Wish) -> None:
    base, _, kind = name.rpartition(".")
    if base.startswith("model.layers."):
        layer, _, part = base.removeprefix("model.layers.").partition(".")
        own = f"blk.{layer}.{_NAMES[part]}.{kind}"
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(_NAMES[part])
        if wish.arch == "llama" and heads:
            value = paired(value, heads)
    else:
        own = f"{_NAMES[base]}.{kind}"
    stored = wish.stored(own) if value.ndim > 1 else gguf.GGMLQuantizationType.F32
    blocks = value if stored is gguf.GGMLQuantizationType.F32 else quantize(value, stored)
    writer.add_tensor(own, np.ascontiguousarray(blocks), raw_dtype=stored)


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Array]:
    """Random weights by transformers' names."""
    random = np.random.default_rng(seed)
    d, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, d),
        "model.norm.weight": (d,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, d)
    query, kv = config.query_size, config.kv_size
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (d,),
            f"{prefix}self_attn.q_proj.weight": (query, d),
            f"{prefix}self_attn.k_proj.weight": (kv, d),
            f"{prefix}self_attn.v_proj.weight": (kv, d),
            f"{prefix}self_attn.o_proj.weight": (d, query),
            f"{prefix}post_attention_layernorm.weight": (d,),
            f"{prefix}mlp.gate_proj.weight": (inner, d),
            f"{prefix}mlp.up_proj.weight": (inner, d),
            f"{prefix}mlp.down_proj.weight": (d, inner),
        }
        if FAMILIES[config.architecture].qkv_bias:
            sizes = {"q_proj": query, "k_proj": kv, "v_proj": kv}
            shapes |= {f"{prefix}self_attn.{part}.bias": (n,) for part, n in sizes.items()}
        if config.qk_norm:
            shapes |= {f"{prefix}self_attn.{part}_norm.weight": (config.head_dim,) for part in "qk"}
    return {
        name: random.normal(scale=0.3, size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
