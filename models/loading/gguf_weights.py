"""Tensors of a GGUF file, under the names and in the order of rows that transformers has them.

A folder made of a GGUF file (`gguf_folder`) has no weights of its own, but an index that says where
in the file each tensor lies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offramp.models.errors import CheckpointError
from offramp.models.files import check_plain, read_json

INDEX = "gguf.json"
# Bytes of the file at a time: what is made of them stays in the processor's caches.
_AT_ONCE = 1 << 19
_PLAIN = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in the file.

    ``shape`` as in torch; ``type`` is ggml's name of the blocks, of which ``row_bytes`` make a row
    (a vector is one row), from byte ``offset`` on. ``pairs`` is 0, or the number of heads whose
    rows lie in pairs, as ggml rotates them: transformers has the first of each pair before the
    second ones.
    """

    shape: tuple[int, ...]
    type: str
    offset: int
    row_bytes: int
    pairs: int = 0


class GgufFile:
    """The tensors of a folder's index, read as `safetensors.safe_open` would give them.

    Raises CheckpointError for an index or file that is not there or does not fit.
    """

    def __init__(self, index: Path) -> None:
        try:
            content = read_json(index)
            self.path = Path(content["path"])
            self._places = {
                name: Place(**{**place, "shape": tuple(place["shape"])})
                for name, place in content["tensors"].items()
            }
            check_plain(self.path)
            size = self.path.stat().st_size
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: the GGUF file cannot be read: {error}") from error
        if size != content.get("size"):
            raise CheckpointError(f"{self.path} has changed; start anew with --model {self.path}")

    @property
    def quantized(self) -> bool:
        """Whether some tensors have fewer than 16 bits a weight."""
        return any(place.type not in _PLAIN for place in self._places.values())

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._places)

    def get_slice(self, name: str) -> GgufTensor:
        """A tensor of which nothing is read yet."""
        return GgufTensor(self.path, self._places[name])

    def get_tensor(self, name: str) -> Tensor:
        """A tensor in fp32."""
        return self.get_slice(name)[:]


class GgufTensor:
    """One tensor, read by rows."""

    def __init__(self, path: Path, place: Place) -> None:
        self._path, self._place = path, place

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._place.shape)

    def get_dtype(self) -> str:
        """The type it is read as, in safetensors' words."""
        return "F32"

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows (of a vector: all of it) in fp32; ``rows`` have a step of 1."""
        place = self._place
        if len(place.shape) == 1:
            return self._read(0, 1).view(-1)[rows]
        first, end, _ = rows.indices(place.shape[0])
        if not place.pairs:
            return self._read(first, end)
        # A few rows of a head are all over it.
        size = place.shape[0] // place.pairs
        heads = range(first // size, -(-end // size))
        whole = self._read(heads.start * size, heads.stop * size)
        order = torch.arange(len(whole)).view(len(heads), size // 2, 2).transpose(1, 2).flatten()
        return whole[order[first - heads.start * size : end - heads.start * size]]

    def _read(self, first: int, end: int) -> Tensor:
        try:
            return self._unpacked(first, end)
        except OSError as error:
            raise CheckpointError(f"cannot read {self._path}: {error}") from error

    def _unpacked(self, first: int, end: int) -> Tensor:
        from gguf import GGMLQuantizationType  # noqa: PLC0415 (few models are such files)
        from gguf.quants import dequantize  # noqa: PLC0415

        place = self._place
        kind = GGMLQuantizationType[place.type]
        out = torch.empty(end - first, place.shape[-1])
        step = max(1, _AT_ONCE // place.row_bytes)
        with self._path.open("rb") as file:
            file.seek(place.offset + first * place.row_bytes)
            for start in range(0, len(out), step):
                to = out[start : start + step]
                data = bytearray(file.read(len(to) * place.row_bytes))
                if len(data) < len(to) * place.row_bytes:
                    raise CheckpointError(f"{self._path} ends within a tensor")
                blocks = np.frombuffer(data, np.uint8).reshape(len(to), place.row_bytes)
                to.copy_(torch.from_numpy(dequantize(blocks, kind)))
        return out


def write_index(folder: Path, path: Path, places: dict[str, Place]) -> None:
    """The index of the file at ``path``, for `GgufFile`."""
    tensors = {name: asdict(place) for name, place in places.items()}
    content = {"path": str(path.resolve()), "size": path.stat().st_size, "tensors": tensors}
    (folder / INDEX).write_text(json.dumps(content), encoding="utf-8")


def transformers_names(
    names: Sequence[str], *, paired: bool, heads: int, kv_heads: int
) -> Iterator[tuple[str, str, int]]:
    """GGUF's names of tensors, transformers' and the `Place.pairs` of each.

    ``paired``: queries and keys are rotated in pairs of neighbours. Names that are not known are
    given as they are.
    """
    for name in names:
        base, dot, kind = name.rpartition(".")
        head, _, rest = base.partition(".")
        if head == "blk" and rest.partition(".")[2] in _LAYER:
            layer, _, part = rest.partition(".")
            pairs = {"attn_q": heads, "attn_k": kv_heads}.get(part, 0) if paired else 0
            yield name, f"model.layers.{layer}.{_LAYER[part]}{dot}{kind}", pairs
        else:
            yield name, f"{_TOP.get(base, base)}{dot}{kind}", 0


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
