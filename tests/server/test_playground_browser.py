"""The playground in a headless Chromium, against a live server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page, Request, Route, expect

from .browser import browsing, needs_chromium
from .deciding import Recorder, serve
from .fakes import FakeEngine, serving
from .process import running
from .test_decision_tasks_api import SURE, trained

pytestmark = needs_chromium
__all__ = ["trained"]
# What the server refuses shows up in the browser's own log.
REFUSED = ("Failed to load resource",)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of the tiny model, whose tokens leave at any exit where they are let."""
    with running("tiny", "--exits", "shared:2,3", "--exit-threshold", "0.05") as server:
        yield server.address()


async def ready(page: Page) -> None:
    await expect(page.locator("#state")).to_have_text("Ready")
    await expect(page.locator("#model")).not_to_be_empty()


async def ask(page: Page, text: str, tokens: int = 24) -> None:
    """Send a message and wait for the end of its answer."""
    await page.fill("#max-tokens", str(tokens))
    await page.fill("#prompt", text)
    await page.press("#prompt", "Enter")
    await expect(page.locator(".turn.assistant .foot").last).to_contain_text("pass")
    await expect(page.locator("#send")).to_have_text("Send")


def sent_body(request: Request) -> dict[str, Any]:
    """The JSON object that the page sent."""
    body = request.post_data_json
    assert isinstance(body, dict)
    return body


async def layers(page: Page, within: str = ".turn.assistant") -> list[int]:
    tokens = await page.locator(f"{within} .token").all()
    return [int(await token.get_attribute("data-layer") or 0) for token in tokens]


async def test_a_chat_shows_how_deep_its_tokens_went(url: str) -> None:
    async with browsing(url) as page:
        await ready(page)
        await page.check("input[name=mode][value=adaptive]")
        await page.select_option("#when", "always")
        await ask(page, "hello there")
        found = await layers(page)
        assert len(found) == 24
        assert {2, 4} <= set(found) <= {2, 3, 4}
        # Deeper tokens have taller bars in another colour.
        bars = [await page.locator(f".token[data-layer='{n}']").first.evaluate(BAR) for n in (2, 4)]
        assert bars[0]["height"] * 2 == pytest.approx(bars[1]["height"])
        assert bars[0]["color"] != bars[1]["color"]
        counted = await page.locator("#depth-plot .row-count").all_inner_texts()
        assert [int(text.split()[0]) for text in counted] == [found.count(n) for n in (2, 3, 4)]
        spoken = await page.locator("#announcer").inner_text()
        assert spoken.startswith("Answer: ")
        # A second turn is asked with the first as its context.
        async with page.expect_request("**/v1/chat/completions") as sent:
            await ask(page, "and again", tokens=5)
        body = sent_body(await sent.value)
        assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
        assert body["messages"][1]["content"] == spoken.removeprefix("Answer: ")
        await page.click("#new-chat")
        await expect(page.locator("#empty")).to_be_visible()


BAR = """token => {
    const style = getComputedStyle(token);
    return { height: parseFloat(style.getPropertyValue("--depth")),
             color: style.getPropertyValue("--depth-color") };
}"""


async def test_a_token_tells_its_details_and_alternatives(url: str) -> None:
    async with browsing(url) as page:
        await ready(page)
        await ask(page, "hello there")
        detail, token = page.locator("#detail"), page.locator(".token").nth(3)
        await token.hover()
        await expect(detail).to_be_visible()
        for words in ("of 4", "full depth", "Probability", " ms"):
            await expect(detail).to_contain_text(words)
        await expect(detail.locator(".others")).to_have_count(0)
        await token.click()
        await expect(detail.locator(".others li")).to_have_count(5)
        shares = await detail.locator(".others span").all_inner_texts()
        assert all(re.fullmatch(r"(< )?[\d.]+ %", text) for text in shares)
        await expect(detail.locator(".others .chosen")).to_have_count(1)
        # What is pinned stays while the pointer goes elsewhere.
        await page.locator(".token").nth(9).hover()
        await expect(detail.locator(".others li")).to_have_count(5)
        await page.keyboard.press("Escape")
        await expect(detail).to_be_hidden()


async def test_the_keyboard_alone_will_do(url: str) -> None:
    async with browsing(url) as page:
        await ready(page)
        await page.fill("#max-tokens", "12")
        await page.check("input[name=mode][value=off]")
        await page.focus("#prompt")
        await page.keyboard.type("hello")
        await page.keyboard.press("Shift+Enter")
        await page.keyboard.type("there")
        assert await page.input_value("#prompt") == "hello\nthere"
        await page.keyboard.press("Enter")
        await expect(page.locator(".foot")).to_contain_text("pass")
        # The answer is one stop before the message, arrow keys go through its tokens.
        await page.keyboard.press("Shift+Tab")
        await expect(page.locator(".token").first).to_be_focused()
        await page.keyboard.press("ArrowRight")
        await page.keyboard.press("End")
        await page.keyboard.press("ArrowLeft")
        token = page.locator(".token").nth(10)
        await expect(token).to_be_focused()
        await expect(token).to_have_attribute("aria-describedby", "detail")
        await page.keyboard.press("Enter")
        await expect(page.locator("#detail .others li")).to_have_count(5)
        await page.keyboard.press("Escape")
        await expect(page.locator("#detail")).to_be_hidden()
        await page.focus("#tab-chat")
        await page.keyboard.press("ArrowRight")
        await expect(page.locator("#tab-compare")).to_be_focused()
        await expect(page.locator("#compare")).to_be_visible()
        await page.keyboard.press("ArrowRight")
        await expect(page.locator("#decisions")).to_be_visible()


async def test_side_by_side_measures_each_mode(url: str) -> None:
    async with browsing(f"{url}/#compare") as page:
        await ready(page)
        await page.fill("#max-tokens", "40")
        await page.select_option("#when", "always")
        await page.fill("#compare-prompt", "hello there")
        await page.press("#compare-prompt", "Enter")
        for mode in ("off", "lossless", "adaptive"):
            column = page.locator(f".column[data-mode={mode}]")
            await expect(column.locator(".tiles")).to_contain_text("tokens/s")
            await expect(column.locator(".foot")).to_contain_text("pass")
        assert set(await layers(page, "[data-mode=off]")) == {4}
        assert min(await layers(page, "[data-mode=adaptive]")) == 2
        lossless, adaptive = (page.locator(f"[data-mode={m}]") for m in ("lossless", "adaptive"))
        await expect(lossless.locator(".verdict")).to_contain_text("token for token")
        await expect(lossless.locator(".differs")).to_have_count(0)
        told = await adaptive.locator(".verdict").inner_text()
        assert int(told.split()[0]) == await adaptive.locator(".differs").count() > 0
        for column in (lossless, adaptive):
            await expect(column.locator(".tiles")).to_contain_text("× off")


async def test_exits_off_are_measured_not_guessed(url: str) -> None:
    async with browsing(url) as page:
        await ready(page)
        await expect(page.locator("#measure-off")).to_be_disabled()
        await ask(page, "hello there", tokens=60)
        assert await page.locator(".plot .off").count() == 0
        async with page.expect_request("**/v1/chat/completions") as sent:
            await page.click("#measure-off")
        assert sent_body(await sent.value)["early_exit"] == {"mode": "off"}
        await expect(page.locator(".plot .off")).to_have_count(1)
        await expect(page.locator("#tiles")).to_contain_text("× off")


@pytest.mark.parametrize("kind", ["predicate", "choice", "score"])
async def test_decisions_are_shown_with_their_depth(url: str, kind: str) -> None:
    async with browsing(f"{url}/#decisions", expected=REFUSED) as page:
        await ready(page)
        await page.check(f"input[name=kind][value={kind}]")
        await page.click("#decide")
        card = page.locator(".verdict-card")
        await expect(card).to_have_count(1)
        rows = {"predicate": 2, "choice": 3, "score": 4}[kind]
        await expect(card.locator(".others li")).to_have_count(rows)
        await expect(card.locator(".tiles")).to_contain_text("layer of 4")
        await expect(card.locator(".tiles")).to_contain_text("ms")
        await expect(page.locator("#verdicts .waiting")).to_contain_text("No task is trained")
        if kind != "predicate":
            await page.fill("#decision-answers", "one")
            await page.click("#decide")
            await expect(page.locator("#verdicts .error")).to_contain_text("questions[0]")


async def test_a_trained_task_leaves_early(trained: Recorder) -> None:
    async with serve(trained) as server, browsing(f"{server.url}/#decisions") as page:
        await ready(page)
        await page.click("#tasks button:text-is('sure')")
        assert await page.input_value("#decision-question") == SURE
        for quality, layer in (("", "3"), ("0.9", "1")):
            await page.select_option("#decision-quality", quality)
            await page.fill("#decision-input", f"A text for {layer}.")
            await page.click("#decide")
            early = page.locator(".verdict-card", has_text="Early exit")
            await expect(early.locator(".tiles dd").first).to_have_text(layer)
            await expect(early).to_contain_text("answered by the task sure")
        full = page.locator(".verdict-card", has_text="Every layer")
        await expect(full.locator(".tiles dd").first).to_have_text("4")
        # Another question is not the task's.
        await page.fill("#decision-question", "Is it late?")
        await expect(page.locator("#tasks [aria-pressed=true]")).to_have_count(0)
        await expect(page.locator("#decision-quality")).to_be_disabled()


async def test_a_key_is_asked_for_and_kept_for_the_tab() -> None:
    async with (
        serving(api_key=("secret",)) as server,
        browsing(server.url, expected=REFUSED) as page,
    ):
        dialog = page.locator("#key-dialog")
        await expect(dialog).to_be_visible()
        await expect(dialog).to_contain_text("Authorization: Bearer")
        await page.keyboard.type("wrong")
        await page.keyboard.press("Enter")
        await expect(dialog).to_be_visible()
        await expect(page.locator("#key")).to_have_value("")
        await page.fill("#key", "secret")
        await page.keyboard.press("Enter")
        await expect(dialog).to_be_hidden()
        await ready(page)
        await ask(page, "hi")
        assert await page.evaluate("Object.values(sessionStorage)") == ["secret"]
        assert "secret" not in await page.evaluate("JSON.stringify(localStorage)")
        await page.reload()
        await ready(page)


async def test_sources_of_tokens_are_marked() -> None:
    async with serving() as server, browsing(server.url) as page:
        await ready(page)
        await ask(page, "hi")
        tokens = page.locator(".token")
        await expect(tokens).to_have_count(len("Hello, world!"))
        images = [await tokens.nth(n).evaluate(MARK) for n in (0, 1)]
        assert "conic-gradient" in images[0]
        assert images[1] == "none"
        await expect(tokens.first).to_have_attribute("aria-label", "H, layer 2 of 4, text so far")
        rows = await page.locator("#source-plot .row").all_inner_texts()
        assert [" ".join(row.split()) for row in rows] == [
            "the model itself 6 46 %",
            "text so far 7 54 %",
        ]


MARK = "token => getComputedStyle(token).backgroundImage.split(', linear-gradient')[0]"


@pytest.mark.parametrize("by_mouse", [True, False])
async def test_stop_ends_the_request(*, by_mouse: bool) -> None:
    engine = FakeEngine(permits=5)
    async with serving(engine) as server, browsing(server.url) as page:
        await ready(page)
        await page.fill("#prompt", "hi")
        await page.press("#prompt", "Enter")
        await expect(page.locator(".token")).to_have_count(5)
        await expect(page.locator("#send")).to_have_text("Stop")
        # Escape closes the details first, then ends the answer.
        await page.locator(".token").first.click()
        await page.keyboard.press("Escape")
        await expect(page.locator("#detail")).to_be_hidden()
        await expect(page.locator("#send")).to_have_text("Stop")
        await (page.click("#send") if by_mouse else page.keyboard.press("Escape"))
        await expect(page.locator(".foot")).to_have_text("Stopped after 5 tokens")
        assert await asyncio.to_thread(engine.abort_seen.wait, 20)
        await expect(page.locator("#send")).to_have_text("Send")


async def test_errors_are_told_in_the_servers_words(url: str) -> None:
    async with browsing(url, expected=REFUSED) as page:
        await ready(page)
        await page.fill("#max-tokens", "100000")
        await page.fill("#prompt", "hi")
        await page.press("#prompt", "Enter")
        error = page.locator(".foot .error")
        await expect(error).to_contain_text("This model's context is 2048 tokens")
        await expect(error).to_contain_text("context_length_exceeded")
        await page.fill("#max-tokens", "8")
        async with page.expect_request("**/v1/chat/completions") as sent:
            await page.click("text=Try again")
        assert [each["content"] for each in sent_body(await sent.value)["messages"]] == ["hi"]
        await expect(page.locator(".foot")).to_contain_text("8 tokens")
        await expect(error).to_have_count(0)
        await page.fill("#temperature", "9")
        await page.fill("#prompt", "hi")
        await page.press("#prompt", "Enter")
        await expect(page.locator("#announcer")).to_contain_text("Temperature")


async def test_a_server_that_loads_is_waited_for(url: str) -> None:
    loading = {"status": "loading"}
    refusal = {"error": {"message": "The model is being loaded.", "code": "loading"}}

    async def not_ready(route: Route) -> None:
        await route.fulfill(status=503, json=loading)

    async def refused(route: Route) -> None:
        await route.fulfill(status=503, json=refusal)

    async with browsing(url, expected=REFUSED) as page:
        await page.route("**/ready", not_ready)
        await page.reload()
        await expect(page.locator("#loading-text")).to_contain_text("The model is being loaded")
        await expect(page.locator("#decide")).to_be_disabled()
        await page.unroute("**/ready")
        await ready(page)
        await expect(page.locator("#loading")).to_be_hidden()
        await page.route("**/v1/chat/completions", refused)
        await page.route("**/ready", not_ready)
        await page.fill("#max-tokens", "8")
        await page.fill("#prompt", "hi")
        await page.press("#prompt", "Enter")
        await expect(page.locator(".foot .error")).to_contain_text("The model is being loaded.")
        await page.unroute("**/v1/chat/completions")
        await page.unroute("**/ready")
        await expect(page.locator(".foot")).to_contain_text("8 tokens")
        await expect(page.locator(".token")).to_have_count(8)


async def test_the_theme_is_the_systems_until_another_is_chosen(url: str) -> None:
    background = "getComputedStyle(document.documentElement).backgroundColor"
    async with browsing(url, color_scheme="dark") as page:
        await ready(page)
        dark = await page.evaluate(background)
        await page.click("#theme")
        light = await page.evaluate(background)
        assert dark != light
        await page.reload()
        assert await page.evaluate(background) == light


@pytest.mark.parametrize("view", ["chat", "compare", "decisions"])
async def test_a_narrow_window_shows_everything(url: str, view: str) -> None:
    size: Any = {"width": 360, "height": 740}
    async with browsing(f"{url}/#{view}", viewport=size, reduced_motion="reduce") as page:
        await ready(page)
        if view == "chat":
            # Closed at first, where it stands below the conversation.
            await page.click("#settings summary")
            await ask(page, "hello there")
        assert await page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_axe_finds_nothing(url: str, theme: str) -> None:
    async with browsing(url, color_scheme=theme) as page:
        await ready(page)
        assert await violations(page) == []
        await ask(page, "hello there")
        await page.locator(".token").nth(2).click()
        assert await violations(page) == []
        await page.click("#tab-compare")
        await page.fill("#max-tokens", "12")
        await page.click("#compare-run")
        await expect(page.locator("[data-mode=adaptive] .verdict")).to_be_visible()
        assert await violations(page) == []
        await page.click("#tab-decisions")
        await page.click("#decide")
        await expect(page.locator(".verdict-card")).to_have_count(1)
        assert await violations(page) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_axe_finds_nothing_in_the_question_for_a_key(theme: str) -> None:
    async with (
        serving(api_key=("secret",)) as server,
        browsing(server.url, color_scheme=theme, expected=REFUSED) as page,
    ):
        await expect(page.locator("#key-dialog")).to_be_visible()
        assert await violations(page) == []


async def violations(page: Page) -> list[str]:
    """What axe-core holds against the page as it stands."""
    found = (await Axe().run(page)).response["violations"]
    return [f"{each['id']}: {node['html']}" for each in found for node in each["nodes"]]


async def test_requests_are_counted_down_when_the_page_goes(url: str) -> None:
    async with browsing(url) as page:
        await ready(page)
        await ask(page, "hello there")
    async with httpx2.AsyncClient(base_url=url) as client:
        assert (await client.get("/load")).json() == {"server_load": 0}
