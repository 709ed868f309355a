"""Keys that clients send: given as options, or in a file that may change while the server runs."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from offramp.models.files import check_plain

logger = logging.getLogger("offramp.server")

# What an HTTP header brings unchanged.
_KEY: Final = re.compile(r"[\x21-\x7e]+")
_LARGEST_FILE: Final = 1024**2
_LOOK_EVERY_S: Final = 1.0


class ApiKeyError(Exception):
    """A key, or a file of keys, that cannot be meant; the message does not repeat it."""


def check_key(key: str) -> None:
    """Raise ApiKeyError for what no client could send: nothing, spaces, other than ASCII."""
    if not _KEY.fullmatch(key):
        raise ApiKeyError("a key must be printable ASCII characters without spaces, one at least")


def check_shares(keys: ApiKeys, most: int | None) -> None:
    """Raise ApiKeyError where requests are to be counted by keys that there are none of."""
    if most is not None and not keys:
        raise ApiKeyError("--max-requests-per-key needs --api-key or --api-key-file")


class ApiKeys:
    """The keys in force, as bytes; none means that the server is open.

    ``path`` has one key a line, and comments that begin with #. It is read again when it changes,
    as long as `watch` runs; while it cannot be used the keys before stay in force, and the log says
    so once. Raises ApiKeyError where it cannot be used at the start, or has no key.
    """

    def __init__(self, given: Sequence[str] = (), path: Path | None = None) -> None:
        for key in given:
            check_key(key)
        self._given = tuple(key.encode() for key in given)
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._told = ""
        self._filed: tuple[bytes, ...] = ()
        if path is not None:
            self._seen = _version(path)
            self._filed = _read(path)

    def __iter__(self) -> Iterator[bytes]:
        return iter((*self._given, *self._filed))

    def __bool__(self) -> bool:
        return bool(self._given or self._path)

    def refresh(self) -> None:
        """Read the file again if it is another than before; blocks as reading does."""
        if self._path is None:
            return
        try:
            version = _version(self._path)
            if version == self._seen and not self._told:
                return
            found = _read(self._path)
        except ApiKeyError as error:
            if str(error) != self._told:
                self._told = str(error)
                logger.warning("%s; the keys before stay in force", error)
            return
        if self._told or version != self._seen:
            logger.info("%d keys read from %s", len(found), self._path)
        self._seen, self._filed, self._told = version, found, ""

    async def watch(self) -> None:
        """Look at the file once a second, for ever; without one, return."""
        while self._path is not None:
            await asyncio.sleep(_LOOK_EVERY_S)
            await asyncio.to_thread(self.refresh)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    address = ipaddress.ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _version(path: Path) -> tuple[int, ...]:
    """What changes with a file's content."""
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read(path: Path) -> tuple[bytes, ...]:
    try:
        check_plain(path)
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(content) > _LARGEST_FILE:
        raise ApiKeyError(f"--api-key-file {path}: it has more than {_LARGEST_FILE} bytes")
    keys = []
    for number, line in enumerate(content.decode("latin-1").split("\n"), start=1):
        key = line.strip(" \t\r")
        if not key or key.startswith("#"):
            continue
        try:
            check_key(key)
        except ApiKeyError as error:
            raise ApiKeyError(f"--api-key-file {path}: line {number}: {error}") from error
        keys.append(key.encode())
    if not keys:
        raise ApiKeyError(f"--api-key-file {path}: it has no key")
    return tuple(dict.fromkeys(keys))


def _unreadable(path: Path, error: OSError) -> ApiKeyError:
    return ApiKeyError(f"--api-key-file {path}: {error.strerror or error}")
