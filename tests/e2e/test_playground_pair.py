"""The playground over the demo pair: one text side by side, and where the members disagree."""

from __future__ import annotations

import httpx
from browsers import chromium, visiting


def test_the_pair_writes_side_by_side(server_url: str) -> None:
    with chromium() as browser, visiting(browser, server_url) as visit:
        visit.page.check("#sides")
        visit.write("The capital of France is")
        body = {"model": "duet", "prompt": "The capital of France is", "max_tokens": 48, "temperature": 0}
        assert (
            visit.text()
            == httpx.post(f"{server_url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        )
        assert visit.text().startswith(" Paris")
        visit.page.locator(".tok[role=option]").first.click()
        story = visit.page.locator("#story-body").inner_text()
        assert "Main was overruled. gemma3 wanted ␣the." in story
        assert "smollm2 carried it" in story
        assert visit.page.locator(".differs").count() > 0
        assert visit.errors == []
