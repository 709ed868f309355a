"""Frequencies of rotary position embeddings (RoFormer, arXiv 2104.09864), plain and stretched.

Each operation, and the order of operations, is transformers': the values are the same bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offramp.models.errors import CheckpointError, UnsupportedModel

# The dynamic and longrope kinds change their frequencies with the length of the sequence, which
# would make cached keys wrong; they stay out until asked for.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# A band between two frequencies that are the same would be divided by.
_NARROWEST = 0.001


def plain_inv_freq(theta: float, dim: int) -> tuple[float, ...]:
    """Frequencies (dim // 2 values, radians per position) without any scaling."""
    return tuple((1.0 / _wavelengths(theta, dim)).tolist())


def scaled_inv_freq(
    rope: Mapping[str, Any], head_dim: int, positions: int
) -> tuple[tuple[float, ...], float]:
    """Frequencies (head_dim // 2 values, radians per position), and the factor on cos and sin.

    ``rope`` is a configuration's ``rope_parameters`` with its ``rope_type`` and ``rope_theta``,
    ``positions`` the context that the model was trained on. Raises UnsupportedModel, and
    CheckpointError for a field that is not there.
    """
    kind, theta = rope["rope_type"], float(rope["rope_theta"])
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if kind not in ROPE_TYPES:
        raise UnsupportedModel("rope_type", kind, ", ".join(ROPE_TYPES))
    if dim // 2 != head_dim // 2:
        found = rope.get("partial_rotary_factor")
        raise UnsupportedModel("partial_rotary_factor", found, "1.0")
    if kind == "default":
        return plain_inv_freq(theta, dim), 1.0
    if kind == "linear":
        return tuple((1.0 / _wavelengths(theta, dim) / _field(rope, "factor")).tolist()), 1.0
    if kind == "llama3":
        return tuple(_llama3(rope, theta, dim, positions).tolist()), 1.0
    frequencies, scale = _yarn(rope, theta, dim, positions)
    return tuple(frequencies.tolist()), scale


def _wavelengths(theta: float, dim: int) -> Tensor:
    """Positions per radian [dim // 2]."""
    power: Tensor = theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    return power


def _field(rope: Mapping[str, Any], name: str) -> float:
    value = rope.get(name)
    if value is None:
        raise CheckpointError(f"config.json: rope_parameters of {rope['rope_type']} lack {name}")
    return float(value)


def _trained(rope: Mapping[str, Any], positions: int) -> float:
    """Positions that the model knew before it was stretched."""
    return float(rope.get("original_max_position_embeddings") or positions)


def _llama3(rope: Mapping[str, Any], theta: float, dim: int, positions: int) -> Tensor:
    """Low frequencies are divided, high ones stay, those between are blended (Llama 3.1)."""
    plain = 1.0 / _wavelengths(theta, dim)
    trained, factor = _trained(rope, positions), _field(rope, "factor")
    low, high = _field(rope, "low_freq_factor"), _field(rope, "high_freq_factor")
    turn = 2 * math.pi / plain
    divided = torch.where(turn > trained / low, plain / factor, plain)
    share = (trained / turn - low) / (high - low)
    blend = (1 - share) * divided / factor + share * divided
    between = ~(turn < trained / high) & ~(turn > trained / low)
    return torch.where(between, blend, divided)


def _yarn(rope: Mapping[str, Any], theta: float, dim: int, positions: int) -> tuple[Tensor, float]:
    """Interpolation of low frequencies only, with a ramp between (YaRN, arXiv 2309.00071, 3.2)."""
    trained = _trained(rope, positions)
    factor = float(rope.get("factor") or positions / trained)
    limits = [
        dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    ]
    if rope.get("truncate", True):
        limits = [math.floor(limits[0]), math.ceil(limits[1])]
    low, high = max(limits[0], 0), min(limits[1], dim - 1)
    if low == high:
        high += _NARROWEST
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    wavelengths = _wavelengths(theta, dim)
    kept = 1 - ramp
    frequencies = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return frequencies, _attention_factor(rope, factor)


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """What attention's logits grow by with the context (YaRN, 3.4), as a factor on cos and sin."""
    own = rope.get("attention_factor")
    if own is not None:
        return float(own)
    one, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    if one and all_dims:
        return _growth(factor, one) / _growth(factor, all_dims)
    return _growth(factor, 1.0)


def _growth(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
