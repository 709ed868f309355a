"""Weights of a model folder, straight from its files into this project's fused names."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offramp.models.config import ModelConfig
from offramp.models.errors import CheckpointError
from offramp.models.families import FAMILIES
from offramp.models.files import SINGLE, check_safetensors, read_json, shown
from offramp.models.finite import check_finite
from offramp.models.loading import gguf_weights
from offramp.models.loading.gguf_weights import GgufFile

logger = logging.getLogger("offramp.loading")

INDEX = "model.safetensors.index.json"
STORED_DTYPES = ("F32", "BF16", "F16")
FINGERPRINT_ROWS = 64
_HEAD = "lm_head.weight"
_FILE_NAME = re.compile(r"[^/\\\0]*\.safetensors")
# Enough names to recognise the fault, few enough to read.
MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class Fused:
    """One tensor here, made of tensors of the file stacked along the first dimension."""

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape after stacking."""
        first = self.parts[0][1]
        return (sum(shape[0] for _, shape in self.parts), *first[1:])


class StoredWeights(Mapping[str, Tensor]):
    """Weights of ``folder`` as ``dtype`` tensors on the CPU, each read anew when it is asked for.

    Names and shapes, with d hidden, H and K query and KV heads of size hd, ff the MLP's width and
    V the vocabulary: ``embed`` [V, d], ``final_norm`` [d], ``lm_head`` [V, d] (absent when tied:
    where config.json says so, and the file has no other, as in transformers),
    and under ``layers.{i}.``: ``attn_norm`` [d], ``qkv`` [(H + 2K) * hd, d], ``o`` [d, H * hd],
    ``mlp_norm`` [d], ``gate_up`` [2 * ff, d], ``down`` [d, ff]; where the family has them
    ``qkv_bias``, ``o_bias``, ``gate_up_bias``, ``down_bias`` and ``q_norm``, ``k_norm`` [hd].

    ``progress`` is called with (tensors read so far, tensors in all). Every name and shape is
    checked first. Raises CheckpointError for missing, unexpected, misshapen or damaged tensors,
    naming them, also when one is read: then too for values that are not finite in ``dtype``.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        with ExitStack() as stack:
            files = {path: _open(path, stack) for path in _weight_files(folder)}
            names = {path: file.keys() for path, file in files.items()}
            self._homes = {name: path for path, own in names.items() for name in own}
            self.quantized = any(
                isinstance(file, GgufFile) and file.quantized for file in files.values()
            )
            """Whether the file has weights of fewer than 16 bits."""
            stored = {name: files[path] for name, path in self._homes.items()}
            if config.tie_word_embeddings and _has_own_head(stored, config):
                logger.warning(
                    "config.json ties the LM head to the embedding, but the file has another: used"
                )
                config = replace(config, tie_word_embeddings=False)
            plan = list(_plan(config))
            _check(plan, stored, config)
        self._plan = {fused.name: fused for fused in plan}
        self._dtype = dtype
        self._progress = progress
        self._seen: set[str] = set()

    @property
    def count(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(fused.shape) for fused in self._plan.values())

    def __getitem__(self, name: str) -> Tensor:
        first = name not in self._seen
        tensor = _read(self._plan[name], self._homes, self._dtype, check=first)
        self._seen.add(name)
        if self._progress is not None and first:
            self._progress(len(self._seen), len(self._plan))
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._plan[name].shape

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Some rows of a matrix; no others are read."""
        parts = self._plan[name].parts
        found = []
        with ExitStack() as stack:
            files = {path: _open(path, stack) for path in {self._homes[part] for part, _ in parts}}
            for index in indices:
                row = index
                for part, shape in parts:
                    if row < shape[0]:
                        found.append(files[self._homes[part]].get_slice(part)[row : row + 1])
                        break
                    row -= shape[0]
            return torch.cat(found).to(self._dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._plan

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan)

    def __len__(self) -> int:
        return len(self._plan)


def load_weights(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """All `StoredWeights`, read."""
    return dict(StoredWeights(folder, config, dtype=dtype, progress=progress))


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Name of a model's weights: 32 hex digits of a sha256.

    Covers all vectors and up to 64 rows spread over every matrix, rounded to bf16, so that fp32 and
    bf16 copies of one model agree.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = _sampled(weights, name)
        rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def _sampled(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """A vector, or rows spread over a matrix."""
    stored = weights if isinstance(weights, StoredWeights) else None
    shape = weights[name].shape if stored is None else stored.shape(name)
    if len(shape) == 1:
        return weights[name]
    rows = torch.linspace(0, shape[0] - 1, min(FINGERPRINT_ROWS, shape[0])).long()
    if stored is not None:
        return stored.rows(name, rows.tolist())
    return weights[name][rows.to(weights[name].device)]


def _plan(config: ModelConfig) -> Iterator[Fused]:
    prefix = FAMILIES[config.architecture].prefix
    width, vocab = config.hidden_size, config.vocab_size
    yield Fused("embed", ((f"{prefix}embed_tokens.weight", (vocab, width)),))
    for layer in range(config.num_layers):
        for fused in _layer_plan(config):
            yield Fused(
                f"layers.{layer}.{fused.name}",
                tuple((f"{prefix}layers.{layer}.{name}", shape) for name, shape in fused.parts),
            )
    yield Fused("final_norm", ((f"{prefix}norm.weight", (width,)),))
    if not config.tie_word_embeddings:
        yield Fused("lm_head", ((_HEAD, (vocab, width)),))


def _layer_plan(config: ModelConfig) -> Iterator[Fused]:
    """Tensors of one layer, without the layer's prefix."""
    width, inner = config.hidden_size, config.intermediate_size
    query, kv = config.query_size, config.kv_size
    yield Fused("attn_norm", (("input_layernorm.weight", (width,)),))
    yield from _linear(
        "qkv",
        [("self_attn.q_proj", query), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
        width,
        bias=config.attention_bias,
    )
    if config.qk_norm:
        yield Fused("q_norm", (("self_attn.q_norm.weight", (config.head_dim,)),))
        yield Fused("k_norm", (("self_attn.k_norm.weight", (config.head_dim,)),))
    yield from _linear("o", [("self_attn.o_proj", width)], query, bias=config.output_bias)
    yield Fused("mlp_norm", (("post_attention_layernorm.weight", (width,)),))
    gate_up = [("mlp.gate_proj", inner), ("mlp.up_proj", inner)]
    yield from _linear("gate_up", gate_up, width, bias=config.mlp_bias)
    yield from _linear("down", [("mlp.down_proj", width)], inner, bias=config.mlp_bias)


def _linear(name: str, parts: list[tuple[str, int]], width: int, *, bias: bool) -> Iterator[Fused]:
    yield Fused(name, tuple((f"{part}.weight", (rows, width)) for part, rows in parts))
    if bias:
        yield Fused(f"{name}_bias", tuple((f"{part}.bias", (rows,)) for part, rows in parts))


def _open(path: Path, stack: ExitStack) -> Any:
    """Open a weight file until ``stack`` closes it."""
    if path.name == gguf_weights.INDEX:
        return GgufFile(path)
    try:
        check_safetensors(path)
        return stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except FileNotFoundError:
        raise CheckpointError(f"weight file {path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"weight file {path} is damaged: {reason}") from error


def _weight_files(folder: Path) -> list[Path]:
    gguf = folder / gguf_weights.INDEX
    if gguf.exists():
        return [gguf]
    index = folder / INDEX
    if not index.exists():
        return [folder / SINGLE]
    try:
        names = set(read_json(index)["weight_map"].values())
        for name in names:
            # A name with a folder in it would read files that are not the model's.
            if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
                raise ValueError(f"{shown(name)} names no file of this folder")
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise CheckpointError(f"{index} is not a valid index of weight files: {error!r}") from error
    return [folder / name for name in sorted(names)]


def _has_own_head(stored: Mapping[str, Any], config: ModelConfig) -> bool:
    """Whether a file of a model with a tied LM head has one that is not its embedding."""
    embed = f"{FAMILIES[config.architecture].prefix}embed_tokens.weight"
    if _HEAD not in stored or embed not in stored:
        return False
    head, table = stored[_HEAD].get_slice(_HEAD), stored[embed].get_slice(embed)
    if head.get_shape() != table.get_shape():
        return True
    return not torch.equal(head[:], table[:])


def _check(plan: list[Fused], files: dict[str, Any], config: ModelConfig) -> None:
    expected = {name: shape for fused in plan for name, shape in fused.parts}
    missing = [name for name in expected if name not in files]
    unexpected = [name for name in files if name not in expected and not _harmless(name, config)]
    wrong: list[str] = []
    for name, shape in expected.items():
        if name in files:
            wrong += _faults(name, shape, files[name].get_slice(name))
    faults = [
        f"{kind}: {_named(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong", wrong))
        if names
    ]
    if faults:
        raise CheckpointError(f"weights do not match config.json: {'; '.join(faults)}")


def _faults(name: str, shape: tuple[int, ...], stored: Any) -> Iterator[str]:
    found = tuple(stored.get_shape())
    if found != shape:
        yield f"{name} (expected {list(shape)}, found {list(found)})"
    if stored.get_dtype() not in STORED_DTYPES:
        yield f"{name} (type {stored.get_dtype()}, expected {', '.join(STORED_DTYPES)})"


def _harmless(name: str, config: ModelConfig) -> bool:
    """Whether a tensor may be ignored: old buffers, and a copy of the tied embedding."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    return name == _HEAD and config.tie_word_embeddings


def _named(names: list[str]) -> str:
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _read(fused: Fused, homes: dict[str, Path], dtype: torch.dtype, *, check: bool) -> Tensor:
    """Stack the parts straight into their place, so only one part is held twice.

    Files are mapped, and what was read of one counts as this process's memory until it is closed.
    """
    target = torch.empty(fused.shape, dtype=dtype)
    start = 0
    for name, shape in fused.parts:
        with ExitStack() as stack:
            part = target[start : start + shape[0]]
            part.copy_(_read_part(homes[name], name, stack))
            if check:
                check_finite({name: part}, f"weight file {homes[name]}", CheckpointError)
        start += shape[0]
    return target


def _read_part(path: Path, name: str, stack: ExitStack) -> Tensor:
    try:
        tensor: Tensor = _open(path, stack).get_tensor(name)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"weight file {path} has changed: {error}") from error
    return tensor
