"""From a model's name to the folder that holds it."""

from __future__ import annotations

from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from offramp.models.errors import ModelNotAvailable
from offramp.models.loading.embedded import pull
from offramp.models.tiny import write_tiny
from offramp.paths import cache_folder

DEFAULT_MODEL = "smollm2-135m"
ALIASES = {"smollm2-135m": DEFAULT_MODEL, "smollm2-135m-instruct": DEFAULT_MODEL}
TINY = "tiny"
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
    weights), an existing folder, a hub id of the form ``owner/name`` at ``revision``. ``cache``
    holds the first two; the hub has its own cache. Raises ModelNotAvailable.
    """
    alias = ALIASES.get(model.lower())
    if alias is not None:
        return pull(alias, cache)
    if model == TINY:
        return write_tiny(cache_folder(cache) / "models" / TINY)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith((".", "~")):
        raise ModelNotAvailable(f"there is no folder {folder}")
    return _from_hub(model, revision)


def _from_hub(model: str, revision: str | None) -> Path:
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
