"""What differs between model families, one row of data each, and how their config is read.

transformers reads the same files. It is not used, because a server would pay for it with two
seconds and 120 MB; the tests compare every field with what it finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.models.config import ModelConfig
from offramp.models.config_checks import check_sizes, known_fields, token_ids
from offramp.models.errors import CheckpointError, UnsupportedModel
from offramp.models.files import is_number, read_json, shown
from offramp.models.rope import scaled_inv_freq

# What requests may name themselves, least and largest.
_SAMPLING = {
    "temperature": (0.0, 2.0),
    "top_k": (-1, 2**31),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}
_NEEDED = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)
_ROPE_THETA = 10000.0
_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture, named as in ``architectures[0]`` of its config.json.

    ``model_type`` is transformers' name of its configuration. A bias of None is decided by the
    model's own config (``attention_bias``, ``mlp_bias``). ``prefix`` precedes the names of all
    tensors except the language-model head. ``positions``, ``kv_heads``, ``head_dim``, ``window``
    and ``end`` stand for fields that a config leaves out; None: as many K,V heads as others, heads
    that share the hidden size, no window, no end. ``late_window``: a window is for layers from
    ``max_window_layers`` on, and only with ``use_sliding_window``.
    """

    architecture: str
    model_type: str
    qkv_bias: bool | None
    output_bias: bool | None
    mlp_bias: bool | None
    qk_norm: bool
    positions: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    late_window: bool = False
    end: int | None = None
    prefix: str = "model."


FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            *("LlamaForCausalLM", "llama", None, None, None),
            qk_norm=False,
            positions=2048,
            end=2,
        ),
        Family(
            *("MistralForCausalLM", "mistral", False, False, False),
            qk_norm=False,
            positions=131_072,
            kv_heads=8,
            window=4096,
            end=2,
        ),
        Family(
            *("Qwen2ForCausalLM", "qwen2", True, False, False),
            qk_norm=False,
            positions=32_768,
            kv_heads=32,
            window=4096,
            late_window=True,
        ),
        Family(
            *("Qwen3ForCausalLM", "qwen3", None, None, False),
            qk_norm=True,
            positions=32_768,
            kv_heads=32,
            head_dim=128,
            window=4096,
            late_window=True,
        ),
    )
}
# Layers below it attend to everything where a window is for late layers.
_WINDOW_LAYERS = 28


def config_from_hf(folder: Path) -> ModelConfig:
    """Read config.json and generation_config.json of a model in Hugging Face's layout.

    Raises CheckpointError when config.json is missing or damaged, UnsupportedModel when it asks
    for something not implemented, naming the field, its value and what is supported.
    """
    path = folder / "config.json"
    content = _read_object(path)
    family = family_of(content)
    if content.get("quantization_config") is not None:
        found = shown(content["quantization_config"])
        raise UnsupportedModel("quantization_config", found, "weights in fp32, bf16 or fp16")
    fields = known_fields(content)
    missing = [name for name in _NEEDED if fields.get(name) is None]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    act = fields.get("hidden_act", "silu")
    if act != "silu":
        raise UnsupportedModel("hidden_act", act, "silu")
    config = _config(fields, family, _eos_token_ids(folder, content, family))
    check_sizes(config)
    return config


def _config(
    fields: Mapping[str, Any], family: Family, eos_token_ids: tuple[int, ...]
) -> ModelConfig:
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim = _stated(fields, "head_dim", family.head_dim)
    if head_dim is None and hidden % heads:
        raise UnsupportedModel("hidden_size", hidden, f"multiples of num_attention_heads, {heads}")
    head_dim = head_dim or hidden // heads
    trained = _or(fields.get("max_position_embeddings"), family.positions)
    rope = _rope(fields, trained)
    inv_freq, rope_scale = scaled_inv_freq(rope, head_dim, trained)
    attention_bias = bool(fields.get("attention_bias"))
    mlp_bias = bool(fields.get("mlp_bias"))
    positions = _positions(rope, trained)
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=fields["vocab_size"],
        hidden_size=hidden,
        intermediate_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=_stated(fields, "num_key_value_heads", family.kv_heads) or heads,
        head_dim=head_dim,
        rms_norm_eps=float(_or(fields.get("rms_norm_eps"), _NORM_EPS)),
        inv_freq=inv_freq,
        max_position_embeddings=positions,
        rope_scale=rope_scale,
        tie_word_embeddings=bool(fields.get("tie_word_embeddings")),
        attention_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=mlp_bias if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(fields, family, positions),
        eos_token_ids=tuple(each for each in eos_token_ids if 0 <= each < fields["vocab_size"]),
    )


def _stated(fields: Mapping[str, Any], name: str, default: int | None) -> int | None:
    """A field's value, None included; the default where there is no such field."""
    value: int | None = fields.get(name, default)
    return value


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


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


def _rope(fields: Mapping[str, Any], trained: int) -> dict[str, Any]:
    """Parameters of the rotary embeddings, wherever this layout of the config has them."""
    rope = {**(fields.get("rope_scaling") or fields.get("rope_parameters") or {})}
    rope.setdefault("rope_type", rope.get("type", "default"))
    for name, default in (("rope_theta", _ROPE_THETA), ("partial_rotary_factor", 1.0)):
        rope[name] = _or(rope.get(name), _or(fields.get(name), default))
    if rope["rope_type"] in ("llama3", "yarn"):
        outside = fields.get("original_max_position_embeddings")
        own = _or(outside, rope.get("original_max_position_embeddings"))
        rope["original_max_position_embeddings"] = own or trained
    return rope


def _positions(rope: Mapping[str, Any], trained: int) -> int:
    """Longest context: scaled positions reach ``factor`` times as far as those trained on."""
    if rope["rope_type"] not in ("linear", "yarn"):
        return trained
    original = rope.get("original_max_position_embeddings") or trained
    factor = rope.get("factor")
    return trained if factor is None else max(trained, int(float(factor) * original))


def _sliding_window(fields: Mapping[str, Any], family: Family, positions: int) -> int | None:
    window = _stated(fields, "sliding_window", family.window)
    kinds = set(fields.get("layer_types") or ())
    if family.late_window:
        window = window if fields.get("use_sliding_window") else None
        if not kinds and window is not None:
            kinds = _late_kinds(fields)
    if len(kinds) > 1:
        raise UnsupportedModel("layer_types", sorted(kinds), "the same attention in all layers")
    if kinds == {"full_attention"}:
        return None
    # One as long as the context leaves nothing out, and need not fit the kernels' numbers.
    return None if window is None or window >= positions else window


def _late_kinds(fields: Mapping[str, Any]) -> set[str]:
    """Kinds of attention where layers have a window from ``max_window_layers`` on."""
    layers = fields["num_hidden_layers"]
    first = min(_or(fields.get("max_window_layers"), _WINDOW_LAYERS), layers)
    late = {"sliding_attention"} if first < layers else set()
    return late | ({"full_attention"} if first else set())


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


def _eos_token_ids(folder: Path, content: dict[str, Any], family: Family) -> tuple[int, ...]:
    """Ids that end a text; generation_config.json wins, as in transformers' generate.

    Ids that the model cannot say end nothing, and are left out by who knows its vocabulary.
    """
    own = token_ids("config.json: eos_token_id", content.get("eos_token_id", family.end))
    chosen = _generation(folder).get("eos_token_id")
    if chosen is not None:
        own = token_ids("generation_config.json: eos_token_id", chosen)
    return own
