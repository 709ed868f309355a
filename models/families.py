"""What differs between model families, one row of data each, and how their config is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from offramp.models.config import ModelConfig
from offramp.models.config_checks import check_sizes, known_fields, token_ids
from offramp.models.errors import CheckpointError, ModelError, UnsupportedModel
from offramp.models.files import is_number, read_json, shown

# What requests may name themselves, least and largest.
_SAMPLING = {
    "temperature": (0.0, 2.0),
    "top_k": (-1, 2**31),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}
# The dynamic and longrope kinds change their frequencies with the length of the sequence, which
# would make cached keys wrong; they stay out until asked for.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture, named as in ``architectures[0]`` of its config.json.

    ``model_type`` is transformers' name of its configuration. A bias of None is decided by the
    model's own config (``attention_bias``, ``mlp_bias``). ``prefix`` precedes the names of all
    tensors except the language-model head.
    """

    architecture: str
    model_type: str
    qkv_bias: bool | None
    output_bias: bool | None
    mlp_bias: bool | None
    qk_norm: bool
    prefix: str = "model."


FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", None, None, None, qk_norm=False),
        Family("MistralForCausalLM", "mistral", False, False, False, qk_norm=False),
        Family("Qwen2ForCausalLM", "qwen2", True, False, False, qk_norm=False),
        Family("Qwen3ForCausalLM", "qwen3", None, None, False, qk_norm=True),
    )
}


def config_from_hf(folder: Path) -> ModelConfig:
    """Read config.json and generation_config.json of a model in Hugging Face's layout.

    Raises CheckpointError when config.json is missing or damaged, UnsupportedModel when it asks
    for something not implemented, naming the field, its value and what is supported.
    """
    path = folder / "config.json"
    content = _read_object(path)
    family = family_of(content)
    try:
        config = _config(folder, family, content)
    except ModelError:
        raise
    except Exception as error:
        # Each transformers release has checks, and exceptions, of its own.
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not valid: {reason}") from error
    check_sizes(config)
    return config


def _config(folder: Path, family: Family, content: dict[str, Any]) -> ModelConfig:
    if content.get("quantization_config") is not None:
        found = shown(content["quantization_config"])
        raise UnsupportedModel("quantization_config", found, "weights in fp32, bf16 or fp16")
    hf = AutoConfig.for_model(family.model_type, **known_fields(content))
    if hf.hidden_act != "silu":
        raise UnsupportedModel("hidden_act", hf.hidden_act, "silu")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    inv_freq, rope_scale = _rope(hf, head_dim)
    attention_bias = bool(getattr(hf, "attention_bias", False))
    mlp_bias = bool(getattr(hf, "mlp_bias", False))
    positions = _positions(hf)
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
        max_position_embeddings=positions,
        rope_scale=rope_scale,
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        attention_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=mlp_bias if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(hf, positions),
        eos_token_ids=_eos_token_ids(folder, content, hf),
    )


def family_of(config: dict[str, Any]) -> Family:
    """Row of the architecture named by the content of a config.json, or UnsupportedModel."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise UnsupportedModel("architectures[0]", name, ", ".join(FAMILIES))
    kind = config.get("model_type", family.model_type)
    if kind != family.model_type:
        raise UnsupportedModel("model_type", kind, f"{family.model_type} for {name}")
    return family


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a model folder needs it") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


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


def _sliding_window(hf: PreTrainedConfig, positions: int) -> int | None:
    kinds = set(getattr(hf, "layer_types", None) or ())
    if len(kinds) > 1:
        raise UnsupportedModel("layer_types", sorted(kinds), "the same attention in all layers")
    if kinds == {"full_attention"}:
        return None
    window: int | None = getattr(hf, "sliding_window", None)
    # One as long as the context leaves nothing out, and need not fit the kernels' numbers.
    return None if window is None or window >= positions else window


def sampling_defaults(folder: Path) -> dict[str, float]:
    """Sampling parameters of the folder's generation_config.json that requests may leave open.

    Raises CheckpointError for numbers that a request could not have.
    """
    stored = _generation(folder)
    found = {name: float(stored[name]) for name in _SAMPLING if is_number(stored.get(name))}
    for name, value in found.items():
        low, high = _SAMPLING[name]
        if not low <= value <= high:
            raise CheckpointError(
                f"generation_config.json: {name} is {value:g}; it must be from {low:g} to "
                f"{high:g}, or use --generation-config none"
            )
    return found


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return _read_object(path) if path.exists() else {}


def _eos_token_ids(folder: Path, content: dict[str, Any], hf: PreTrainedConfig) -> tuple[int, ...]:
    """Ids that end a text; generation_config.json wins, as in transformers' generate."""
    own = token_ids("config.json: eos_token_id", content.get("eos_token_id", hf.eos_token_id))
    chosen = _generation(folder).get("eos_token_id")
    if chosen is not None:
        own = token_ids("generation_config.json: eos_token_id", chosen)
    # Ids that the model cannot say end nothing, and would be read outside the logits.
    return tuple(each for each in own if 0 <= each < hf.vocab_size)
