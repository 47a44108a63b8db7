"""Fields that OpenAI's client sends through `extra_body`, over a real server and members with two tokenizers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fake_runtime import live_server
from fakes import FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary

from ensemble_core import factory
from ensemble_core.config import Config
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.decoding.workshop import Workshop
from ensemble_core.factory import Loaded
from ensemble_core.runtime import Runtime
from ensemble_core.server_config import ServerConfig
from ensemble_core.stats import Record

HEAD = "deed bad cab de " * 4
SAID: Any = [{"role": "user", "content": HEAD}]
NAMED = [97, 0, 255, 256]


class Served:
    """A server over two fake members, with a client."""

    def __init__(self, runtime: Runtime, members: dict[str, FakeMember], base: str) -> None:
        self.runtime, self.members, self.base = runtime, members, base
        self.sdk = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)

    def post(self, path: str, **body: Any) -> httpx.Response:
        content, kind = json.dumps({"model": "duo"} | body), {"Content-Type": "application/json"}
        return httpx.post(f"{self.base}{path}", content=content, headers=kind, timeout=30)


def serve(**scheduler: Any) -> Iterator[Served]:
    members = {
        "alpha": FakeMember("alpha", byte_vocabulary(), seed=1, max_len=1024),
        "beta": FakeMember("beta", pair_vocabulary(), seed=2, max_len=1024),
    }

    def load(config: Config, record: Record) -> Loaded:
        return fake_loaded(config, members, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "load", load)
        duo = {"members": {"alpha": 0.6, "beta": 0.4}, "main": "alpha", "fusion": {"name": "projection"}}
        runtime = Runtime(fake_config(ensembles={"duo": duo}, scheduler=scheduler))
        with live_server(runtime, ServerConfig(drain_seconds=0.2)) as base:  # type: ignore[arg-type]
            runtime.wait_ready()
            yield Served(runtime, members, base)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    yield from serve(num_candidates=16)


@pytest.fixture(scope="module")
def ranked() -> Iterator[Served]:
    yield from serve(num_candidates=16, priority=True, max_running=1)


def reused(usage: Any) -> int:
    return int(usage.prompt_tokens_details.cached_tokens)


def test_a_salt_through_every_endpoint(served: Served) -> None:
    """The same salt is one domain, whichever endpoint it comes by; another, or none, is another."""
    fields: Any = {"model": "duo", "max_tokens": 4, "temperature": 0}
    prompt = "salted " + HEAD
    seen: set[str | None] = set()
    texts = set()
    for salt in (None, "a", "b", "a", None, "é" * 1024, "é" * 1024):
        body = {} if salt is None else {"extra_body": {"cache_salt": salt}}
        found = served.sdk.completions.create(prompt=prompt, **fields, **body)
        assert (reused(found.usage) > 0) == (salt in seen), salt
        seen.add(salt)
        texts.add(found.choices[0].text)
    assert len(texts) == 1
    chats = [
        served.sdk.chat.completions.create(messages=SAID, **fields, extra_body={"cache_salt": salt})
        for salt in ("c", "d", "c")
    ]
    assert [reused(each.usage) > 0 for each in chats] == [False, False, True]
    answers = [
        served.sdk.responses.create(model="duo", input=SAID, max_output_tokens=4, extra_body={"cache_salt": salt})
        for salt in ("c", "e")
    ]
    assert [each.usage.input_tokens_details.cached_tokens > 0 for each in answers] == [True, False]  # type: ignore[union-attr]
    told = [
        served.post("/v1/messages", messages=SAID, max_tokens=4, cache_salt=salt).json()["usage"]
        for salt in ("e", "f")
    ]
    assert [each["cache_read_input_tokens"] > 0 for each in told] == [True, False]
    assert all(member.is_empty for member in served.members.values())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("salt", ["", "x" * 1025, "x" * 10_000, 5, ["a"], {"a": 1}, True, "\ud800"])
def test_what_is_no_salt_is_refused_by_name(served: Served, path: str, salt: Any) -> None:
    prompt = {"/v1/completions": {"prompt": "a"}, "/v1/responses": {"input": "a"}}.get(path, {"messages": SAID})
    answer = served.post(path, cache_salt=salt, **prompt)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "cache_salt"


@pytest.mark.parametrize("mode", ["lockstep", "verify", "sampled"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_named_ids_in_completions(served: Served, mode: str, temperature: float) -> None:
    fields: Any = {"model": "duo", "prompt": HEAD, "max_tokens": 6, "temperature": temperature, "seed": 1}
    extra = {"ensemble": {"mode": mode}, "return_tokens_as_token_ids": True}
    plain = served.sdk.completions.create(**fields, logprobs=2, extra_body=extra).choices[0]
    asked = {**fields, "logprobs": 2, "extra_body": extra | {"logprob_token_ids": NAMED}}
    whole = served.sdk.completions.create(**asked).choices[0]
    assert whole.text == plain.text
    assert whole.logprobs is not None
    assert whole.logprobs.token_logprobs == plain.logprobs.token_logprobs  # type: ignore[union-attr]
    for token, top in zip(whole.logprobs.tokens or (), whole.logprobs.top_logprobs or (), strict=True):
        assert top.keys() == {token, *(f"token_id:{i}" for i in NAMED)}
        assert all(-9999 <= value <= 0 and math.isfinite(value) for value in top.values())
    chunks = [chunk.choices[0].logprobs for chunk in served.sdk.completions.create(**asked, stream=True)]
    streamed = [top for each in chunks if each is not None for top in each.top_logprobs or ()]
    assert streamed == whole.logprobs.top_logprobs


def test_named_ids_in_chat(served: Served) -> None:
    fields: Any = {"model": "duo", "messages": SAID, "max_tokens": 5, "temperature": 0, "logprobs": True}
    asked = {**fields, "extra_body": {"logprob_token_ids": NAMED, "return_tokens_as_token_ids": True}}
    whole = served.sdk.chat.completions.create(**asked).choices[0]
    plain = served.sdk.chat.completions.create(**fields, top_logprobs=3).choices[0]
    assert whole.message.content == plain.message.content
    content = whole.logprobs.content  # type: ignore[union-attr]
    for token in content or ():
        assert {each.token for each in token.top_logprobs} == {token.token, *(f"token_id:{i}" for i in NAMED)}
        values = [each.logprob for each in token.top_logprobs]
        assert values == sorted(values, reverse=True)
    chunks = served.sdk.chat.completions.create(**asked, stream=True)
    streamed = [
        token
        for chunk in chunks
        if (told := chunk.choices[0].logprobs) is not None
        for token in told.content or ()
    ]
    assert streamed == content


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "a", "logprob_token_ids": [1]}),
        ("/v1/completions", {"prompt": "a", "logprob_token_ids": [1], "best_of": 2}),
        ("/v1/chat/completions", {"messages": SAID, "logprob_token_ids": [1]}),
        ("/v1/chat/completions", {"messages": SAID, "logprob_token_ids": [1], "logprobs": False}),
        ("/v1/responses", {"input": "a", "logprob_token_ids": [1]}),
        *(
            ("/v1/completions", {"prompt": "a", "logprobs": 1, "logprob_token_ids": ids})
            for ids in (
                [257],
                [-1],
                [2**31],
                [2**70],
                [1] * 129,
                ["1"],
                [1.5],
                [None],
                [True],
                "1",
                {"1": 2},
                [[1]],
            )
        ),
    ],
    ids=str,
)
def test_what_cannot_be_named_is_refused_by_name(served: Served, path: str, fields: dict[str, Any]) -> None:
    answer = served.post(path, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "logprob_token_ids"


def test_the_most_ids_and_none(served: Served) -> None:
    asked: Any = {"prompt": "a", "logprobs": 0, "max_tokens": 1, "return_tokens_as_token_ids": True}
    most = served.post("/v1/completions", **asked, logprob_token_ids=list(range(128))).json()
    (top,) = most["choices"][0]["logprobs"]["top_logprobs"]
    assert len(top) in (128, 129)
    for none in ([], None):
        found = served.post("/v1/completions", **asked, logprob_token_ids=none).json()
        assert len(found["choices"][0]["logprobs"]["top_logprobs"][0]) == 1


def test_priorities_change_nothing_unless_they_are_allowed(served: Served) -> None:
    for priority in (1, -100, 101, 2**70, 0, None):
        assert served.post("/v1/completions", prompt="a", max_tokens=1, priority=priority).status_code == 200


def test_priorities_are_bounded_by_name(ranked: Served) -> None:
    for priority in (-100, 100, 0, 5.0):
        assert ranked.post("/v1/completions", prompt="a", max_tokens=1, priority=priority).status_code == 200
    for wrong in (-101, 101, 2**70, 1.5, "1", True, [1]):
        answer = ranked.post("/v1/completions", prompt="a", max_tokens=1, priority=wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")


def test_the_urgent_go_first(ranked: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind one that holds the only place."""
    gate, order = ranked.members["alpha"].gate, list[int]()
    take = Sequence.finish

    def noted(self: Sequence, *args: Any, **fields: Any) -> None:
        order.append(self.request.priority)
        take(self, *args, **fields)

    monkeypatch.setattr(Sequence, "finish", noted)
    gate.clear()
    ranked.members["alpha"].entered.clear()
    asked = []
    with ThreadPoolExecutor(5) as pool:
        for priority in (1, 50, -50, 0, -100):
            asked.append(pool.submit(ranked.post, "/v1/completions", prompt="a", max_tokens=1, priority=priority))
            assert ranked.members["alpha"].entered.wait(10.0)
        deadline = time.monotonic() + 8.0
        while ranked.runtime._commands.qsize() < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        gate.set()
        assert [each.result().status_code for each in asked] == [200] * 5
    assert order == [1, -100, -50, 0, 50]


def test_tokens_of_messages_are_counted(served: Served) -> None:
    tools = [{"name": "f", "description": "x", "input_schema": {"type": "object"}}]
    for more in (
        {},
        {"system": "Be brief."},
        {"tools": tools},
        {"messages": [*SAID, {"role": "assistant", "content": "We"}]},
    ):
        asked = {"messages": SAID} | more
        counted = served.post("/v1/messages/count_tokens", **asked)
        assert counted.status_code == 200, counted.text
        answer = served.post("/v1/messages", **asked, max_tokens=1, cache_salt=str(more))
        assert answer.status_code == 200, answer.text
        used = answer.json()["usage"]
        assert counted.json() == {"input_tokens": used["input_tokens"] + used["cache_read_input_tokens"]}


@pytest.mark.parametrize(
    "fields",
    [{}, {"messages": []}, {"messages": [{"role": "user", "content": ""}], "tools": 5}, {"messages": "a"}],
)
def test_a_count_is_refused_in_anthropics_form(served: Served, fields: dict[str, Any]) -> None:
    answer = served.post("/v1/messages/count_tokens", **fields)
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    missing = served.post("/v1/messages/count_tokens", model="nobody", messages=SAID)
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")


def test_a_member_that_is_away_is_named_before_anything_is_compiled(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        raise AssertionError("a form is compiled")

    monkeypatch.setattr(Workshop, "prepare", never)
    roster = served.runtime.roster
    voice = served.runtime.loaded().voices["beta"]
    roster.put("beta", "asleep")
    try:
        form = {"type": "json_object"}
        answer = served.post("/v1/chat/completions", messages=SAID, max_tokens=5, response_format=form)
        assert answer.status_code == 503
        assert "lacks the member 'beta'" in answer.json()["error"]["message"]
    finally:
        roster.put("beta", "ready", voice=voice)


@pytest.mark.parametrize(
    "beside",
    [
        {"echo": True},
        {"echo": True, "max_tokens": 0},
        {"prompt_logprobs": 3},
        {"n": 3, "temperature": 1.0},
        {"n": 1, "best_of": 4, "temperature": 1.0},
        {"response_format": {"type": "json_object"}},
        {"allowed_token_ids": [97, 98, 99]},
        {"logit_bias": {"97": -100, "255": 100}, "repetition_penalty": 1.5},
        {"bad_words": ["a", "deed"], "min_tokens": 4},
        {"ensemble": {"weighting": "perplexity"}},
        {"ensemble": {"fusion": "union"}},
        {"ensemble": {"members": ["alpha"]}},
        {"ensemble": {"mode": {"name": "verify", "options": {"drafter": "beta", "draft": 5}}}},
        {"cache_salt": "x", "stop": ["b"]},
    ],
    ids=str,
)
def test_named_ids_change_nothing_else(served: Served, beside: dict[str, Any]) -> None:
    asked: dict[str, Any] = {
        "prompt": "abc de",
        "max_tokens": 6,
        "temperature": 0,
        "seed": 5,
        "logprobs": 2,
    } | beside
    plain = served.post("/v1/completions", **asked).json()["choices"]
    told = served.post("/v1/completions", **asked, logprob_token_ids=list(range(60, 188))).json()["choices"]
    for with_ids, without in zip(told, plain, strict=True):
        mine, theirs = with_ids.pop("logprobs"), without.pop("logprobs")
        assert with_ids == without
        assert mine["tokens"] == theirs["tokens"]
        assert mine["token_logprobs"] == theirs["token_logprobs"]
        assert None not in [value for top in mine["top_logprobs"] if top for value in top.values()]
