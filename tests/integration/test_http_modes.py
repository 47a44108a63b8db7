"""Every mode serves every request: over HTTP, what lockstep answers, of members with one tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeMember, byte_vocabulary, fake_config, fake_loaded
from starlette.testclient import TestClient

from ensemble_core import factory
from ensemble_core.config import Config
from ensemble_core.errors import MemberError
from ensemble_core.factory import Loaded
from ensemble_core.runtime import Runtime
from ensemble_core.server_config import ServerConfig
from ensemble_core.stats import Record
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics

Members = dict[str, FakeMember]

# The same rule in all of them: one random number a place for all, since lockstep has no drafts to reject.
MODES: dict[str, dict[str, Any]] = {
    "shared": {"name": "lockstep", "options": {"positions": "shared"}},
    "verify": {"name": "verify", "options": {"acceptance": "common"}},
    "long": {"name": "verify", "options": {"acceptance": "common", "draft": 7, "needed": "always"}},
    "relay": {"name": "verify", "options": {"acceptance": "common", "drafter": "beta", "draft": 4}},
}
_NAMES = ("alpha", "beta", "gamma")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
_JSON = {"type": "json_schema", "json_schema": {"name": "pair", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def members() -> Members:
    """Members with one tokenizer, in which every text has one spelling."""
    return {name: FakeMember(name, byte_vocabulary(), seed=seed) for seed, name in enumerate(_NAMES)}


@pytest.fixture(scope="module")
def client(members: Members) -> Iterator[TestClient]:
    """A client of the whole app over them, with an ensemble for each mode."""
    base = {"members": dict.fromkeys(_NAMES, 1.0), "main": "alpha", "fusion": {"name": "projection"}}
    base |= {"on_member_failure": "drop"}
    modes = {name: base | {"mode": mode} for name, mode in MODES.items()}

    def load(config: Config, record: Record) -> Loaded:
        return fake_loaded(config, members, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "load", load)
        runtime = Runtime(
            fake_config(_NAMES, ensembles={"lockstep": base, **modes}, scheduler={"prefix_reuse": False})
        )
        app = create_app(runtime, ServerConfig(max_choices=8), PrometheusMetrics())
        with TestClient(app, base_url="http://localhost") as client:
            runtime.wait_ready()
            yield client


_TEXTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0},
    "one token": {"max_tokens": 1},
    "only the prompt": {"max_tokens": 0, "echo": True, "logprobs": 2},
    "choices": {"n": 3, "temperature": 0.9},
    "the best of several": {"n": 2, "best_of": 5, "temperature": 1.2, "logprobs": 1},
    "several prompts": {"prompt": ["abc", "中文 bad", "é"], "n": 2, "temperature": 0.8},
    "ids": {"prompt": [[97, 98, 99], [100]], "temperature": 0},
    "stop strings": {"stop": ["a", "ca\n"], "temperature": 0.7},
    "stop ids": {"stop_token_ids": [97, 98], "temperature": 0.7},
    "min_tokens": {"min_tokens": 14, "stop": ["a"]},
    "past the end": {"ignore_eos": True, "max_tokens": 60, "temperature": 0},
    "logprobs": {"logprobs": 5, "temperature": 0},
    "logprobs of all": {"logprobs": 3, "echo": True, "temperature": 0.5},
    "a negative seed": {"seed": -(2**63), "temperature": 2.0, "top_p": 0.95},
    "cuts": {"top_k": 4, "min_p": 0.05, "temperature": 1.0},
    "biases": {"logit_bias": {str(i): 1.5 for i in range(250)}, "temperature": 0.9},
    "a ban": {"logit_bias": {"97": -100}},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": -0.5, "repetition_penalty": 1.3},
    "one member": {"ensemble": {"members": ["alpha"]}, "temperature": 0},
    "weights": {"ensemble": {"weights": {"alpha": 0.1, "beta": 0.9}}, "temperature": 0},
    "another fusion": {"ensemble": {"fusion": "union"}, "temperature": 0.6},
}
_SAID = {"messages": [{"role": "user", "content": "a bad é"}]}
_CHATS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "choices": {"n": 3, "temperature": 1.0},
    "logprobs": {"logprobs": True, "top_logprobs": 4},
    "a schema": {"response_format": _JSON, "temperature": 0, "max_tokens": 60},
    "a sampled schema": {"response_format": _JSON, "temperature": 1.0, "max_tokens": 60},
    "any object": {"response_format": {"type": "json_object"}, "max_tokens": 60},
}


def body(model: str, fields: dict[str, Any], stream: bool) -> dict[str, Any]:
    stream_options = {"stream_options": {"include_usage": True}} if stream else {}
    return {"model": model, "max_tokens": 30, "seed": 11, "stream": stream} | stream_options | fields


def told(client: TestClient, path: str, asked: dict[str, Any]) -> tuple[Any, ...]:
    """Each choice's text, end and reports put together, and the usage."""
    answer = client.post(path, json=asked)
    assert answer.status_code == 200, answer.text
    if not asked["stream"]:
        events = [answer.json()]
    else:
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        events = [json.loads(line) for line in lines]
    parts: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        for choice in event["choices"]:
            parts.setdefault(choice["index"], []).append(choice)
    usage = [event["usage"] for event in events if event.get("usage")]
    return [whole(parts[index]) for index in sorted(parts)], usage[-1]


def whole(parts: list[dict[str, Any]]) -> tuple[Any, ...]:
    spoken = [part.get("delta") or part.get("message") or {"content": part.get("text")} for part in parts]
    text = "".join(each.get("content") or "" for each in spoken)
    ends = [part["finish_reason"] for part in parts if part.get("finish_reason")]
    reports = [rounded(part["logprobs"]) for part in parts if part.get("logprobs")]
    return text, ends, joined(reports)


def rounded(value: Any) -> Any:
    """Numbers as far as float32 has them."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def joined(reports: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Reports of a stream's events as one."""
    keys = dict.fromkeys(key for report in reports for key in report)
    return {key: [each for report in reports for each in report.get(key) or []] for key in keys}


@pytest.fixture(scope="module")
def in_lockstep() -> dict[str, tuple[Any, ...]]:
    """What lockstep told, by what was asked."""
    return {}


# Whole answers and streams are put together from the same outputs, so one mode shows both.
@pytest.mark.parametrize(("mode", "stream"), [*((mode, True) for mode in MODES), ("verify", False)])
@pytest.mark.parametrize(
    "case",
    [*(("completions", name) for name in _TEXTS), *(("chat/completions", name) for name in _CHATS)],
    ids=" ".join,
)
def test_an_answer_is_what_lockstep_makes_of_it(
    client: TestClient, in_lockstep: dict[str, tuple[Any, ...]], mode: str, stream: bool, case: tuple[str, str]
) -> None:
    path, name = case
    fields = {"prompt": "deed 中文 bad"} | _TEXTS[name] if path == "completions" else _SAID | _CHATS[name]
    stream = stream and "best_of" not in fields  # the best of several is not known before its end
    key = f"{path} {name} {stream}"
    if key not in in_lockstep:
        in_lockstep[key] = told(client, f"/v1/{path}", body("lockstep", fields, stream))
    assert told(client, f"/v1/{path}", body(mode, fields, stream)) == in_lockstep[key]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lost", ["beta", "gamma"])
def test_a_member_that_fails_is_dropped_and_named(
    client: TestClient, members: Members, mode: str, lost: str
) -> None:
    asked = {"prompt": "deed 中文 bad", "temperature": 0.8, "ensemble": {"trace": True}}
    members[lost].breaks = MemberError(lost, "told to fail")
    try:
        answers = [told(client, "/v1/completions", body(model, asked, True)) for model in (mode, "lockstep")]
    finally:
        members[lost].breaks = None
    assert answers[0] == answers[1]
    assert answers[0][1]["dropped_members"] == {lost: "exception"}


def test_nothing_is_left_behind(members: Members) -> None:
    """Runs last in this file."""
    assert all(member.is_empty for member in members.values())
