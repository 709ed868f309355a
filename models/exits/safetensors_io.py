"""Make equal safetensors files equal byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

_LENGTH_BYTES = 8


def sort_header(path: Path) -> None:
    """Rewrite a safetensors file with its metadata in order of their names.

    The library writes them in an order that differs from process to process. The header's tensors
    and the data stay as they are.
    """
    content = path.read_bytes()
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(content[_LENGTH_BYTES:end])
    metadata = header.pop("__metadata__", {})
    ordered = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(len(text).to_bytes(_LENGTH_BYTES, "little") + text + content[end:])
    partial.replace(path)
