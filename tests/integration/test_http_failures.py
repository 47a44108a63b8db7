"""A failing member, and cached prompts, as a client and Prometheus see them: the whole app over fake members."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary
from starlette.testclient import TestClient

from ensemble_core import factory
from ensemble_core.config import Config
from ensemble_core.factory import Loaded
from ensemble_core.runtime import Runtime
from ensemble_core.server_config import ServerConfig
from ensemble_core.stats import Record
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics

Members = dict[str, FakeMember]
DUO = {"members": {"alpha": 0.5, "beta": 0.5}, "main": "alpha", "fusion": {"name": "projection"}}
PROMPT = "abc de bad cab"


@pytest.fixture
def members() -> Members:
    return {
        "alpha": FakeMember("alpha", byte_vocabulary(), seed=1),
        "beta": FakeMember("beta", pair_vocabulary(), seed=2),
    }


@pytest.fixture
def client(members: Members, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    def load(config: Config, record: Record) -> Loaded:
        return fake_loaded(config, members, record)

    monkeypatch.setattr(factory, "load", load)
    metrics = PrometheusMetrics()
    runtime = Runtime(
        fake_config(ensembles={"lenient": DUO | {"on_member_failure": "drop"}, "strict": DUO}), metrics.record
    )
    with TestClient(
        create_app(runtime, ServerConfig(), metrics), raise_server_exceptions=False, base_url="http://localhost"
    ) as client:
        runtime.wait_ready()
        yield client


def post(client: TestClient, model: str, path: str = "/v1/completions", **fields: Any) -> Any:
    said = {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in path else {"prompt": PROMPT}
    return client.post(path, json={"model": model, "max_tokens": 8, "temperature": 0} | said | fields)


def metric(client: TestClient, line: str) -> float | None:
    found = [row for row in client.get("/metrics").text.splitlines() if row.startswith(f"unisono_{line} ")]
    return float(found[0].rpartition(" ")[2]) if found else None


def last_usage(text: str) -> Any:
    *_, last, done = [block.removeprefix("data: ") for block in text.strip().split("\n\n")]
    assert done == "[DONE]"
    return json.loads(last)["usage"]


@pytest.mark.parametrize("cause", ["exception", "non_finite"])
def test_a_dropped_member_is_told_of_everywhere(client: TestClient, members: Members, cause: str) -> None:
    (members["beta"].fails_on if cause == "exception" else members["beta"].nan_on).add(0)
    assert metric(client, 'member_up{member="beta"}') == 1.0
    answer = post(client, "lenient", ensemble={"trace": True}).json()
    assert answer["usage"]["dropped_members"] == {"beta": cause}
    steps = answer["choices"][0]["trace"]
    assert len(steps) == 8
    assert all(step["left_out"] == {"beta": cause} and not step["consulted"] for step in steps)
    assert answer["choices"][0]["text"] == post(client, "alpha").json()["choices"][0]["text"]
    assert metric(client, f'member_failures_total{{cause="{cause}",member="beta"}}') == 1.0
    dropped = f'member_dropped_requests_total{{member="beta",model="lenient",reason="{cause}"}}'
    assert metric(client, dropped) == 1.0
    assert metric(client, 'member_up{member="beta"}') == 0.0
    assert metric(client, 'member_up{member="alpha"}') == 1.0
    well = post(client, "lenient", ensemble={"trace": True}).json()
    assert "dropped_members" not in well["usage"]
    assert all(step["left_out"] == {} for step in well["choices"][0]["trace"])
    assert metric(client, 'member_up{member="beta"}') == 1.0


def test_a_strict_ensemble_fails_the_request(client: TestClient, members: Members) -> None:
    members["beta"].fails_on.add(0)
    answer = post(client, "strict")
    assert answer.status_code == 500
    assert "member 'beta'" in answer.json()["error"]["message"]
    assert metric(client, 'member_failures_total{cause="exception",member="beta"}') == 1.0
    assert metric(client, 'requests_total{finish_reason="error",model="strict"}') == 1.0
    assert post(client, "strict").status_code == 200


def test_a_stream_tells_in_its_usage(client: TestClient, members: Members) -> None:
    members["beta"].nan_on.add(0)
    text = post(client, "lenient", stream=True, stream_options={"include_usage": True}).text
    assert last_usage(text)["dropped_members"] == {"beta": "non_finite"}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_cached_tokens_of_a_prompt(client: TestClient, path: str) -> None:
    first = post(client, "strict", path).json()["usage"]
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    whole = first["prompt_tokens"]
    again = post(client, "strict", path).json()["usage"]
    assert again["prompt_tokens_details"] == {"cached_tokens": whole - 1}
    text = post(client, "strict", path, stream=True, stream_options={"include_usage": True}).text
    assert last_usage(text)["prompt_tokens_details"] == {"cached_tokens": whole - 1}


def test_choices_that_share_a_prompt_save_none_of_it(client: TestClient) -> None:
    """It was computed once, for the first of them."""
    usage = post(client, "strict", n=3).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    usage = post(client, "strict", prompt=[PROMPT, PROMPT + "x"], n=2).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2 * len(PROMPT) - 1}


def test_a_scored_prompt_is_computed_in_full(client: TestClient) -> None:
    post(client, "strict")
    usage = post(client, "strict", echo=True, logprobs=1).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_models_say_what_a_failure_does(client: TestClient) -> None:
    recipes = {model["id"]: model["recipe"] for model in client.get("/v1/models").json()["data"]}
    assert recipes["lenient"]["on_member_failure"] == "drop"
    assert recipes["strict"]["on_member_failure"] == "fail"
