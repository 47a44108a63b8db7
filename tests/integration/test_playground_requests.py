"""The playground in a real Chromium: what it asks, with keys, links, a history, errors; the live panel; the demo."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsers import Visit, visiting
from fake_runtime import FakeRuntime, live_server
from playground_servers import scripted_server
from playwright.sync_api import Browser, expect
from processes import ROOT, free_port, wait_until_ready

from ensemble_core.errors import MemberError
from ensemble_core.server_config import ServerConfig
from ensemble_core.stats import discard
from server.playground import record
from server.playground.stored import StoredRuntime

KEY = "sk-very-secret-key"


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Visit]:
    with visiting(browser, url) as visit:
        yield visit


def sent(visit: Visit) -> list[dict[str, Any]]:
    """The bodies that the page sends from now on."""
    bodies: list[dict[str, Any]] = []
    visit.page.on("request", lambda each: bodies.append(each.post_data_json) if each.method == "POST" else None)
    return bodies


def field(visit: Visit, name: str) -> Any:
    return visit.page.locator(f"[data-param='{name}']").first


def test_members_weights_fusion_and_mode_are_asked_for(visit: Visit) -> None:
    bodies, page = sent(visit), visit.page
    visit.write("abc")
    assert bodies[0]["ensemble"] == {"trace": True}
    before = visit.text()
    page.get_by_label("beta weight").fill("1")
    page.get_by_label("alpha weight").fill("0")
    visit.write()
    assert bodies[1]["ensemble"]["weights"] == {"alpha": 0, "beta": 1, "gamma": 0.2}
    assert visit.text() != before
    page.get_by_label("use gamma").uncheck()
    page.get_by_role("button", name="Reset weights").click()
    field(visit, "ensemble.fusion").select_option("eva")
    field(visit, "top").fill("5")
    field(visit, "ensemble.mode").select_option("verify")
    field(visit, "needed").select_option("always")
    visit.write()
    assert bodies[2]["ensemble"] == {
        "trace": True,
        "members": ["alpha", "beta"],
        "fusion": {"name": "eva", "options": {"top": 5}},
        "mode": {"name": "verify", "options": {"needed": "always"}},
    }
    assert visit.errors == []


def test_controls_are_those_of_the_servers_schema(visit: Visit) -> None:
    strategies = httpx.get(f"{visit.url}/v1/strategies").json()
    fields = httpx.get(f"{visit.url}/openapi.json").json()["components"]["schemas"]["CompletionRequest"][
        "properties"
    ]
    chosen = field(visit, "ensemble.fusion").locator("option").evaluate_all("all => all.map(each => each.value)")
    assert [json.loads(name) for name in chosen[1:]] == sorted(strategies["fusions"])
    for name, schema in strategies["fusions"].items():
        field(visit, "ensemble.fusion").select_option(name)
        shown = visit.page.locator("#ensemble fieldset").nth(1).locator(".control label").all_inner_texts()
        assert shown == ["fusion", *schema["properties"]]
    own = {"model", "prompt", "stream", "stream_options", "ensemble", "user", "n", "best_of", "echo", "logprobs"}
    told = {"prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids"}
    older = {name for name in fields if name.startswith("guided_")}
    names = visit.page.locator("#sampling .control label").evaluate_all("all => all.map(each => each.textContent)")
    assert set(names) == fields.keys() - own - told - older


def test_sampling_and_chat_are_asked_for(visit: Visit) -> None:
    bodies, page = sent(visit), visit.page
    page.locator("#sampling").locator("xpath=..").locator("summary").first.click()
    for name, value in (("max_tokens", "5"), ("temperature", "0.5"), ("seed", "7")):
        field(visit, name).fill(value)
    field(visit, "stop").fill('["x", "y"]')
    page.check("input[value=chat]", force=True)
    page.get_by_label("turn 1", exact=True).fill("hello")
    visit.write()
    assert bodies[0] == {
        "model": "trio",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 5,
        "temperature": 0.5,
        "seed": 7,
        "stop": ["x", "y"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "ensemble": {"trace": True},
    }
    assert visit.page.locator(".tok[role=option]").count() == 5


def test_an_error_stands_as_the_api_words_it(visit: Visit) -> None:
    page = visit.page
    field(visit, "temperature").evaluate("each => { each.closest('details').open = true; }")
    field(visit, "temperature").fill("3")
    visit.write("abc")
    body = {"model": "trio", "prompt": "abc", "temperature": 3}
    told = httpx.post(f"{visit.url}/v1/completions", json=body).json()["error"]["message"]
    expect(page.get_by_role("alert")).to_contain_text(told)
    assert field(visit, "temperature").get_attribute("aria-invalid") == "true"
    field(visit, "temperature").fill("0")
    visit.write()
    assert page.get_by_role("alert").inner_text() == ""


def test_an_error_within_a_stream_keeps_the_text(browser: Browser) -> None:
    words = " one", " two", " three"
    fault = MemberError("a", "told to fail")
    with scripted_server(*words, breaks=fault) as url, visiting(browser, url) as visit:
        visit.write("go")
        assert visit.text() == " one two"
        expect(visit.page.get_by_role("alert")).to_contain_text("told to fail")


def test_a_key_stays_in_the_pages_memory(browser: Browser) -> None:
    keyed = ServerConfig.model_validate({"api_keys": [KEY]})
    with live_server(FakeRuntime(), keyed) as url, visiting(browser, url, wait=False) as visit:
        page = visit.page
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        expect(page.get_by_role("alert")).to_contain_text("no API key was sent")
        page.get_by_label("Key", exact=True).fill("sk-wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("this API key is not known")
        page.get_by_label("Key", exact=True).fill(KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#model option", state="attached")
        visit.write("a b c")
        assert visit.text() == " Hello wörld 😀!"
        kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
        assert "a b c" in page.evaluate(kept)
        for where in (page.evaluate(kept), page.content(), "".join(visit.requests)):
            assert KEY not in where
        page.reload()
        expect(page.get_by_role("dialog")).to_be_visible()


def test_a_link_restores_what_was_asked(browser: Browser, visit: Visit) -> None:
    page = visit.page
    page.select_option("#model", "ahead")
    page.fill("#prompt", "Größe 😀 & <b>")
    page.get_by_label("gamma weight").fill("0.9")
    field(visit, "ensemble.fusion").select_option("gac")
    field(visit, "threshold").fill("0.25")
    page.check("#sides")
    page.select_option("#colour", "entropy")
    request = page.locator("#request").text_content()
    page.wait_for_timeout(400)  # the address follows once typing pauses
    for again in ("reload", "open"):
        if again == "reload":
            page.reload()
            page.wait_for_selector("#model option", state="attached")
            expect(page.locator("#request")).to_have_text(str(request))
            continue
        with visiting(browser, visit.url, "/" + page.evaluate("location.hash")) as other:
            expect(other.page.locator("#request")).to_have_text(str(request))
            assert other.page.input_value("#prompt") == "Größe 😀 & <b>"
            assert other.page.is_checked("#sides")
            assert other.page.input_value("#colour") == "entropy"
    with visiting(browser, visit.url, "/#nonsense") as other:
        other.write("abc")
        assert other.errors == []


def test_the_history_brings_back_what_was_asked(visit: Visit) -> None:
    page = visit.page
    for prompt in ("first", "second"):
        visit.write(prompt)
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    page.locator("details:has(#history) > summary").click()
    entries = page.locator("#history button")
    expect(entries).to_have_count(2)
    entries.nth(1).click()
    assert page.input_value("#prompt") == "first"
    page.get_by_role("button", name="Forget all").click()
    expect(page.locator("#history button")).to_have_count(0)


def test_the_request_is_copied_as_code_that_runs(browser: Browser, url: str, tmp_path: Path) -> None:
    with visiting(browser, url, permissions=["clipboard-read", "clipboard-write"]) as visit:
        visit.page.locator("#request-card > summary").click()
        visit.page.get_by_label("gamma weight").fill("0.9")
        visit.write('it\'s "so" \\ é')
        ran = {}
        for name in ("curl", "python"):
            visit.page.click(f"#copy-{name}")
            code = visit.page.evaluate("navigator.clipboard.readText()")
            command = ["bash", "-c", code] if name == "curl" else [sys.executable, "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            ran[name] = done.stdout
        pieces = [json.loads(line[6:]) for line in ran["curl"].splitlines() if line.startswith("data: {")]
        text = "".join(each["choices"][0]["text"] for each in pieces if each["choices"])
        assert text == ran["python"] == visit.text()


def test_the_live_panel_reads_metrics(visit: Visit) -> None:
    page = visit.page
    page.locator("#live > summary").click()
    expect(page.locator("#live-body dl")).to_contain_text("Queue")
    visit.write("abc")
    expect(page.locator("#live-body .numbers")).to_contain_text(re.compile(r"Step\d"), timeout=10_000)
    expect(page.locator("#live-body")).to_contain_text(re.compile(r"members\d.*fusion.*rest"))
    assert visit.errors == []


def test_what_is_recorded_is_replayed(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "seed": 1}
    monkeypatch.setattr(record, "_ASKED", [("trio", fields), ("beta", fields), ("poll", fields)])
    record.main(url, tmp_path / "stored.json")
    stored = StoredRuntime(discard, tmp_path / "stored.json", seconds=0.0)
    assert [model.name for model in stored.models()] == ["trio", "poll", "alpha", "beta", "gamma"]
    with live_server(stored, stored=stored.requests) as replay:
        for body in stored.requests:
            told = [httpx.post(f"{each}/v1/completions", json=body).json()["choices"][0] for each in (url, replay)]
            for name in ("text", "finish_reason", "council"):
                assert told[0].get(name) == told[1].get(name)
            steps = [[(step["token"], step["bytes"], step["draft"]) for step in each["trace"]] for each in told]
            assert steps[0] == steps[1]
        refused = httpx.post(f"{replay}/v1/completions", json={"model": "nope", "prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert httpx.post(f"{replay}/tokenize", json={"prompt": "a"}).status_code == 400


def test_the_demo_needs_no_models(browser: Browser, tmp_path: Path) -> None:
    port = free_port()
    command = [
        sys.executable,
        "-c",
        "from server.cli import main; main()",
        "playground",
        "--demo",
        "--port",
        str(port),
    ]
    environment = os.environ | {"UNISONO_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url, tmp_path / "log", seconds=60)
        with visiting(browser, url) as visit:
            expect(visit.page.locator("#stored")).to_be_visible()
            visit.page.check("#sides")
            visit.write()
            assert visit.page.locator(".pane").count() == 3
            assert visit.text().startswith(" Paris")
            visit.page.locator(".tok[role=option]").first.click()
            expect(visit.page.locator("#story-body")).to_contain_text("carried it")
            visit.page.select_option("#model", "poll")
            visit.write()
            expect(visit.page.locator(".votes")).to_be_visible()
            assert visit.errors == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) in (0, -15)
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
