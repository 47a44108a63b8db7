"""Everybody can use the playground: axe-core finds nothing serious, narrow and dark screens, behind a root path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from browsers import Visit, visiting
from playground_servers import engine_server
from playwright.sync_api import Browser, expect

AXE = Path(__file__).parents[1] / "axe_core" / "axe.min.js"
DARK: dict[str, Any] = {"color_scheme": "dark"}
NARROW: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}

_MOVING = """
document.getAnimations().length + [...document.querySelectorAll("*")].filter(
  (each) => [null, "::before"].some((part) => getComputedStyle(each, part).transitionDuration !== "0s")
).length
"""


def looked_at(visit: Visit) -> list[str]:
    """What axe-core finds, of serious and critical impact: rule and first place of each."""
    visit.page.evaluate(AXE.read_text(encoding="utf-8"))
    found = visit.page.evaluate("axe.run({resultTypes: ['violations']}).then(each => each.violations)")
    return [
        f"{each['id']}: {each['nodes'][0]['html']}" for each in found if each["impact"] in ("serious", "critical")
    ]


def unfold(visit: Visit) -> None:
    visit.page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    visit.page.evaluate("document.querySelector('#export').open = false")


@pytest.mark.parametrize("options", [{}, DARK, NARROW], ids=["light", "dark", "narrow"])
def test_axe_finds_nothing_serious(browser: Browser, url: str, options: dict[str, Any]) -> None:
    with visiting(browser, url, bypass_csp=True, **options) as visit:
        assert looked_at(visit) == []
        visit.page.check("#sides")
        visit.write("deed bad")
        visit.page.locator(".tok[role=option]").nth(4).click()
        unfold(visit)
        for measure in ("agreement", "carried", "prob", "entropy", "draft"):
            visit.page.select_option("#colour", measure)
            assert looked_at(visit) == []
    with visiting(browser, url, bypass_csp=True, **options) as visit:
        visit.page.check("input[value=chat]", force=True)
        visit.page.select_option("#model", "poll")
        visit.write()
        visit.page.click("#key-open")
        assert looked_at(visit) == []


def test_nothing_is_wider_than_a_small_phone(browser: Browser, url: str) -> None:
    with visiting(browser, url, **NARROW) as visit:
        page = visit.page
        wide = "document.scrollingElement.scrollWidth"
        assert page.evaluate(wide) <= 360
        visit.page.check("#sides")
        visit.write("deed bad")
        page.locator(".tok[role=option]").nth(2).tap()
        expect(page.locator("#story-body")).to_contain_text("token 3 of")
        unfold(visit)
        assert page.evaluate(wide) <= 360
        beside = (
            "[...document.querySelectorAll('.card')].filter(e => e.getBoundingClientRect().right > 360).length"
        )
        assert page.evaluate(beside) == 0


def test_dark_follows_the_system_and_the_choice(browser: Browser, url: str) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    with visiting(browser, url) as light, visiting(browser, url, **DARK) as dark:
        colours = light.page.evaluate(paper), dark.page.evaluate(paper)
        assert colours[0] != colours[1]
        for visit, theme, expected in ((light, "dark", colours[1]), (dark, "light", colours[0])):
            visit.page.select_option("#theme", theme)
            assert visit.page.evaluate(paper) == expected
            visit.page.reload()
            assert visit.page.evaluate(paper) == expected


def test_without_motion_nothing_moves(browser: Browser, url: str) -> None:
    with visiting(browser, url, reduced_motion="reduce") as visit:
        visit.write("deed bad")
        assert visit.page.evaluate(_MOVING) == 0


def test_it_works_behind_a_root_path(browser: Browser) -> None:
    with engine_server(root_path="/llm") as url:
        for path in ("/llm", "/llm/", "/"):
            with visiting(browser, url, path) as visit:
                visit.write("deed bad")
                asked = [each for each in visit.requests if "/v1/" in each]
                assert all(each.startswith(f"{url}/llm/v1/") for each in asked)
                body = {"model": "trio", "prompt": "deed bad", "max_tokens": 48, "temperature": 0}
                text = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"]
                assert visit.text() == text
                assert visit.errors == []
