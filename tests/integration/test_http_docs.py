"""The page of /docs: it comes from the package, and asks no other host for anything."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import pytest
from fake_runtime import FakeRuntime
from starlette.testclient import TestClient

from ensemble_core.server_config import ServerConfig
from server.edge.app import create_app
from server.edge.docs import FILES, FOLDER
from server.edge.metrics import PrometheusMetrics

KINDS = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "javascript",
    "start.js": "javascript",
    "favicon-32x32.png": "image/png",
}


@pytest.fixture(params=["", "/llm"])
def client(request: pytest.FixtureRequest) -> Iterator[TestClient]:
    config = ServerConfig(root_path=request.param)
    app = create_app(FakeRuntime(), config, PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app, base_url="http://localhost") as client:
        yield client


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
def test_all_that_the_page_names_is_ours(client: TestClient, path: str) -> None:
    answer = client.get(path)
    named = re.findall(r'(?:src|href|data-document)="(.+?)"', answer.text)
    assert len(named) == 5
    assert "://" not in answer.text
    assert "<script>" not in answer.text
    for each in named:
        assert each.startswith("/")
        assert client.get(each).status_code == 200


def test_the_policy_lets_the_page_load_from_here_alone(client: TestClient) -> None:
    policy = client.get("/docs").headers["content-security-policy"].split("; ")
    assert policy[0] == "default-src 'none'"
    sources = {source for directive in policy for source in directive.split()[1:]}
    assert sources == {"'none'", "'self'", "data:"}


@pytest.mark.parametrize("name", KINDS)
def test_its_files(client: TestClient, name: str) -> None:
    answer = client.get(f"/docs/{name}")
    assert answer.content == (FOLDER / name).read_bytes()
    assert set(KINDS) == FILES
    assert KINDS[name] in answer.headers["content-type"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "..%2Fdocs.py", "nope.js", "oauth2-redirect"])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    answer = client.get(f"/docs/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_the_files_are_those_of_the_release_that_the_readme_names() -> None:
    told = dict(
        re.findall(r"^\| `(.+?)` \| `([0-9a-f]{64})` \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    )
    found = {path.name for path in FOLDER.iterdir()} - {"README.md", "start.js"}
    assert told == {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in found}
