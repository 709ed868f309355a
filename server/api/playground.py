"""GET / and /playground/...: the page of server/web, where early exit can be seen.

The files are read once and served from memory, so no path of a request ever reaches the disk. They
hold no secrets and are served without a key; what the page asks for needs one as from any client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import Response

from offramp.server.errors import NotFound

router = APIRouter(include_in_schema=False)

FOLDER: Final = Path(__file__).parents[1] / "web"
PAGE: Final = "index.html"
PREFIX: Final = "/playground/"
_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)
# Prompts and answers are shown as text; one that were ever taken for HTML could load nothing.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "Content-Security-Policy": _POLICY,
        # Asked for again each time, so that the page and its modules are of one version.
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
)


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it is sent."""

    body: bytes
    media_type: str
    etag: str


def _read() -> dict[str, Asset]:
    """All files of the page by name."""
    found = {}
    for path in FOLDER.iterdir():
        if path.suffix in _TYPES:
            body = path.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            found[path.name] = Asset(body, _TYPES[path.suffix], etag)
    return found


ASSETS: Final[Mapping[str, Asset]] = MappingProxyType(_read())
PATHS: Final = frozenset({"/", *(f"{PREFIX}{name}" for name in ASSETS if name != PAGE)})
"""Where the page and its files are served."""


@router.get("/")
async def page(request: Request) -> Response:
    """The page."""
    return _answer(request, ASSETS[PAGE])


@router.get(PREFIX + "{name}")
async def asset(name: str, request: Request) -> Response:
    """One of its files."""
    found = ASSETS.get(name)
    if found is None or name == PAGE:
        raise NotFound("There is no such file.")
    return _answer(request, found)


def _answer(request: Request, found: Asset) -> Response:
    headers = {**_HEADERS, "ETag": found.etag}
    known = request.headers.get("if-none-match", "")
    # A proxy that compresses makes a strong tag a weak one.
    tags = {tag.strip().removeprefix("W/") for tag in known.split(",")}
    if found.etag in tags or "*" in tags:
        return Response(status_code=304, headers=headers)
    return Response(found.body, media_type=found.media_type, headers=headers)
