"""The playground's files over HTTP: headers, keys, the root path, and that one line turns it off."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_runtime import FakeRuntime
from starlette.testclient import TestClient

from ensemble_core.server_config import ServerConfig
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics
from server.playground.page import FOLDER, page_files

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def client_of(**fields: object) -> TestClient:
    app = create_app(FakeRuntime(), ServerConfig.model_validate(fields), PrometheusMetrics())  # type: ignore[arg-type]
    return TestClient(app, base_url="http://localhost")


@pytest.fixture(params=["", "/llm"])
def client(request: pytest.FixtureRequest) -> Iterator[TestClient]:
    with client_of(root_path=request.param) as client:
        yield client


@pytest.mark.parametrize("path", ["", "/"])
def test_all_that_the_page_names_is_ours(client: TestClient, path: str) -> None:
    root = client.app.state.services.config.root_path  # type: ignore[attr-defined]
    answer = client.get(f"{root}{path}", headers=HTML)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:src|href)="([^"#]+)"', answer.text)
    assert len(set(named)) == 6
    assert all(each.startswith(f"{root}/") for each in named)
    assert all(client.get(each).status_code == 200 for each in named)
    assert not re.search(r"://|<script>|<style|style=|onclick", answer.text)


def test_the_policy_is_strict(client: TestClient) -> None:
    for path in ("/", "/playground/app.js", "/playground/base.css"):
        headers = client.get(path, headers=HTML).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert not any(word in str(policy) for word in ("unsafe", "http", "data:", "*"))
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/", "/playground/app.js", "/playground/logo.svg"])
def test_a_file_that_is_known_is_not_sent_again(client: TestClient, path: str) -> None:
    first = client.get(path, headers=HTML)
    tag = first.headers["etag"]
    again = client.get(path, headers=HTML | {"If-None-Match": f'"other", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get(path, headers=HTML | {"If-None-Match": '"other"'}).content == first.content
    head = client.head(path, headers=HTML)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(first.content))


def test_who_does_not_ask_for_html_gets_json(client: TestClient) -> None:
    for accept in ("*/*", "application/json"):
        answer = client.get("/", headers={"Accept": accept})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("name", ["index.html", "..%2Fpage.py", "stored.json", "nope.js", ""])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    answer = client.get(f"/playground/{name}", headers=HTML)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_files_are_served_as_they_lie_there(client: TestClient) -> None:
    found = {path.name for path in FOLDER.iterdir()} - {"index.html"}
    assert found == page_files().keys()
    for name in found:
        answer = client.get(f"/playground/{name}")
        assert answer.content == (FOLDER / name).read_bytes()
        kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[name.rpartition(".")[2]]
        assert answer.headers["content-type"].startswith(kind)


def test_the_page_needs_no_key_and_all_that_it_asks_does() -> None:
    with client_of(api_keys=["sk-one"]) as client:
        assert client.get("/", headers=HTML).status_code == 200
        assert client.get("/playground/app.js").status_code == 200
        assert client.get("/playground/nope.js").status_code == 401
        for path in ("/v1/models", "/v1/strategies", "/openapi.json", "/metrics"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer sk-one"}).status_code == 200


def test_one_line_turns_it_off() -> None:
    with client_of(playground=False, api_keys=["sk-one"]) as client:
        key = {"Authorization": "Bearer sk-one"}
        for path in ("/", "/playground/app.js"):
            assert client.get(path, headers=HTML).status_code == 401
            assert client.get(path, headers=HTML | key).status_code == 404


def test_the_modules_are_short_and_never_make_markup_of_text() -> None:
    for path in FOLDER.glob("*.js"):
        text = path.read_text()
        assert text.startswith("// "), path.name
        assert len(text.splitlines()) < 400, path.name
        sinks = (
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|setHTML|srcdoc|DOMParser"
        )
        assert not re.search(sinks, text), path.name


def test_axe_is_the_release_that_its_page_names() -> None:
    folder = Path(__file__).parents[1] / "axe_core"
    rows = re.findall(r"^\| `(.+?)` \| `([0-9a-f]{64})` \|$", (folder / "README.md").read_text(), re.MULTILINE)
    found = {path.name for path in folder.iterdir()} - {"README.md"}
    assert dict(rows) == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in found}
