"""What differs between model families, one row of data each, and how their config is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from offramp.models.config import ModelConfig
from offramp.models.errors import CheckpointError, UnsupportedModel

# The dynamic and longrope kinds change their frequencies with the length of the sequence, which
# would make cached keys wrong; they stay out until asked for.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture, named as in ``architectures[0]`` of its config.json.

    A bias of None is decided by the model's own config (``attention_bias``, ``mlp_bias``).
    ``prefix`` precedes the names of all tensors except the language-model head.
    """

    architecture: str
    qkv_bias: bool | None
    output_bias: bool | None
    mlp_bias: bool | None
    qk_norm: bool
    prefix: str = "model."


FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", qkv_bias=None, output_bias=None, mlp_bias=None, qk_norm=False),
        Family(
            "MistralForCausalLM", qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False
        ),
        Family("Qwen2ForCausalLM", qkv_bias=True, output_bias=False, mlp_bias=False, qk_norm=False),
        Family("Qwen3ForCausalLM", qkv_bias=None, output_bias=None, mlp_bias=False, qk_norm=True),
    )
}


def config_from_hf(folder: Path) -> ModelConfig:
    """Read config.json and generation_config.json of a model in Hugging Face's layout.

    Raises CheckpointError when config.json is missing or damaged, UnsupportedModel when it asks
    for something not implemented, naming the field, its value and what is supported.
    """
    family = family_of(_read_json(folder / "config.json"))
    try:
        hf = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # Each transformers release has checks, and exceptions, of its own.
        raise CheckpointError(f"{folder / 'config.json'} is not valid: {error}") from error
    _check_supported(hf)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    inv_freq, rope_scale = _rope(hf, head_dim)
    attention_bias = bool(getattr(hf, "attention_bias", False))
    mlp_bias = bool(getattr(hf, "mlp_bias", False))
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=hf.rms_norm_eps,
        inv_freq=inv_freq,
        max_position_embeddings=_positions(hf),
        rope_scale=rope_scale,
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        attention_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=mlp_bias if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(hf),
        eos_token_ids=_eos_token_ids(folder, hf),
    )


def family_of(config: dict[str, Any]) -> Family:
    """Row of the architecture named by the content of a config.json, or UnsupportedModel."""
    names = config.get("architectures") or [None]
    family = FAMILIES.get(names[0])
    if family is None:
        raise UnsupportedModel("architectures[0]", names[0], ", ".join(FAMILIES))
    return family


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a model folder needs it") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _check_supported(hf: PreTrainedConfig) -> None:
    if hf.hidden_act != "silu":
        raise UnsupportedModel("hidden_act", hf.hidden_act, "silu")
    quantization = getattr(hf, "quantization_config", None)
    if quantization is not None:
        raise UnsupportedModel("quantization_config", quantization, "weights in fp32, bf16 or fp16")
    if hf.num_attention_heads % hf.num_key_value_heads:
        raise UnsupportedModel(
            "num_key_value_heads", hf.num_key_value_heads, f"divisors of {hf.num_attention_heads}"
        )


def _rope(hf: PreTrainedConfig, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Frequencies in radians per position (head_dim // 2 values) and the factor on cos and sin."""
    kind = hf.rope_parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise UnsupportedModel("rope_type", kind, ", ".join(ROPE_TYPES))
    if kind == "default":
        frequencies, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(
            cast("LlamaConfig", hf)
        )
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](hf)
    if len(frequencies) != head_dim // 2:
        raise UnsupportedModel(
            "partial_rotary_factor", hf.rope_parameters.get("partial_rotary_factor"), "1.0"
        )
    return tuple(frequencies.tolist()), float(scale)


def _positions(hf: PreTrainedConfig) -> int:
    """Longest context: scaled positions reach ``factor`` times as far as those trained on."""
    rope = hf.rope_parameters
    trained: int = hf.max_position_embeddings
    if rope["rope_type"] not in ("linear", "yarn"):
        return trained
    original = rope.get("original_max_position_embeddings") or trained
    return max(trained, int(float(rope["factor"]) * original))


def _sliding_window(hf: PreTrainedConfig) -> int | None:
    kinds = set(getattr(hf, "layer_types", None) or ())
    if len(kinds) > 1:
        raise UnsupportedModel("layer_types", sorted(kinds), "the same attention in all layers")
    if kinds == {"full_attention"}:
        return None
    window: int | None = getattr(hf, "sliding_window", None)
    return window


def sampling_defaults(folder: Path) -> dict[str, float]:
    """Sampling parameters of the folder's generation_config.json that requests may leave open."""
    path = folder / "generation_config.json"
    stored = _read_json(path) if path.exists() else {}
    return {
        name: float(stored[name])
        for name in _SAMPLING
        if isinstance(stored.get(name), int | float) and not isinstance(stored[name], bool)
    }


def _eos_token_ids(folder: Path, hf: PreTrainedConfig) -> tuple[int, ...]:
    """Ids that end a text; generation_config.json wins, as in transformers' generate."""
    path = folder / "generation_config.json"
    ids = _read_json(path).get("eos_token_id") if path.exists() else None
    if ids is None:
        ids = hf.eos_token_id
    if ids is None:
        return ()
    found = ids if isinstance(ids, list) else [ids]
    # Ids that the model cannot say end nothing, and would be read outside the logits.
    return tuple(int(each) for each in found if 0 <= int(each) < hf.vocab_size)
