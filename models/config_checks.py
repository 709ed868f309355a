"""Numbers of a config.json, checked before anything is made of them.

The kernels take sizes as int32 and trust them, and transformers makes lists and tables as long as
these numbers say. Bounds are several times the largest of any published model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from offramp.models.config import ModelConfig
from offramp.models.errors import CheckpointError, UnsupportedModel
from offramp.models.files import is_number, is_whole, shown

_COUNTS = {
    "vocab_size": 2**22,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "max_position_embeddings": 2**24,
    "original_max_position_embeddings": 2**24,
    # Longer than any text is no window at all, and some name 2^31 for that.
    "sliding_window": 2**63 - 1,
}
"""Largest whole number a field may have; the least is 1."""
_WHOLE = {"max_window_layers": (0, 1024)}
# In fp32 smaller ones vanish, and a state of zeros would be divided by zero.
_NUMBERS = {
    "rms_norm_eps": (1e-30, 1.0),
    "rope_theta": (1e-3, 1e30),
    "factor": (1e-3, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "partial_rotary_factor": (1e-6, 1.0),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "attention_factor": (1e-6, 1e6),
    "mscale": (0.0, 1e6),
    "mscale_all_dim": (0.0, 1e6),
}
"""Least and largest value of fields that may be broken numbers."""
_SWITCHES = (
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"),
    "truncate",
)
_ROPE = ("rope_parameters", "rope_scaling")
_WORDS = ("rope_type", "type")
_MORE = ("hidden_act", "layer_types")
_MOST_IDS = 4096


def known_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of a config.json that shape a model, each of the right type and size.

    All others are left out: some would run code, or make tables of any length. Raises
    CheckpointError that names the field.
    """
    found = {name: content[name] for name in _names() if name in content}
    for name, value in found.items():
        if name in _ROPE:
            _check_rope(name, value)
        else:
            _check(name, value, name)
    return found


def _names() -> Iterator[str]:
    yield from _COUNTS
    yield from _WHOLE
    yield from _NUMBERS
    yield from _SWITCHES
    yield from _ROPE
    yield from _MORE


def check_sizes(config: ModelConfig) -> None:
    """Raise CheckpointError for sizes, defaults included, that do not fit one another."""
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
    }
    for name, value in sizes.items():
        _check(name, value, name)
    if config.num_heads % config.num_kv_heads:
        raise UnsupportedModel(
            "num_key_value_heads", config.num_kv_heads, f"divisors of {config.num_heads}"
        )
    if config.head_dim % 2:
        raise UnsupportedModel("head_dim", config.head_dim, "even sizes")
    angles = (*config.inv_freq, config.rope_scale)
    if not all(0 <= each < math.inf for each in angles) or not config.rope_scale:
        raise CheckpointError("config.json: rope_parameters give angles that are no numbers")


def token_ids(name: str, value: object) -> tuple[int, ...]:
    """The ids of a field that has one, several, or None; raises CheckpointError."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    # Some configurations have -1 for an id that there is not.
    if len(ids) > _MOST_IDS or not all(is_whole(each, -1, 2**63 - 1) for each in ids):
        raise CheckpointError(f"{name} is {shown(value)}; it must be a token id, or a list of them")
    return tuple(ids)


def _check(field: str, value: object, name: str) -> None:
    """``field`` is what is looked up, ``name`` what the message says."""
    if value is None:
        return
    if field in _COUNTS:
        least, most = 1, _COUNTS[field]
        _require(is_whole(value, least, most), name, value, f"a whole number from 1 to {most}")
    elif field in _WHOLE:
        least, most = _WHOLE[field]
        _require(
            is_whole(value, least, most), name, value, f"a whole number from {least} to {most}"
        )
    elif field in _NUMBERS:
        low, high = _NUMBERS[field]
        fits = isinstance(value, int | float) and is_number(value) and low <= value <= high
        _require(fits, name, value, f"a number from {low:g} to {high:g}")
    elif field in _SWITCHES:
        _require(isinstance(value, bool), name, value, "true or false")
    elif field == "layer_types":
        words = isinstance(value, list) and all(isinstance(each, str) for each in value)
        _require(words, name, value, "a list of words")
    else:
        _require(isinstance(value, str), name, value, "a word")


def _check_rope(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json: {name} is {shown(value)}; it must be an object")
    for key, own in value.items():
        if isinstance(own, dict):
            raise UnsupportedModel(f"{name}.{key}", own, "the same positions in all layers")
        if key in (*_COUNTS, *_NUMBERS, *_SWITCHES, *_WORDS):
            _check(key, own, f"{name}.{key}")
        elif isinstance(own, float) and not math.isfinite(own):
            raise CheckpointError(f"config.json: {name}.{key} is {own}, no number")


def _require(fits: bool, name: str, value: object, wanted: str) -> None:  # noqa: FBT001 (a sentence)
    if not fits:
        raise CheckpointError(f"config.json: {name} is {shown(value)}; it must be {wanted}")
