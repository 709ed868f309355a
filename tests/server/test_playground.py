"""The playground's files over HTTP, without a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx2
import pytest

from offramp.server.api import playground
from offramp.server.app import create_app
from tests.server.fakes import PATIENCE_S, FakeEngine, Running, config, make_context, serving

FILES = sorted(path for path in playground.FOLDER.iterdir() if path.is_file())
PAGE = (playground.FOLDER / "index.html").read_text(encoding="utf-8")
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


class Tags(HTMLParser):
    """Tags with their attributes, and the texts inside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.code = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in {"script", "style"}:
            self.code += data.strip()


def references() -> Iterator[str]:
    """Every file that the page, its styles or its modules name."""
    for _, attributes in Tags(PAGE).tags:
        for name in ("src", "href"):
            if (value := attributes.get(name)) and not value.startswith("#"):
                yield value
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".js":
            names = re.findall(r'(?:from|import) "([^"]+)"', text)
            yield from (f"/playground/{name.removeprefix('./')}" for name in names)
        elif path.suffix == ".css":
            yield from re.findall(r'url\("?([^)"]+)"?\)', text)


async def get(server: Running, path: str, **options: object) -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        return await client.request(**{"method": "GET", "url": path, **options})  # type: ignore[arg-type]


async def test_every_file_is_served_as_what_it_is() -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    types[".svg"] = "image/svg+xml"
    async with serving() as server:
        for path in FILES:
            where = "/" if path.name == "index.html" else f"/playground/{path.name}"
            answer = await get(server, where)
            assert answer.status_code == 200, where
            assert answer.content == path.read_bytes()
            assert answer.headers["content-type"].split(";")[0] == types[path.suffix]
            assert answer.headers["x-content-type-options"] == "nosniff"
            policy = answer.headers["content-security-policy"]
            assert dict(part.split(" ", 1) for part in policy.split("; ")) == POLICY


async def test_a_known_version_is_not_sent_again() -> None:
    async with serving() as server:
        first = await get(server, "/playground/app.js")
        tag = first.headers["etag"]
        assert first.headers["cache-control"] == "no-cache"
        for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            again = await get(server, "/playground/app.js", headers={"If-None-Match": known})
            assert again.status_code == 304
            assert again.content == b""
            assert again.headers["etag"] == tag
        other = await get(server, "/playground/app.js", headers={"If-None-Match": '"other"'})
        assert other.content == first.content


async def test_head_has_headers_alone() -> None:
    async with serving() as server:
        answer = await get(server, "/", method="HEAD")
        posted = await get(server, "/", method="POST")
    assert answer.status_code == 200
    assert answer.content == b""
    assert int(answer.headers["content-length"]) == len(PAGE.encode())
    assert posted.status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/playground",
        "/playground/",
        "/playground/index.html",
        "/playground/none.js",
        "/playground/..%2f..%2fapp.py",
        "/playground/%2e%2e/app.py",
        "/playground/web/app.js",
    ],
)
async def test_nothing_else_is_served(path: str) -> None:
    async with serving() as server:
        answer = await get(server, path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


async def test_the_page_needs_no_key_and_gives_none() -> None:
    async with serving(api_key=("secret",)) as server:
        for path in sorted(playground.PATHS):
            answer = await get(server, path)
            assert answer.status_code == 200
            assert "secret" not in answer.text
        assert (await get(server, "/v1/models")).status_code == 401
        # What is not there is not told to strangers.
        assert (await get(server, "/playground/none.js")).status_code == 401


async def test_it_can_be_switched_off() -> None:
    async with serving(playground=False) as server:
        for path in ("/", "/playground/app.js"):
            assert (await get(server, path)).status_code == 404


def test_the_api_is_described_without_it() -> None:
    with_page = create_app(make_context(FakeEngine(), config())).openapi()
    without = create_app(make_context(FakeEngine(), config(playground=False))).openapi()
    assert with_page == without


def test_every_file_named_exists_and_every_file_is_named() -> None:
    named = set(references())
    assert named <= playground.PATHS
    assert playground.PATHS - named == {"/"}
    assert {path.name for path in FILES} == set(playground.ASSETS)


def test_the_policy_is_met() -> None:
    """No script, style or handler stands in the page itself, and no file elsewhere is named."""
    page = Tags(PAGE)
    assert page.code == ""
    for tag, attributes in page.tags:
        assert tag not in {"style", "base", "iframe", "object"}
        for name, value in attributes.items():
            assert name != "style"
            assert not name.startswith("on")
            assert "javascript:" not in (value or "")
    code = "".join(path.read_text(encoding="utf-8") for path in FILES if path.suffix != ".svg")
    for forbidden in ("http:", "https:", "innerHTML", "insertAdjacentHTML", "eval(", "cssText"):
        assert forbidden not in code.replace("http://www.w3.org/2000/svg", ""), forbidden


def test_labels_lead_to_fields_and_ids_are_unique() -> None:
    tags = Tags(PAGE).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {
        attributes["for"] for tag, attributes in tags if tag == "label" and "for" in attributes
    }
    for _, attributes in tags:
        wanted |= {attributes[name] for name in attributes if name.startswith("aria-labelledby")}
    assert wanted <= set(ids)
    code = "".join(path.read_text(encoding="utf-8") for path in FILES if path.suffix == ".js")
    assert set(re.findall(r'byId\("([^"]+)"\)', code)) <= set(ids)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
