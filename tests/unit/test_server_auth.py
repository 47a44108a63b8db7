from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.responses import PlainTextResponse

from ensemble_core.errors import ConfigError
from ensemble_core.server_config import ServerConfig
from server.edge.auth import Gate, KeyRing, load_keys, route_path
from server.edge.metrics import PrometheusMetrics

RING = KeyRing([SecretStr("key-one"), SecretStr("key-two")])


def status_of(path: str, *values: bytes, root_path: str = "", protect_metrics: bool = True) -> int:
    gate = Gate(PlainTextResponse("in"), RING, protect_metrics, PrometheusMetrics())
    headers = [(b"authorization", value) for value in values]
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": path, "root_path": root_path}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(gate(scope | {"headers": headers}, None, send))  # type: ignore[arg-type]
    return int(sent[0]["status"])


@pytest.mark.parametrize("value", [b"Bearer key-one", b"bearer key-two", b"Bearer  key-one "])
def test_any_of_the_keys_lets_in(value: bytes) -> None:
    assert status_of("/v1/models", value) == 200


@pytest.mark.parametrize(
    "values",
    [
        [],
        [b""],
        [b"Bearer"],
        [b"Bearer "],
        [b"Bearer key"],
        [b"Bearer key-one-"],
        [b"Bearer key-one,key-two"],
        [b"Basic key-one"],
        [b"key-one"],
        [b"Bearer \xff\x00"],
        [b"Bearer key-one", b"Bearer key-two"],
    ],
)
def test_anything_else_does_not(values: list[bytes]) -> None:
    assert status_of("/v1/models", *values) == 401


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/ready", 200),
        ("/version", 200),
        ("/metrics", 401),
        ("/", 401),
        ("/docs", 401),
        ("/openapi.json", 401),
        ("/nope", 401),
        ("/health/", 401),
        ("/health/x", 401),
        ("/Health", 401),
        ("//health", 401),
        ("/v1/models/../health", 401),
    ],
)
def test_all_but_the_open_routes_need_one(path: str, status: int) -> None:
    assert status_of(path) == status


def test_metrics_are_open_by_option() -> None:
    assert status_of("/metrics", protect_metrics=False) == 200


@pytest.mark.parametrize(
    ("path", "route"),
    [("/llm/health", "/health"), ("/health", "/health"), ("/llm", ""), ("/llmhealth", "/llmhealth")],
)
def test_the_root_path_is_no_part_of_the_route(path: str, route: str) -> None:
    assert route_path({"path": path, "root_path": "/llm"}) == route


def test_open_routes_below_a_root_path() -> None:
    assert status_of("/llm/health", root_path="/llm") == 200
    assert status_of("/llm/v1/models", root_path="/llm") == 401


def test_all_sources_add_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_KEYS", "env-one, env-two,")
    (tmp_path / "keys").write_text("# the clients\nfile-one\n\n  file#two \n")
    config = ServerConfig(api_keys=(SecretStr("own"),), api_key_env="MY_KEYS", api_key_file=tmp_path / "keys")
    ring = load_keys(config)
    for key in (b"own", b"env-one", b"env-two", b"file-one", b"file#two"):
        assert ring.admits(key)
    for key in (b"", b"# the clients", b"env-one, env-two,", b"MY_KEYS"):
        assert not ring.admits(key)


def test_without_a_source_everybody_is_let_in() -> None:
    assert not load_keys(ServerConfig())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"api_key_env": "SURELY_NOT_SET"}, "server.api_key_env: gives no key"),
        ({"api_key_file": Path("nowhere/keys")}, "server.api_key_file: nowhere/keys cannot be read"),
        ({"api_keys": (SecretStr("secret key"),)}, "server.api_keys: a key must be visible ASCII"),
        ({"api_keys": (SecretStr(""),)}, "server.api_keys: a key must be visible ASCII"),
    ],
)
def test_a_source_that_gives_no_key_does_not_open_the_door(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_keys(ServerConfig(**fields))
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_empty_key_file_does_not_open_the_door(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# nobody yet\n")
    with pytest.raises(ConfigError, match="gives no key"):
        load_keys(ServerConfig(api_key_file=tmp_path / "keys"))


def test_keys_are_in_no_repr() -> None:
    config = ServerConfig(api_keys=(SecretStr("sk-secret"),))
    ring = load_keys(config)
    assert "sk-secret" not in f"{config!r} {config} {ring!r} {vars(ring)} {config.model_dump()}"
