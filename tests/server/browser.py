"""A headless Chromium for tests, where the system has one."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Page, async_playwright, expect

PATH = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(PATH is None, reason="no chromium is installed")
_FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 30_000
expect.set_options(timeout=PATIENCE_MS)


@asynccontextmanager
async def browsing(url: str, **options: Any) -> AsyncIterator[Page]:
    """A page at ``url``; at the end it must have met no error and no breach of its policy.

    ``options`` are those of a browser context, and ``expected``: words of errors that may come.
    """
    expected = options.pop("expected", ())
    complaints: list[str] = []
    origin = "{0.scheme}://{0.netloc}/".format(urlsplit(url))

    def note(text: str) -> None:
        if not any(words in text for words in expected):
            complaints.append(text)

    flags = [*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=PATH, args=flags)
        context = await browser.new_context(**options)
        page = await context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: note(str(error)))
        page.on("console", lambda said: note(said.text) if said.type == "error" else None)
        # Nothing may be asked of anybody else.
        page.on("request", lambda sent: None if sent.url.startswith(origin) else note(sent.url))
        await page.goto(url)
        yield page
        await browser.close()
    assert not complaints, complaints
