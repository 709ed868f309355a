"""The draft head: one decoder layer that guesses the next tokens from states of the stack.

(EAGLE-3, arXiv 2503.01840, with the model's own LM head over a reduced vocabulary as in FR-Spec,
arXiv 2502.14856.) Guesses are verified at full depth, so the head decides speed and never answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.kernels.weight_formats import GROUP
from offramp.models.config import ModelConfig
from offramp.models.errors import ModelError
from offramp.models.exits.file import (
    check_vocab,
    raw_metadata,
    read_safetensors,
    save_safetensors,
    shipped,
)
from offramp.models.files import is_number, is_whole, parse_json
from offramp.models.finite import check_finite

FORMAT = "offramp-draft-1"
SUFFIX = ".draft.safetensors"
CHANCE_BINS = 10
VECTORS = ("attn_norm", "mlp_norm", "norm")
MATRICES = ("fuse", "feedback", "qkv", "o", "gate_up", "down")
_LARGEST_LEVEL = 15
_JSON = ("layers", "chances", "metrics", "data")


@dataclass(frozen=True, slots=True)
class DraftHead:
    """Weights of a draft head for a model of hidden size d with L layers.

    The head's *entry* of position p is made of the token at p and of the states that the stack had
    at p - 1 after each of ``layers`` (F of them, ascending, the last one L): ``fuse``
    [d, (1 + F) * d] takes the token's embedding and these states, each divided by its root mean
    square. Where the stack has not been yet, the head's own state at p - 1 stands in: ``feedback``
    [d, 2 * d] takes the embedding and that state. Then comes one decoder layer in the model's sizes
    (``attn_norm`` [d], ``qkv``, ``o``, ``mlp_norm`` [d], ``gate_up``, ``down``), whose K,V lie in
    the pages of a layer above the stack's. ``norm`` [d] and the rows of the model's LM head for the
    token ids ``vocab`` [v] (ascending), in 4 bits, give the distribution of token p + 1.
    """

    layers: tuple[int, ...]
    fuse: Tensor
    feedback: Tensor
    attn_norm: Tensor
    qkv: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    norm: Tensor
    vocab: Tensor

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return {name: getattr(self, name) for name in (*VECTORS, *MATRICES)}


class DraftFileError(ModelError):
    """The file is no draft head, or not one for this model."""


@dataclass(frozen=True, slots=True)
class DraftFile:
    """A draft head with where it came from.

    ``chances`` [10][2] says of held-out first guesses, by tenths of the head's own probability,
    which share fell there and which share of those was right.
    """

    fingerprint: str
    head: DraftHead
    chances: tuple[tuple[float, float], ...]
    metrics: dict[str, Any]
    data: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write atomically, matrices in 4 bits with scale and minimum for 32 columns (Q4_1)."""
        tensors: dict[str, Tensor] = {"vocab": self.head.vocab.to(torch.int32)}
        for name, tensor in self.head.parameters.items():
            plain = tensor.detach().float().cpu()
            if name in VECTORS:
                tensors[name] = plain.half()
            else:
                levels, scales, low = quantize(plain)
                # Two levels a byte, the first one low.
                tensors[f"{name}.levels"] = levels[:, ::2] | (levels[:, 1::2] << 4)
                tensors[f"{name}.scales"], tensors[f"{name}.minima"] = scales, low
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "layers": json.dumps(self.head.layers),
            "chances": json.dumps(self.chances),
            "metrics": json.dumps(self.metrics),
            "data": json.dumps(self.data),
        }
        save_safetensors(path, {k: t.contiguous().cpu() for k, t in tensors.items()}, metadata)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels uint8 [out, in], scales and minima fp16 [out, in / 32], nearest to ``weight``.

    Levels are 0 to 15, both of which each group has, as the 4-bit format of the products wants.
    """
    groups = weight.unflatten(-1, (-1, GROUP))
    low = groups.amin(dim=-1).half()
    scales = ((groups.amax(dim=-1) - low) / _LARGEST_LEVEL).half()
    divisor = scales.float().clamp_min(torch.finfo(torch.float16).tiny).unsqueeze(-1)
    levels = ((groups - low.unsqueeze(-1)) / divisor).round().clamp(0, _LARGEST_LEVEL)
    return levels.to(torch.uint8).flatten(-2), scales, low


def dequantize(levels: Tensor, scales: Tensor, low: Tensor) -> Tensor:
    """Weights fp32 [out, in] of `quantize`'s result."""
    groups = levels.float().unflatten(-1, (-1, GROUP))
    weight = torch.addcmul(low.float().unsqueeze(-1), groups, scales.float().unsqueeze(-1))
    return weight.flatten(-2)


def rounded(weight: Tensor) -> Tensor:
    """``weight`` [out, in] as 4 bits hold it."""
    return dequantize(*quantize(weight))


def load_draft_head(path: Path, *, fingerprint: str, config: ModelConfig) -> DraftFile:
    """Read the draft head of the model with this ``fingerprint``, fp32 on the CPU.

    Raises DraftFileError.
    """
    metadata = read_draft_metadata(path)
    if metadata["fingerprint"] != fingerprint:
        raise DraftFileError(
            f"{path} holds the draft head of another model (fingerprint "
            f"{metadata['fingerprint']}, this model has {fingerprint}); train one for it with "
            "`offramp exits train-draft`"
        )
    _, stored = read_safetensors(path, "a draft head", DraftFileError)
    try:
        layers = tuple(metadata["layers"])
        chances = tuple((a, b) for a, b in metadata["chances"])
        tensors = {name: stored[name].float() for name in VECTORS}
        for name in MATRICES:
            both = stored[f"{name}.levels"]
            levels = torch.stack((both & _LARGEST_LEVEL, both >> 4), dim=-1).flatten(1)
            tensors[name] = dequantize(levels, stored[f"{name}.scales"], stored[f"{name}.minima"])
        vocab = stored["vocab"]
        _check(layers, chances, tensors, vocab, config)
        # Of numbers of another type than the format's the products may be none.
        check_finite(tensors, path, DraftFileError)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DraftFileError(f"{path}: {reason}") from error
    head = DraftHead(layers, **tensors, vocab=vocab.long())
    return DraftFile(fingerprint, head, chances, metadata["metrics"], metadata["data"])


def read_draft_metadata(path: Path) -> dict[str, Any]:
    """The file's metadata, JSON values decoded; raises DraftFileError."""
    raw = raw_metadata(path, "a draft head", DraftFileError)
    if raw.get("format") != FORMAT:
        raise DraftFileError(f"{path} is not a draft head of format {FORMAT}")
    try:
        return {
            "format": FORMAT,
            "fingerprint": raw["fingerprint"],
            **{name: parse_json(raw[name], finite=False) for name in _JSON},
        }
    except (KeyError, ValueError) as error:
        raise DraftFileError(f"{path} has broken metadata: {error}") from error


def shipped_draft_head(fingerprint: str) -> Path | None:
    """The draft head that comes with Offramp for this model, if there is one."""
    return shipped(FORMAT, fingerprint)


def _check(
    layers: tuple[int, ...],
    chances: tuple[tuple[float, float], ...],
    tensors: Mapping[str, Tensor],
    vocab: Tensor,
    config: ModelConfig,
) -> None:
    """Raise ValueError where the head has no place in a model of this ``config``."""
    inside = all(is_whole(layer, 1, config.num_layers) for layer in layers)
    if not inside or list(layers) != sorted(set(layers)) or layers[-1:] != (config.num_layers,):
        raise ValueError(
            f"it takes states after layers {list(layers)}; of this model it may be ascending ones "
            f"up to {config.num_layers}, the last included"
        )
    shares = all(is_number(n) and 0 <= n <= 1 for pair in chances for n in pair)
    if len(chances) != CHANCE_BINS or not shares:
        raise ValueError(f"chances must be {CHANCE_BINS} pairs of shares")
    d, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "fuse": (d, (1 + len(layers)) * d),
        "feedback": (d, 2 * d),
        "qkv": (config.query_size + 2 * config.kv_size, d),
        "o": (d, config.query_size),
        "gate_up": (2 * inner, d),
        "down": (d, inner),
    } | dict.fromkeys(VECTORS, (d,))
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(tensors[name].shape)}, not {shape}")
    check_vocab(vocab, config)
