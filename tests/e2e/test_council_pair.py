"""Councils over the demo pair: a real server process and OpenAI's own client."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import yaml
from processes import ROOT, served

QUESTION: Any = [{"role": "user", "content": "What is 6 + 7? Answer with the number alone."}]


@pytest.fixture(scope="module")
def url(demo_config: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo's councils, with answers that do not depend on what else runs."""
    folder = tmp_path_factory.mktemp("councils")
    config = folder / "councils.yaml"
    raw = yaml.safe_load((ROOT / "configs" / "councils.yaml").read_text())
    raw["matrices"]["folder"] = str(ROOT / "matrices")
    config.write_text(yaml.safe_dump(raw | {"deterministic": True}))
    with served(config, folder / "server.log") as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    sent: dict[str, Any] = {"max_tokens": 16, "seed": 3, "temperature": 0.7, **fields}
    return client.chat.completions.create(model=model, messages=QUESTION, **sent)


def metric(url: str, line: str) -> float:
    found = [row for row in httpx.get(f"{url}/metrics").text.splitlines() if row.startswith(line)]
    return sum(float(row.rpartition(" ")[2]) for row in found)


@pytest.mark.parametrize(
    ("model", "servers", "calls"),
    [
        ("spare", {"duet"}, 1),
        ("likely", {"gemma3", "smollm2", "duet"}, 3),
        ("blend", {"duet", "gemma3", "smollm2"}, 3),
        ("poll", {"duet", "smollm2"}, 7),
        ("best", {"duet", "smollm2"}, 4),
        ("moa", {"duet"}, 3),
        ("smart", {"duet", "smollm2"}, 7),
    ],
)
def test_every_kind_answers(client: openai.OpenAI, model: str, servers: set[str], calls: int) -> None:
    answer = ask(client, model)
    assert answer.model == model
    assert answer.served_by in servers
    made = answer.usage.calls
    assert len(made) == calls
    assert answer.usage.completion_tokens == sum(call["completion_tokens"] for call in made)
    assert answer.usage.prompt_tokens == sum(call["prompt_tokens"] for call in made)
    assert ask(client, model).choices[0].message.content == answer.choices[0].message.content


def test_a_discussion_comes_to_an_answer(client: openai.OpenAI) -> None:
    question = "Which is a metal?\nA. Wood\nB. Iron\nC. Glass"
    answer: Any = client.chat.completions.create(
        model="table",
        messages=[{"role": "user", "content": question}],
        max_tokens=64,
        seed=1,
        extra_body={"ensemble": {"trace": True}},
    )
    assert answer.choices[0].message.content.rstrip(".")[-1] in "ABC"
    for opinions in answer.choices[0].council["table"]["rounds"]:
        assert opinions
        assert all(each["answer"] in "ABC" and 0 <= each["confidence"] <= 1 for each in opinions)


def test_a_stream_is_the_whole_answer_and_says_who_speaks(client: openai.OpenAI) -> None:
    whole = ask(client, "smart")
    chunks = list(ask(client, "smart", stream=True, stream_options={"include_usage": True}))
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    )
    assert {chunk.served_by for chunk in chunks} == {whole.served_by}
    assert len(chunks[-1].usage.calls) == 7


def test_a_route_is_the_model_s_own_answer(client: openai.OpenAI) -> None:
    routed, own = ask(client, "spare", logprobs=True), ask(client, "duet", logprobs=True)
    assert routed.choices[0].message.content == own.choices[0].message.content
    assert [t.token for t in routed.choices[0].logprobs.content] == [
        t.token for t in own.choices[0].logprobs.content
    ]
    assert getattr(own, "served_by", None) is None
    assert own.usage.model_extra in (None, {})


def test_headers_models_and_refusals(url: str) -> None:
    body: dict[str, Any] = {"model": "poll", "messages": QUESTION, "max_tokens": 4}
    with httpx.Client(base_url=url, timeout=60) as client:
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.headers["x-served-by"] == answer.json()["served_by"]
        card = client.get("/v1/models/poll").json()
        assert (card["kind"], card["recipe"]["kind"]) == ("council", "vote")
        for fields, param in (
            ({"logit_bias": {"5": 1}}, "logit_bias"),
            ({"n": 3}, "n"),
            ({"ensemble": {"fusion": "union"}}, "ensemble"),
            ({"ensemble": {"limits": {"seconds": 1000}}}, "ensemble.limits"),
            ({"model": "duet", "ensemble": {"limits": {"seconds": 1}}}, "ensemble.limits"),
            ({"model": "table", "logprobs": True}, "logprobs"),
        ):
            refused = client.post("/v1/chat/completions", json=body | fields)
            assert refused.status_code == 400, refused.text
            assert refused.json()["error"]["param"] == param
        refused = client.post("/tokenize", json={"model": "poll", "prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
        refused = client.post("/v1/completions", json={"model": "poll", "prompt": [1, 2]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


def test_a_client_that_leaves_ends_every_call(url: str) -> None:
    body = {"model": "poll", "messages": QUESTION, "max_tokens": 1000, "ensemble": {"limits": {"seconds": 50}}}

    def leave() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body | {"ignore_eos": True}, timeout=3)

    thread = threading.Thread(target=leave)
    thread.start()
    deadline = time.monotonic() + 3
    most = 0.0
    while time.monotonic() < deadline:
        most = max(most, metric(url, "unisono_num_requests_running"))
        time.sleep(0.2)
    thread.join()
    assert most == 7
    deadline = time.monotonic() + 20
    while metric(url, "unisono_num_requests_running") > 0:
        assert time.monotonic() < deadline, "calls go on without a client"
        time.sleep(0.2)
    assert metric(url, "unisono_council_calls_total") > 0
