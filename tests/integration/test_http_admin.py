"""The admin's routes over HTTP: who may come in, and what they answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary
from starlette.testclient import TestClient

from ensemble_core import factory
from ensemble_core.assembly import Loaded
from ensemble_core.config import Config
from ensemble_core.errors import ConfigError
from ensemble_core.runtime import Runtime
from ensemble_core.server_config import ServerConfig
from ensemble_core.stats import Record
from server.batches.calls import InnerClient
from server.batches.lines import BatchItem
from server.edge.app import create_app
from server.edge.auth import load_admin_keys
from server.edge.metrics import PrometheusMetrics

ADMIN = {"Authorization": "Bearer sk-admin"}
CLIENT = {"Authorization": "Bearer sk-client"}
MEMBERS = "/v1/admin/members"


def served(monkeypatch: pytest.MonkeyPatch, **server: Any) -> TestClient:
    def load(config: Config, record: Record) -> Loaded:
        members = {
            "alpha": FakeMember("alpha", byte_vocabulary(), seed=1),
            "beta": FakeMember("beta", pair_vocabulary(), seed=2),
        }
        return fake_loaded(config, members, record)

    monkeypatch.setattr(factory, "load", load)
    config = fake_config(server=server)
    metrics = PrometheusMetrics()
    runtime = Runtime(config, metrics.record)
    return TestClient(create_app(runtime, config.server, metrics), base_url="http://localhost")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    with served(monkeypatch, api_keys=["sk-client"], admin_keys=["sk-admin"]) as client:
        wait_ready(client)
        yield client


def wait_ready(client: TestClient) -> None:
    while client.get("/ready").status_code != 200:
        pass


@pytest.mark.parametrize(
    "path", [MEMBERS, f"{MEMBERS}/beta/load", "/v1/admin/ensembles", "/v1/admin", "/v1/admin/x"]
)
def test_only_the_admin_comes_in(client: TestClient, path: str) -> None:
    for headers in ({}, CLIENT, {"Authorization": "Bearer wrong"}):
        for answer in (client.get(path, headers=headers), client.post(path, headers=headers)):
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/v1/models", headers=ADMIN).status_code == 401, "and nowhere else"
    assert client.get("/v1/models", headers=CLIENT).status_code == 200


@pytest.mark.parametrize("keys", [{}, {"api_keys": ["sk-client"]}])
def test_without_keys_of_the_admin_there_are_no_routes(monkeypatch: pytest.MonkeyPatch, keys: Any) -> None:
    with served(monkeypatch, **keys) as client:
        assert client.get(MEMBERS, headers=CLIENT).status_code == 404
        assert client.post(f"{MEMBERS}/beta/unload", headers=CLIENT).status_code == 404
        assert "/v1/admin/members" not in client.get("/openapi.json", headers=CLIENT).json()["paths"]


def test_clients_need_no_key_where_only_the_admin_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(monkeypatch, admin_keys=["sk-admin"]) as client:
        wait_ready(client)
        assert client.get("/v1/models").status_code == 200
        assert client.get(MEMBERS).status_code == 401
        assert client.get(MEMBERS, headers=ADMIN).status_code == 200
        document = client.get("/openapi.json").json()
        assert document["paths"][MEMBERS]["get"]["security"] == [{"key": []}]
        assert document["security"] == []


def test_a_key_opens_one_door_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="admin_keys: a key of the clients is among them"):
        load_admin_keys(ServerConfig(api_keys=["same"], admin_keys=["same"]))  # type: ignore[arg-type]
    monkeypatch.setenv("ADMINS", " sk-one, sk-two ")
    assert load_admin_keys(ServerConfig(admin_key_env="ADMINS")).admits(b"sk-two")
    with pytest.raises(ConfigError, match="admin_key_env: gives no key"):
        load_admin_keys(ServerConfig(admin_key_env="NOBODY"))


def test_a_member_goes_sleeps_and_comes_back(client: TestClient) -> None:
    for change, state, up in (
        ("sleep", "asleep", 0),
        ("wake", "ready", 1),
        ("unload", "unloaded", 0),
        ("unload", "unloaded", 0),
        ("load", "ready", 1),
        ("load", "ready", 1),
    ):
        answer = client.post(f"{MEMBERS}/beta/{change}", headers=ADMIN)
        assert answer.status_code == 200, answer.text
        assert answer.json()["state"] == state
        listed = client.get(MEMBERS, headers=ADMIN).json()
        assert {each["name"]: each["state"] for each in listed["data"]} == {"alpha": "ready", "beta": state}
        assert listed["rss_bytes"] > 2**20
        assert f'unisono_member_up{{member="beta"}} {up}.0' in client.get("/metrics", headers=CLIENT).text
        card = client.get("/v1/models/duo", headers=CLIENT).json()
        assert (card["status"], card["lacks"]) == (("ready", {}) if up else ("lacks_members", {"beta": state}))
        body = {"model": "duo", "prompt": "abc", "max_tokens": 3}
        asked = client.post("/v1/completions", headers=CLIENT, json=body)
        assert asked.status_code == (200 if up else 503)
        if not up:
            assert asked.headers["retry-after"]
            assert "'beta'" in asked.json()["error"]["message"]
            assert asked.json()["error"]["code"] == "lacks_members"


def test_recipes_come_and_go(client: TestClient) -> None:
    recipe = {"members": {"alpha": 1, "beta": 3}, "main": "beta", "fusion": "projection"}
    for replaced in (False, True):
        answer = client.post("/v1/admin/ensembles", headers=ADMIN, json={"name": "new", "recipe": recipe})
        assert answer.status_code == 200, answer.text
        assert (answer.json()["replaced"], answer.json()["model"]["id"]) == (replaced, "new")
    body = {"model": "new", "prompt": "abc", "max_tokens": 3}
    assert client.post("/v1/completions", headers=CLIENT, json=body).status_code == 200
    gone = client.delete("/v1/admin/ensembles/new", headers=ADMIN)
    assert gone.json() == {"id": "new", "object": "model", "deleted": True}
    assert client.post("/v1/completions", headers=CLIENT, json=body).status_code == 404
    assert client.delete("/v1/admin/ensembles/new", headers=ADMIN).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("members/nobody/unload", {}, 404, "nobody"),
        ("members/beta/unload", {"drain_seconds": -1}, 400, "drain_seconds"),
        ("members/beta/unload", {"forced": True}, 400, "forced"),
        ("members/beta/sleep", {"level": 2}, 400, "level"),
        ("members/beta/load", {"member": {"model": "x", "device": 3}}, 400, "members.beta.device"),
        ("ensembles", {"name": "new"}, 400, "recipe"),
        ("ensembles", {"name": "new", "recipe": {"members": {"alpha": 1}}}, 400, "ensembles.new.main"),
        ("ensembles", {"name": "new", "recipe": {"kind": "choir"}}, 400, "choir"),
    ],
)
def test_wrong_changes_are_refused_by_name(
    client: TestClient, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    answer = client.post(f"/v1/admin/{path}", headers=ADMIN, json=body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


def test_what_lacks_members_is_a_503_by_name_on_every_endpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Responses and lines of batches as chat: the batch itself goes to its end."""
    with served(monkeypatch, admin_keys=["sk-admin"], files_folder=str(tmp_path)) as client:
        wait_ready(client)
        assert client.post(f"{MEMBERS}/beta/unload", headers=ADMIN).status_code == 200
        said: dict[str, dict[str, Any]] = {
            "/v1/completions": {"prompt": "a"},
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
            "/v1/responses": {"input": "a"},
        }
        for stream in (False, True):
            for path, body in said.items():
                answer = client.post(path, json={"model": "duo", "stream": stream, **body})
                assert answer.status_code == 503, answer.text
                assert answer.json()["error"]["code"] == "lacks_members"
                assert "'duo' lacks the member 'beta' (unloaded)" in answer.json()["error"]["message"]
        url = "/v1/completions"
        lines = [
            {
                "custom_id": model,
                "method": "POST",
                "url": url,
                "body": {"model": model, "prompt": "a", "max_tokens": 2},
            }
            for model in ("duo", "alpha")
        ]
        file = {"file": ("in.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())}
        uploaded = client.post("/v1/files", files=file, data={"purpose": "batch"}).json()["id"]
        asked = {"input_file_id": uploaded, "endpoint": url, "completion_window": "24h"}
        batch = client.post("/v1/batches", json=asked).json()
        while batch["status"] not in ("completed", "failed"):
            batch = client.get(f"/v1/batches/{batch['id']}").json()
        assert (batch["status"], batch["request_counts"]) == (
            "completed",
            {"total": 2, "completed": 1, "failed": 1},
        )
        (refused,) = client.get(f"/v1/files/{batch['error_file_id']}/content").text.splitlines()
        found = json.loads(refused)["response"]
        assert (found["status_code"], found["body"]["error"]["code"]) == (503, "lacks_members")


def test_calls_from_inside_never_open_the_admins_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(monkeypatch, admin_keys=["sk-admin"]) as client:
        wait_ready(client)

        async def call() -> int:
            async with InnerClient(client.app, "somebody") as inside:
                return (await inside(BatchItem(1, "c", f"{MEMBERS}/beta/unload", b"{}"))).status

        assert asyncio.run(call()) == 401
