"""The page at / in a real browser: headless Chromium through Playwright, where both are installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.live import KEY, Live

pytestmark = pytest.mark.timeout(300)

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def test_the_page_needs_no_key_and_no_other_host(live: Live) -> None:
    with httpx.Client(base_url=live.url) as http:
        answer = http.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    text = answer.text.replace("http://www.w3.org", "")
    assert "http://" not in text and "https://" not in text and len(text) < 16_000


@pytest.fixture
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs a browser: pip install playwright, and Chromium"
    )
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    with sync_api.sync_playwright() as playwright:
        if path is None and not os.path.exists(playwright.chromium.executable_path):
            pytest.skip("needs a browser: playwright install chromium, or Debian's chromium-headless-shell")
        with playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as found:
            yield found


@pytest.mark.slow
def test_chat_and_charts_in_a_browser(live: Live, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 760})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(live.url)
    page.wait_for_function("document.querySelector('#model').textContent == 'give the API key'")
    page.fill("#key", KEY)
    page.dispatch_event("#key", "change")
    page.wait_for_function("document.querySelector('#model').textContent == 'tiny'")
    page.fill("#limit", "20")
    page.fill("#temperature", "0")
    page.fill("#text", "Hi <b>there</b>")
    page.press("#text", "Enter")
    page.wait_for_selector(".assistant small:not(:empty)")
    note = page.inner_text(".assistant small")
    body = {"messages": [{"role": "user", "content": "Hi <b>there</b>"}], "temperature": 0, "max_tokens": 20}
    wanted = live.post("/v1/chat/completions", body).json()
    assert page.inner_text(".user") == "Hi <b>there</b>" and page.locator(".turn b").count() == 0
    assert (
        page.evaluate("document.querySelector('.assistant').children[1].textContent")
        == (wanted["choices"][0]["message"]["content"])
    )
    assert note.startswith(f"{wanted['usage']['completion_tokens']} tokens, ")
    for _ in range(8):
        live.post("/v1/completions", {"prompt": "The cat", "max_tokens": 50, "ignore_eos": True}).raise_for_status()
        page.wait_for_timeout(600)
    charts = {
        figure.locator("figcaption").inner_text(): (
            figure.locator("output").inner_text(), figure.locator("path").get_attribute("d") or "",
            figure.locator("i").inner_text(),
        )
        for figure in page.locator("figure").all()
    }  # fmt: skip
    assert len(charts) == 8
    drawn = charts["Tokens a second"]
    assert drawn[1].startswith("M") and drawn[1].count("L") >= 3 and float(drawn[2].removeprefix("max ")) > 5
    assert charts["KV pages held"][0].endswith("%")
    page.fill("#limit", "1000000")
    page.fill("#text", "too long")
    page.press("#text", "Enter")
    page.wait_for_selector(".failed")
    assert "maximum context length" in page.inner_text(".failed")
    page.screenshot(path=os.environ.get("JAXLLM_SCREENSHOT", tmp_path / "page.png"))
    assert not problems
