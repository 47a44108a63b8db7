"""Who may call and from where: keys, CORS, root path, TLS; through the whole app or a real server."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_runtime import FakeRuntime, live_server
from processes import tool
from pydantic import SecretStr
from starlette.testclient import TestClient

from ensemble_core.errors import ConfigError
from ensemble_core.server_config import ServerConfig
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics
from server.edge.serving import check_tls

KEYS = (SecretStr("sk-one"), SecretStr("sk-two"))
BODY = {"model": "duo", "prompt": "p"}


def client_of(**fields: Any) -> TestClient:
    app = create_app(FakeRuntime(), ServerConfig(**fields), PrometheusMetrics())  # type: ignore[arg-type]
    return TestClient(app, raise_server_exceptions=False, base_url="http://localhost")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def every_route(client: TestClient) -> list[tuple[str, str]]:
    """(method, path) of all that the app has, and of one that it has not."""
    paths = client.get("/openapi.json", headers=bearer("sk-one")).json()["paths"]
    found = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    return [*found, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nope"), ("POST", "/health/x")]


def test_every_route_but_the_open_ones_needs_a_key() -> None:
    with client_of(api_keys=KEYS) as client:
        routes = every_route(client)
        assert len(routes) > 12
        for method, path in routes:
            expected = path not in ("/health", "/ready", "/version")
            assert (client.request(method, path).status_code == 401) == expected, path
            assert client.request(method, path, headers=bearer("sk-two")).status_code != 401


def test_a_refusal_has_openais_shape() -> None:
    with client_of(api_keys=KEYS) as client:
        missing = client.post("/v1/completions", json=BODY)
        wrong = client.post("/v1/completions", json=BODY, headers=bearer("sk-three"))
        for answer, words in ((missing, "no API key was sent"), (wrong, "not known")):
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-request-id"]
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            assert words in error["message"]
        counted = client.get("/metrics", headers=bearer("sk-one")).text
        assert 'unisono_requests_rejected_total{reason="unauthorized"} 2.0' in counted


def test_the_documentation_says_where_a_key_is_needed() -> None:
    with client_of(api_keys=KEYS) as client:
        api = client.get("/openapi.json", headers=bearer("sk-one")).json()
    assert api["security"] == [{"key": []}]
    assert api["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert api["paths"]["/health"]["get"]["security"] == []
    assert "security" not in api["paths"]["/v1/completions"]["post"]


def test_keys_are_logged_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"), client_of(api_keys=KEYS) as client:
        client.post("/v1/completions", json=BODY, headers=bearer("sk-one"))
        client.post("/v1/completions", json=BODY, headers=bearer("sk-wrong"))
    assert caplog.records
    assert "sk-" not in caplog.text


def test_the_sdk_with_and_without_a_key() -> None:
    with live_server(FakeRuntime(), ServerConfig(api_keys=KEYS)) as base:
        with openai.OpenAI(base_url=f"{base}/v1", api_key="sk-two", max_retries=0) as client:
            assert client.completions.create(model="duo", prompt="p").choices[0].text
        with (
            openai.OpenAI(base_url=f"{base}/v1", api_key="sk-wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            client.completions.create(model="duo", prompt="p")
        assert caught.value.code == "invalid_api_key"

        async def refused() -> None:
            async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="sk-wrong", max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError):
                    await client.models.list()

        asyncio.run(refused())


ORIGIN = "https://page.example"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def test_a_page_of_an_allowed_origin_may_call() -> None:
    with client_of(api_keys=KEYS, cors_origins=(ORIGIN,)) as client:
        preflight = client.options("/v1/completions", headers=PREFLIGHT)  # carries no key
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        for headers, status in ((bearer("sk-one"), 200), ({}, 401)):
            answer = client.post("/v1/completions", json=BODY, headers={"Origin": ORIGIN} | headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == ORIGIN
            assert "X-Request-Id" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize("origins", [(), ("https://other.example",)])
def test_a_page_of_another_origin_may_not(origins: tuple[str, ...]) -> None:
    with client_of(cors_origins=origins) as client:
        assert client.options("/v1/completions", headers=PREFLIGHT).status_code in (400, 405)
        answer = client.get("/v1/models", headers={"Origin": ORIGIN})
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("prefix", ["", "/llm"])  # proxies that strip the path, and those that do not
def test_below_a_root_path(prefix: str) -> None:
    with client_of(root_path="/llm", api_keys=KEYS) as client:
        assert client.get(f"{prefix}/health").status_code == 200
        assert client.get(f"{prefix}/v1/models").status_code == 401
        assert client.post(f"{prefix}/v1/completions", json=BODY, headers=bearer("sk-one")).status_code == 200
        api = client.get(f"{prefix}/openapi.json", headers=bearer("sk-one")).json()
        assert api["servers"] == [{"url": "/llm"}]


def certificate(folder: Path, name: str, password: str | None = None) -> dict[str, Path]:
    """A new self-signed certificate for the loopback address, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = [
        tool("openssl"),
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-days",
        "2",
    ]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key)]
    command += ["-out", str(cert), *(["-nodes"] if password is None else ["-passout", f"pass:{password}"])]
    subprocess.run(command, check=True, capture_output=True)
    return {"tls_cert_file": cert, "tls_key_file": key}


@pytest.mark.parametrize("password", [None, "horse"])
def test_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, password: str | None) -> None:
    files = certificate(tmp_path, "own", password)
    fields: dict[str, Any] = dict(files)
    if password is not None:
        monkeypatch.setenv("TLS_PASSWORD", password)
        fields["tls_key_password_env"] = "TLS_PASSWORD"
    trust = ssl.create_default_context(cafile=str(files["tls_cert_file"]))
    with live_server(FakeRuntime(), ServerConfig(**fields)) as base:
        assert base.startswith("https://")
        assert httpx.get(f"{base}/v1/models", verify=trust).status_code == 200


def test_tls_files_that_do_not_fit_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = certificate(tmp_path, "own"), certificate(tmp_path, "other")
    locked = certificate(tmp_path, "locked", "horse")
    missing = {"tls_key_file": tmp_path / "missing.key"}
    (tmp_path / "text").write_text("not PEM")
    monkeypatch.setenv("TLS_PASSWORD", "donkey")
    wrong_password = locked | {"tls_key_password_env": "TLS_PASSWORD"}
    for fields, words in (
        (own | {"tls_key_file": other["tls_key_file"]}, "its own private key"),
        (own | missing, "missing.key cannot be read (No such file"),
        (own | {"tls_cert_file": tmp_path / "text"}, "text and"),
        (locked, "tls_key_password_env if the key is encrypted"),
        (wrong_password, "tls_key_password_env if the key is encrypted"),
        (own | {"tls_key_password_env": "SURELY_NOT_SET"}, "SURELY_NOT_SET is not set"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_tls(ServerConfig(**fields))
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "donkey" not in str(caught.value)


def test_a_request_names_the_client_whose_key_it_has() -> None:
    """So that places are shared among clients."""
    runtime = FakeRuntime()
    app = create_app(runtime, ServerConfig(api_keys=KEYS), PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app) as client:
        for key in ("sk-one", "sk-two", "sk-one"):
            client.post("/v1/completions", json=BODY | {"n": 2}, headers=bearer(key)).raise_for_status()
    owners = [request.owner for request in runtime.seen]
    assert owners[0] == owners[1]
    assert owners[0][0] == owners[4][0] != owners[2][0]
    assert len(set(owners)) == 3
    assert not any("sk-" in part for owner in owners for part in owner)
