"""The page of `vilg serve` in a real browser: what a user does on it, and what it shows."""

import asyncio
import base64
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import Page, chromium_page, find_chromium, needs_chromium
from tests.export_support import write_export
from tests.serve_support import occupied, running_server


def on_the_page(tmp_path: Path, scenario, *, busy: bool = False, **view) -> list[str]:
    """Run a scenario(page) on the page of a tiny model, which others may keep busy; what the server logged."""
    profile = tmp_path / "profile"
    profile.mkdir()

    async def go(port: int) -> None:
        async with chromium_page(find_chromium(), profile) as page:
            await page.open(f"http://127.0.0.1:{port}/", **view)
            await page.wait_for("document.querySelector('#facts span')")
            await scenario(page)
            addresses = [each for each in page.requests if not each.startswith("data:")]
            assert addresses and all(each.startswith(f"http://127.0.0.1:{port}/") for each in addresses)

    with running_server(write_export(tmp_path)) as running:
        with occupied(running) if busy else nullcontext():
            asyncio.run(go(running.port))
        return running.log


async def draw(page: Page, prompt: str, candidates: int, keep: int) -> None:
    """Fill in and send as a user does; returns when the pictures are there or an error is shown."""
    await page.evaluate("draw.prompt.focus(); draw.prompt.value = ''")
    await page.call("Input.insertText", text=prompt)
    await page.evaluate(f"draw.candidates.value = {candidates}; showRanges(); draw.n.value = {keep}; showRanges()")
    await page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    await page.wait_for("running || !$('#error').hidden || $('.tile .do')")
    await page.wait_for("!running")


@needs_chromium
def test_a_user_draws_captions_and_asks(tmp_path):
    async def scenario(page: Page) -> None:
        assert await page.evaluate("$('#facts').textContent") == "tiny28 k parameters16 × 16cpu"
        await draw(page, "a cat", candidates=5, keep=2)
        assert await page.evaluate("$('.run h2').textContent") == "a cat"
        assert await page.evaluate("document.querySelectorAll('.tile').length") == 2
        assert await page.evaluate("$('.tile.best figcaption b').textContent") == "best"
        assert await page.evaluate("$('.tile img').naturalWidth") == 16
        how = await page.evaluate("$('.run .how').textContent")
        assert how.startswith("2 of 5 · guidance 1 · seed ")

        await page.evaluate("$('.tile .do button').click(); read.requestSubmit()")  # Caption under the best picture
        await page.wait_for("$('.said .text') && !running")
        assert await page.evaluate("$('.said .how').textContent.startsWith('caption')")
        assert await page.evaluate("$('.said img').src === $('.tile img').src")

        await page.evaluate("choose('ask'); read.question.value = 'a cat'; read.requestSubmit()")
        await page.wait_for("document.querySelectorAll('.said').length === 2 && !running")
        assert await page.evaluate("$('.said .asked').textContent") == "a cat"
        assert page.errors == []
        await page.screenshot(tmp_path / "page.png")

    log = on_the_page(tmp_path, scenario)
    assert [line.split()[0].removeprefix("/v1/") for line in log] == ["images/generations", "captions", "answers"]
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1280, 860) and np.asarray(picture.convert("RGB")).std() > 10


@needs_chromium
def test_a_mistake_is_shown_and_the_page_works_on(tmp_path):
    async def scenario(page: Page) -> None:
        await draw(page, "猫" * 9, candidates=2, keep=1)
        assert "has room for 6" in await page.evaluate("$('#error').textContent")
        assert await page.evaluate("document.querySelectorAll('.run').length") == 0

        await page.evaluate("choose('caption'); read.requestSubmit()")
        assert await page.evaluate("$('#error').textContent") == "choose a picture first"
        bad = base64.b64encode(b"no picture").decode()
        await page.evaluate(f"load(new File([Uint8Array.from(atob('{bad}'), (c) => c.charCodeAt(0))], 'x.png', {{type: 'image/png'}}))")
        await page.wait_for("picture")
        await page.evaluate("read.requestSubmit()")
        await page.wait_for("!$('#error').hidden && !running")
        assert "not a readable JPEG, PNG or WebP" in await page.evaluate("$('#error').textContent")

        await page.evaluate("choose('draw')")
        await draw(page, "a cat", candidates=2, keep=1)
        assert await page.evaluate("$('#error').hidden && document.querySelectorAll('.tile').length === 1")

    on_the_page(tmp_path, scenario)


@needs_chromium
@pytest.mark.parametrize("view", [{"width": 390, "height": 844, "dark": True}, {"width": 1600, "height": 900}], ids=["phone, dark", "wide"])
def test_nothing_sticks_out_of_a_phone_or_a_wide_screen(tmp_path, view):
    async def scenario(page: Page) -> None:
        await draw(page, "a cat", candidates=6, keep=6)
        widths = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths == [view["width"]] * 2
        luminance = await page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)")
        assert (luminance < 3 * 60) == view.get("dark", False)

    on_the_page(tmp_path, scenario, **view)


@needs_chromium
def test_the_page_says_who_is_before_it_and_its_stop_leaves_the_queue(tmp_path):
    async def scenario(page: Page) -> None:
        await page.evaluate("draw.prompt.value = 'a cat'; draw.requestSubmit()")
        await page.wait_for("$('#status p').textContent === '1 request before yours'")
        assert await page.evaluate("$('.go').textContent") == "Stop"
        await page.evaluate("$('.go').click()")
        await page.wait_for("!running")
        assert await page.evaluate("$('#error').hidden && document.querySelectorAll('.run').length === 0")
        assert await page.evaluate("$('.go').textContent") == "Draw"

    (line,) = on_the_page(tmp_path, scenario, busy=True)
    assert line.endswith("left by the client")
