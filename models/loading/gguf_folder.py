"""A folder in transformers' layout made of a GGUF file: configuration, tokenizer, chat template.

Weights stay in the file (`gguf_weights`). What a GGUF says in its metadata is described at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers, processors

from offramp.models.errors import CheckpointError, UnsupportedModel
from offramp.models.families import config_from_hf
from offramp.models.files import check_plain, is_number, is_whole, shown
from offramp.models.loading.gguf_weights import INDEX, Place, transformers_names, write_index
from offramp.models.rope import plain_inv_freq, scaled_inv_freq

# Architectures by GGUF's names; Mistral's models are llama's with a window.
_FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_WINDOWED = {"llama": "MistralForCausalLM"}
# Ways of cutting text into words by GGUF's names, and whether a word of the vocabulary is a token
# without merges leading there.
_PRE = {"qwen2": False, "deepseek-r1-qwen": False, "smollm": False, "llama-bpe": True}
_ROPE_FREQS = "rope_freqs.weight"
# Llama 3.1 and 3.2 differ in the factor alone.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Control tokens that end a turn or a text, besides the one that the file names.
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
_CONTROL = 3
_VERSION = 1
"""Counts up when what is made of a file changes."""
_SAMPLE = 1 << 20


def folder_of(path: Path, cache: Path) -> Path:
    """The folder of the GGUF file ``path`` under ``cache``, made if need be.

    It is named by the file's path, size and first megabytes. Raises CheckpointError for a file that
    is damaged or none, UnsupportedModel for what is not implemented.
    """
    folder = cache / f"{path.stem}-{_digest(path)}"
    if (folder / INDEX).exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=cache) as scratch:
        made = Path(scratch) / "folder"
        made.mkdir()
        _write(path, made)
        try:
            made.replace(folder)
        except OSError:
            # Somebody else was faster.
            if not (folder / INDEX).exists():
                raise
    return folder


def _digest(path: Path) -> str:
    try:
        check_plain(path)
        found = hashlib.sha256(f"{_VERSION} {path.stat().st_size} {path.resolve()}".encode())
        with path.open("rb") as file:
            # Metadata comes first; of the tensors the table that follows it decides.
            for _ in range(16):
                found.update(file.read(_SAMPLE))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return found.hexdigest()[:12]


def _write(path: Path, folder: Path) -> None:
    from gguf import GGUFReader  # noqa: PLC0415 (few models are such files)

    try:
        reader = GGUFReader(path)
        metadata = _Metadata(path, dict(reader.fields))
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is no GGUF file that can be read: {reason}") from error
    config, ends = _config(metadata, tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"eos_token_id": ends, "bos_token_id": config["bos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
    places = _places(metadata, tensors, config)
    config_from_hf(folder)
    _write_tokenizer(path, folder, metadata, config["max_position_embeddings"])
    write_index(folder, path, places)


class _Metadata:
    """What a GGUF says about its model; keys of the architecture begin with a dot here."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self._fields = fields
        self.arch = str(self.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(f"{self.arch}{key}" if key.startswith(".") else key)
        try:
            return default if field is None else field.contents()
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{self.path}: {key} cannot be read: {error}") from error

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: the metadata lack {self.arch}{key}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not is_whole(value, 1, 2**31 - 1):
            raise CheckpointError(f"{self.path}: {self.arch}{key} is {shown(value)}")
        return int(value)


def _config(metadata: _Metadata, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The content of config.json, and the ids of tokens that end a text."""
    arch = metadata.arch
    if arch not in _FAMILIES:
        raise UnsupportedModel("general.architecture", arch, ", ".join(_FAMILIES))
    for key, most in ((".expert_count", 0), ("split.count", 1)):
        if metadata.get(key, 0) not in range(most + 1):
            raise UnsupportedModel(key.removeprefix("."), metadata.get(key), str(most))
    heads, width = metadata.count(".attention.head_count"), metadata.count(".embedding_length")
    kv_heads = metadata.count(".attention.head_count_kv", heads)
    window = metadata.get(".attention.sliding_window")
    families = _WINDOWED if window and arch in _WINDOWED else _FAMILIES
    if window and families is _FAMILIES:
        raise UnsupportedModel(f"{arch}.attention.sliding_window", window, "none")
    head_dim = metadata.count(".attention.key_length", width // heads)
    for key in (".attention.value_length", ".rope.dimension_count"):
        if metadata.get(key, head_dim) != head_dim:
            raise UnsupportedModel(f"{arch}{key}", metadata.get(key), str(head_dim))
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    embedding = tensors.get("token_embd.weight")
    bias = "blk.0.attn_q.bias" in tensors
    config = {
        "architectures": [families[arch]],
        "model_type": {"MistralForCausalLM": "mistral"}.get(families[arch], arch),
        "vocab_size": len(tokens) if embedding is None else int(embedding.shape[-1]),
        "hidden_size": width,
        "intermediate_size": metadata.need(".feed_forward_length"),
        "num_hidden_layers": metadata.need(".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": metadata.need(".attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.need(".context_length"),
        "rope_parameters": _rope(metadata, tensors, head_dim),
        "sliding_window": window or None,
        "use_sliding_window": False,
        "attention_bias": bias,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
    }
    kinds = metadata.get("tokenizer.ggml.token_type") or [_CONTROL] * len(tokens)
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    known = [
        index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL and token in _ENDS
    ]
    return config, sorted({each for each in (*named, *known) if type(each) is int})


def _rope(metadata: _Metadata, tensors: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Rotary parameters; factors of single frequencies must be those of Llama 3."""
    theta = metadata.get(".rope.freq_base", 10000.0)
    if not is_number(theta) or theta <= 0:
        raise CheckpointError(f"{metadata.path}: {metadata.arch}.rope.freq_base is {shown(theta)}")
    rope = {"rope_type": "default", "rope_theta": theta}
    kind = metadata.get(".rope.scaling.type", "none")
    if _ROPE_FREQS in tensors:
        factors = np.asarray(tensors[_ROPE_FREQS].data, np.float32).flatten()
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": float(factors.max(initial=1.0)),
            **_LLAMA3,
        }
        scaled, _ = scaled_inv_freq(rope, head_dim, 0)
        known = np.divide(plain_inv_freq(theta, head_dim), scaled)
        if factors.shape != known.shape or not np.allclose(factors, known, rtol=1e-4):
            raise UnsupportedModel(_ROPE_FREQS, "other factors", "those of Llama 3.1 and 3.2")
    elif kind in ("linear", "yarn"):
        trained = metadata.get(".rope.scaling.original_context_length")
        rope |= {"rope_type": kind, "factor": metadata.need(".rope.scaling.factor")}
        rope |= {"original_max_position_embeddings": trained} if trained else {}
    elif kind != "none":
        raise UnsupportedModel(f"{metadata.arch}.rope.scaling.type", kind, "none, linear, yarn")
    return rope


def _places(
    metadata: _Metadata, tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Place]:
    from gguf.quants import dequantize  # noqa: PLC0415

    names = [name for name in tensors if name != _ROPE_FREQS]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    places = {}
    for name, own, pairs in transformers_names(
        names, paired=metadata.arch == "llama", heads=heads, kv_heads=kv_heads
    ):
        tensor = tensors[name]
        shape = tuple(int(each) for each in reversed(tensor.shape))
        if not all(shape):
            raise CheckpointError(f"{metadata.path}: {name} has the shape {list(shape)}")
        row_bytes = tensor.n_bytes // math.prod(shape[:-1])
        try:
            dequantize(np.zeros((1, row_bytes), np.uint8), tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UnsupportedModel(f"the type of {name}", kind, "types that gguf unpacks") from None
        places[own] = Place(
            shape, tensor.tensor_type.name, int(tensor.data_offset), row_bytes, pairs
        )
    return places


def _write_tokenizer(path: Path, folder: Path, metadata: _Metadata, longest: int) -> None:
    """tokenizer.json and the chat template of the file.

    transformers' converter makes the vocabulary; words are cut as llama.cpp does by the same name.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 (takes torch with it)

    kind, pre = (metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2":
        raise UnsupportedModel("tokenizer.ggml.model", kind, "gpt2 (byte-level BPE)")
    if pre not in _PRE:
        raise UnsupportedModel("tokenizer.ggml.pre", pre, ", ".join(_PRE))
    # Progress is drawn by tqdm without a switch.
    with redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # of damaged lists the converter raises all kinds
            raise CheckpointError(f"{path}: its tokenizer cannot be read: {error}") from error
    backend = tokenizer.backend_tokenizer
    if pre == "smollm":
        split_digits(backend)
    backend.model.ignore_merges = _PRE[pre]
    if metadata.get("tokenizer.ggml.add_bos_token") and tokenizer.bos_token is not None:
        bos = str(tokenizer.bos_token)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    tokenizer.model_max_length = longest
    tokenizer.save_pretrained(folder)


def split_digits(backend: Any) -> None:
    """Cut text as SmolLM's vocabulary was made: digits stand alone.

    The converter builds a plain byte-level rule and forgets that, which changes the ids of blanks
    before digits.
    """
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
