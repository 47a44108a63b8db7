"""A real Chromium for pages, and what it saw: requests, errors, violations of the page's policy, moved content."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright
from processes import tool

# Runs before the page's own scripts, and is no part of the page.
_WATCH = """
window.seen = {violations: [], shifts: 0};
addEventListener("securitypolicyviolation", (event) => window.seen.violations.push(event.violatedDirective));
new PerformanceObserver((list) => {
  for (const each of list.getEntries()) if (!each.hadRecentInput) window.seen.shifts += each.value;
}).observe({type: "layout-shift", buffered: true});
"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, headless. Without it: a failure in CI, a skip elsewhere."""
    path = tool("chromium")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


@dataclass(slots=True)
class Visit:
    """One page and what it did. errors: of its scripts and its console."""

    page: Page
    url: str
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def seen(self) -> dict[str, Any]:
        """Violations of the policy, and the sum of layout shifts since the last text was asked for."""
        found: dict[str, Any] = self.page.evaluate("window.seen")
        return found

    def strangers(self) -> list[str]:
        """Requests to others than the page's own origin."""
        own = (f"{self.url}/", "blob:", "data:")
        return [each for each in self.requests if not each.startswith(own)]

    def write(self, prompt: str | None = None) -> None:
        """Ask for a text, and wait until it is written or refused."""
        if prompt is not None:
            self.page.fill("#prompt", prompt)
        self.page.evaluate("window.seen.shifts = 0")
        self.page.click("#run")
        expect(self.page.locator("#status")).to_have_text(re.compile("written|failed"), timeout=60_000)

    def text(self, pane: int = 0) -> str:
        """The text of a pane's tokens."""
        found: list[str] = (
            self.page.locator(".pane")
            .nth(pane)
            .locator(".tok")
            .evaluate_all("all => all.map(each => each.textContent)")
        )
        return "".join(found)


@contextmanager
def visiting(browser: Browser, url: str, path: str = "/", wait: bool = True, **options: Any) -> Iterator[Visit]:
    """A page in a context of its own, once its models are there. It must leave no violation behind."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(20_000)
    context.add_init_script(_WATCH)
    page = context.new_page()
    visit = Visit(page, url)
    page.on("request", lambda request: visit.requests.append(request.url))
    page.on("pageerror", lambda error: visit.errors.append(str(error)))
    page.on("console", lambda said: visit.errors.append(said.text) if said.type == "error" else None)
    page.goto(f"{url}{path}")
    if wait:
        page.wait_for_selector("#model option", state="attached")
    yield visit
    assert visit.seen()["violations"] == []
    assert visit.strangers() == []
    context.close()
