"""The playground in a real Chromium: a text is streamed, walked, coloured, compared, exported; nothing is markup."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browsers import Visit, visiting
from playground_servers import scripted_server
from playwright.sync_api import Browser, expect

PROMPT = "deed bad"
NUM_TOKENS = 4000
MOST_SCRIPT = 0.016  # seconds for each token
MOST_FLUSH = 16.0  # milliseconds of the median frame that adds tokens
_MARKS = """
all => all.map((each) => getComputedStyle(each)).map((style) => style.borderBottomStyle + style.borderBottomWidth)
"""


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Visit]:
    with visiting(browser, url) as visit:
        yield visit
        assert visit.errors == []


def asked(url: str, model: str, **fields: object) -> str:
    """The text that the API gives for what the page asks by itself."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 48, "temperature": 0, **fields}
    return str(httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"])


def test_a_text_is_streamed_and_each_token_has_its_story(visit: Visit) -> None:
    visit.write(PROMPT)
    assert visit.text() == asked(visit.url, "trio")
    assert visit.seen()["shifts"] == 0
    tokens = visit.page.locator(".tok[role=option]")
    expect(tokens).to_have_count(48)
    tokens.nth(3).hover()
    story = visit.page.locator("#story-body")
    expect(story).to_contain_text("token 4 of 48")
    heads = story.locator("thead th").all_inner_texts()
    assert [head.split()[-1] for head in heads] == ["Token", "Fused", "alpha", "beta", "gamma"]
    assert story.locator("tbody .is-chosen").count() == 1
    assert "carried it" in story.inner_text()
    tokens.nth(5).click()
    tokens.nth(9).hover()
    visit.page.mouse.move(2, 2)
    expect(story).to_contain_text("token 6 of 48")  # what was chosen stays


def test_the_keyboard_alone_is_enough(visit: Visit) -> None:
    page = visit.page
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text(re.compile("written"))
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.tok')"):
            break
    story = page.locator("#story-body")
    expect(story).to_contain_text("token 1 of 48")
    for key, place in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("End", 48), ("Home", 1)):
        page.keyboard.press(key)
        expect(story).to_contain_text(f"token {place} of 48")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.locator(".tok[tabindex='0']").count() == 1
    assert page.locator(".tok[aria-selected=true]").count() == 1
    page.keyboard.press("ArrowDown")
    assert not re.search("token 1 of", story.inner_text())
    expect(page.locator("#story-said")).not_to_be_empty()
    page.keyboard.press("Escape")
    assert page.locator(".tok.chosen").count() == 0


def test_every_measure_colours_and_has_a_legend(visit: Visit) -> None:
    visit.write(PROMPT)
    names = visit.page.locator("#colour option").evaluate_all("all => all.map(each => each.value)")
    assert {"agreement", "carried", "prob", "entropy", "unmapped", "draft"} <= set(names)
    for name in set(names) - {"none"}:
        visit.page.select_option("#colour", name)
        shown = set(visit.page.locator(".tokens .tok").evaluate_all("all => all.map(each => each.classList[1])"))
        told = set(visit.page.locator("#legend .tok").evaluate_all("all => all.map(each => each.classList[1])"))
        assert shown <= told
        marks = visit.page.locator("#legend .tok").evaluate_all(_MARKS)
        assert len(set(marks)) == len(marks)  # without colours they can be told apart, too


def test_side_by_side_marks_what_differs(visit: Visit) -> None:
    visit.page.check("#sides")
    visit.write(PROMPT)
    assert visit.page.locator(".pane h3").all_inner_texts() == [
        "trioensemble",
        "alphaalone",
        "betaalone",
        "gammaalone",
    ]
    assert [visit.text(pane) for pane in (0, 2)] == [asked(visit.url, model) for model in ("trio", "beta")]
    assert visit.page.locator(".pane").nth(0).locator(".differs").count() == 0
    assert visit.page.locator(".pane").nth(2).locator(".differs").count() > 0


def test_drafts_and_councils_say_how_they_came_about(visit: Visit) -> None:
    visit.page.select_option("#model", "ahead")
    visit.write(PROMPT)
    visit.page.select_option("#colour", "draft")
    visit.page.locator(".tok[role=option]").nth(2).click()
    expect(visit.page.locator("#story-body dl")).to_contain_text("Draft")
    visit.page.select_option("#model", "poll")
    visit.write(PROMPT)
    tree = visit.page.locator(".council")
    expect(tree).to_contain_text("answered by")
    assert tree.locator(".votes li").count() >= 1
    assert tree.locator(".tree > li").count() == 2
    assert len(visit.text()) > 0


def test_a_trace_is_exported_as_json_and_as_a_picture(visit: Visit, tmp_path: Path) -> None:
    visit.write(PROMPT)
    for name in ("json", "svg"):
        visit.page.click("#export summary")
        with visit.page.expect_download() as download:
            visit.page.click(f"#export-{name}")
        download.value.save_as(tmp_path / f"trace.{name}")
        visit.page.keyboard.press("Escape")
        expect(visit.page.locator("#export-json")).to_be_hidden()
    (answer,) = json.loads((tmp_path / "trace.json").read_text())
    assert answer["text"] == asked(visit.url, "trio")
    assert len(answer["trace"]) == answer["usage"]["completion_tokens"] == 48
    assert answer["request"]["model"] == "trio"
    drawn = ElementTree.parse(tmp_path / "trace.svg").getroot()
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [each.text for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "main is overruled" in texts
    assert len(texts) > 48


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "<svg/onload=alert(3)>",
    "\u202e\u0000\x1b[31m",
    "{{7*7}}${7*7}",
    "<a href=javascript:alert(4)>x</a>\n",
    "&lt;b&gt;",
    "\n\n",
    " 😀",
)


def test_text_of_models_is_never_markup(browser: Browser) -> None:
    with scripted_server(*HOSTILE) as url, visiting(browser, url) as visit:
        said: list[str] = []
        visit.page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        visit.write("<img src=x onerror=alert(5)>")
        assert visit.text() == "".join(HOSTILE)
        for index in range(len(HOSTILE)):
            visit.page.locator(".tok[role=option]").nth(index).click()
        for kept in ("#request-card", "#history"):
            visit.page.locator(f"details.card:has({kept}) summary, {kept} summary").first.click()
        visit.page.check("#sides")
        visit.write()
        inside = visit.page.locator("main img, main svg, main script, main a[href^=javascript], main b img")
        assert inside.count() == 0
        assert said == []
        assert visit.errors == []


def test_four_thousand_tokens_stay_smooth(browser: Browser) -> None:
    """All work of the page's thread as Chromium counts it, and script as the page does with performance.now."""
    words = [" word" if rank % 12 else f" line{rank}\n" for rank in range(NUM_TOKENS)]
    with scripted_server(*words) as url, visiting(browser, url) as visit:
        devtools = visit.page.context.new_cdp_session(visit.page)
        devtools.send("Performance.enable")

        def busy() -> float:
            found = {each["name"]: each["value"] for each in devtools.send("Performance.getMetrics")["metrics"]}
            return float(found["TaskDuration"])

        before = busy()
        visit.write("go")
        spent = (busy() - before) / NUM_TOKENS
        pane = visit.page.locator(".pane")
        own = float(str(pane.get_attribute("data-script-ms"))) / NUM_TOKENS
        flush = float(str(pane.get_attribute("data-flush-ms")))
        told = f"{spent * 1000:.2f} ms a token, own {own:.3f} ms, median frame {flush:.1f} ms"
        assert pane.get_attribute("data-tokens") == str(NUM_TOKENS)
        assert spent < MOST_SCRIPT, told
        assert own < MOST_SCRIPT * 1000, told
        assert flush < MOST_FLUSH, told
        assert visit.seen()["shifts"] == 0
        visit.page.locator(".tok[role=option]").nth(10).click()
        visit.page.keyboard.press("End")
        expect(visit.page.locator("#story-body")).to_contain_text(f"token {NUM_TOKENS} of {NUM_TOKENS}")
        assert visit.errors == []
