"""Shapes of models that are measured without their weights, and the tiny model with random ones.

A shape tells how fast a model runs, not how well it answers. ``tiny`` has a byte tokenizer and is
for tests and for trying the server offline.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from offramp.kernels.native_build import remove_leftovers
from offramp.models.config import ModelConfig
from offramp.models.files import check_safetensors, read_json
from offramp.models.rope import plain_inv_freq

_SEED = 20
# Large enough that layers change the state and greedy text does not fall into one token.
_WEIGHT_STD = 0.3
# Rows of specials and of bytes that are no printable ASCII are made short: tied to the head, they
# then rarely win, so generated text is readable and seldom ends by itself.
_UNLIKELY_SCALE = 0.1
_END_OF_TEXT, _TURN_START, _TURN_END = _SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# One merge each, so the vocabulary has no id without a text.
_PAIRS = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve "
    "co me de hi ri ro ic ne ea ra ce li ch ll be ma si om ur ca el ta la ns di fo ho pe ec pr"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _llama(
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    inner: int,
    layers: int,
    vocab: int,
    *,
    theta: float,
    positions: int,
    tied: bool,
) -> ModelConfig:
    """A model of the Llama family without biases, in the order that model cards use."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        inv_freq=plain_inv_freq(theta, head_dim),
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
    )


# Of its weights; their header comes on top.
_TINY_BYTES = 670_000
_TINY = _llama(64, 4, 2, 16, 128, 4, 320, theta=10000.0, positions=2048, tied=True)
# Llama 3.1 and later stretch their frequencies for long contexts; that changes no shape.
MODEL_SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "llama-3-8b": _llama(
            4096, 32, 8, 128, 14336, 32, 128256, theta=500000.0, positions=8192, tied=False
        ),
        "llama-3.2-1b": _llama(
            2048, 32, 8, 64, 8192, 16, 128256, theta=500000.0, positions=131072, tied=True
        ),
        "smollm2-135m": _llama(
            576, 9, 3, 64, 1536, 30, 49152, theta=100000.0, positions=8192, tied=True
        ),
        "tiny": _TINY,
    }
)
"""Shapes by name; ``tiny`` is that of the model that `write_tiny` makes, for rehearsals."""


def write_tiny(folder: Path) -> Path:
    """Write the tiny model into ``folder`` in Hugging Face's layout; the same bytes every time.

    Llama-shaped, 4 layers, tied embedding, 320 tokens, context 2048; ends at ``<|im_end|>`` or
    ``<|endoftext|>``. Returns ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    # Moved into place file by file, so that a reader of the same folder never meets half of one.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _write(Path(scratch))
        for path in Path(scratch).iterdir():
            path.replace(folder / path.name)
    return folder


def holds_tiny(folder: Path) -> bool:
    """Whether ``folder`` has what `write_tiny` would write, as far as names and sizes tell."""
    try:
        config = read_json(folder / "config.json")
        check_safetensors(folder / "model.safetensors")
        size = (folder / "model.safetensors").stat().st_size
    except (OSError, ValueError):
        return False
    others = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    whole = all((folder / name).is_file() for name in (*others, "generation_config.json"))
    return whole and size > _TINY_BYTES and bool(config == _json_files()["config.json"])


def _write(folder: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(_weights(tokenizer), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    for name, content in _json_files().items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _json_files() -> dict[str, dict[str, object]]:
    ids = {"bos_token_id": 1, "pad_token_id": 2}
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": _TINY.vocab_size,
            "hidden_size": _TINY.hidden_size,
            "intermediate_size": _TINY.intermediate_size,
            "num_hidden_layers": _TINY.num_layers,
            "num_attention_heads": _TINY.num_heads,
            "num_key_value_heads": _TINY.num_kv_heads,
            "head_dim": _TINY.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": _TINY.max_position_embeddings,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "dtype": "float32",
            "eos_token_id": 2,
            **ids,
        },
        "generation_config.json": {"eos_token_id": [2, 0], **ids},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": _TINY.max_position_embeddings,
            "bos_token": _TURN_START,
            "eos_token": _TURN_END,
            "pad_token": _TURN_END,
            "unk_token": _END_OF_TEXT,
        },
    }


def _tokenizer() -> Tokenizer:
    pairs = _PAIRS.split()
    tokens = [*_SPECIALS, *sorted(ByteLevel.alphabet()), *pairs]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[(pair[0], pair[1]) for pair in pairs]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in _SPECIALS])
    return tokenizer


def _weights(tokenizer: Tokenizer) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    hidden, inner = _TINY.hidden_size, _TINY.intermediate_size

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * _WEIGHT_STD

    scale = _row_scale(tokenizer)
    weights = {"model.embed_tokens.weight": random(_TINY.vocab_size, hidden) * scale}
    for layer in range(_TINY.num_layers):
        prefix = f"model.layers.{layer}."
        weights[f"{prefix}input_layernorm.weight"] = 1 + random(hidden)
        weights[f"{prefix}self_attn.q_proj.weight"] = random(_TINY.query_size, hidden)
        weights[f"{prefix}self_attn.k_proj.weight"] = random(_TINY.kv_size, hidden)
        weights[f"{prefix}self_attn.v_proj.weight"] = random(_TINY.kv_size, hidden)
        weights[f"{prefix}self_attn.o_proj.weight"] = random(hidden, _TINY.query_size)
        weights[f"{prefix}post_attention_layernorm.weight"] = 1 + random(hidden)
        weights[f"{prefix}mlp.gate_proj.weight"] = random(inner, hidden)
        weights[f"{prefix}mlp.up_proj.weight"] = random(inner, hidden)
        weights[f"{prefix}mlp.down_proj.weight"] = random(hidden, inner)
    weights["model.norm.weight"] = 1 + random(hidden)
    return weights


def _row_scale(tokenizer: Tokenizer) -> Tensor:
    """Factor of each embedding row, [V, 1]."""
    texts = [tokenizer.decode([index]) for index in range(_TINY.vocab_size)]
    likely = torch.tensor([text.isascii() and text.isprintable() and bool(text) for text in texts])
    return torch.where(likely, 1.0, _UNLIKELY_SCALE).unsqueeze(1)
