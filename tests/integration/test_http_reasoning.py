"""Reasoning over HTTP: split, counted, bounded and followed by forms and calls, in every mode, over fake members."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeMember, byte_vocabulary, fake_loaded, mid_character, pair_vocabulary
from sdk_events import read_events, whole_of
from starlette.testclient import TestClient

from ensemble_core import factory
from ensemble_core.config import Config
from ensemble_core.factory import Loaded
from ensemble_core.members.base import Abilities
from ensemble_core.runtime import Runtime
from ensemble_core.server_config import ServerConfig
from ensemble_core.stats import Record
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics

NAMES = ("alpha", "beta", "opens", "limited", "plain")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.reasoning_content or '' }}{{ m.content }}\n{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}a: <t>\n{% else %}a: <t></t>{% endif %}"
)
MARKS = {"start": "<t>", "end": "</t>"}
MEMBERS = {
    "alpha": {"model": "x", "chat_template": TEMPLATE, "reasoning": MARKS},
    "beta": {"model": "x", "chat_template": "{{ messages[0].content }}:"},
    "opens": {"model": "x", "reasoning": {"start": "a", "end": "."}},  # letters that fakes like to write
    "limited": {"model": "x", "chat_template": TEMPLATE, "reasoning": MARKS},
    "plain": {"model": "x"},
    "pairs": {"model": "x"},
}
MODES: dict[str, dict[str, Any]] = {
    "lockstep": {"name": "lockstep"},
    "shared": {"name": "lockstep", "options": {"positions": "shared"}},
    "verify": {"name": "verify", "options": {"acceptance": "common"}},
    "long": {"name": "verify", "options": {"acceptance": "common", "draft": 7, "needed": "always"}},
    "relay": {"name": "verify", "options": {"acceptance": "common", "drafter": "beta", "draft": 4}},
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 23]}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
JSON_FORM = {"type": "json_schema", "json_schema": {"name": "pair", "schema": SCHEMA, "strict": True}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A client of the whole app, with an ensemble for each mode; `pairs` has other tokens in its assistant."""
    members = {
        name: FakeMember(name, byte_vocabulary(), seed=seed, max_len=1024) for seed, name in enumerate(NAMES)
    }
    members["limited"] = FakeMember("limited", byte_vocabulary(), seed=1, abilities=Abilities(16, 4, False))
    members["pairs"] = FakeMember("pairs", pair_vocabulary(), seed=9)
    base = {"members": {"alpha": 1.0, "beta": 1.0}, "main": "alpha", "fusion": {"name": "projection"}}
    ensembles = {name: base | {"mode": mode} for name, mode in MODES.items()}
    ensembles["sampled"] = base | {"mode": "sampled"}
    for name in ("lockstep", "verify"):
        ensembles[f"{name}-pairs"] = ensembles[name] | {"members": {"alpha": 1.0, "pairs": 1.0}}
    ensembles["listener"] = base | {"main": "beta"}
    councils = {
        "vote": {"kind": "vote", "models": ["plain", "alpha"]},
        "deaf": {"kind": "route", "models": ["plain", "beta"], "by": "fixed"},
    }

    def load(config: Config, record: Record) -> Loaded:
        return fake_loaded(config, members, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "load", load)
        runtime = Runtime(
            Config.model_validate(
                {
                    "members": MEMBERS,
                    "ensembles": ensembles | councils,
                    "scheduler": {"num_candidates": 32},
                }
            )
        )
        app = create_app(runtime, ServerConfig(), PrometheusMetrics())
        with TestClient(app, base_url="http://localhost") as made:
            runtime.wait_ready()
            yield made


def post(client: TestClient, model: str, **fields: Any) -> Any:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "cab"}],
        "temperature": 0,
        "max_completion_tokens": 24,
        "return_token_ids": True,
    }
    return client.post("/v1/chat/completions", json=body | fields)


def answer(client: TestClient, model: str, **fields: Any) -> dict[str, Any]:
    reply = post(client, model, **fields)
    assert reply.status_code == 200, reply.text
    whole: dict[str, Any] = reply.json()
    return whole


def streamed(client: TestClient, model: str, **fields: Any) -> dict[str, Any]:
    """The fold of a stream."""
    text = post(client, model, stream=True, stream_options={"include_usage": True}, **fields).text
    *bodies, done = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
    assert done == "[DONE]"
    chunks = [json.loads(body) for body in bodies]
    found: dict[str, Any] = {"usage": chunks[-1]["usage"], "reasoning": "", "content": "", "token_ids": []}
    for chunk in chunks[:-1]:
        delta = chunk["choices"][0]["delta"]
        assert delta.get("reasoning") == delta.get("reasoning_content")
        assert not (found["content"] and delta.get("reasoning"))
        found["reasoning"] += delta.get("reasoning") or ""
        found["content"] += delta.get("content") or ""
        found["token_ids"] += chunk["choices"][0]["token_ids"]
        found["finish_reason"] = chunk["choices"][0]["finish_reason"]
    return found


def message_of(whole: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = whole["choices"][0]["message"]
    assert message.get("reasoning") == message.get("reasoning_content")
    return message


def expected_cut(token_ids: list[int], budget: int) -> int:
    """Where the end marker begins: after the budget, but within no character."""
    while mid_character(bytes(token_ids[:budget])[-4:]):
        budget += 1
    return budget


@pytest.mark.parametrize("budget", [0, 7])
@pytest.mark.parametrize("model", [*MODES, "sampled", "alpha", "limited", "lockstep-pairs", "verify-pairs"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_the_budget_is_exact_in_every_mode(client: TestClient, model: str, budget: int, temperature: int) -> None:
    fields = {"thinking_token_budget": budget, "temperature": temperature, "seed": 5}
    whole = answer(client, model, **fields)
    (choice,) = whole["choices"]
    cut = expected_cut(choice["token_ids"], budget)
    assert bytes(choice["token_ids"][cut : cut + 4]) == b"</t>"
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": cut}
    message = message_of(whole)
    assert (message.get("reasoning") or "") == bytes(choice["token_ids"][:cut]).decode().strip()
    rest = [token_id for token_id in choice["token_ids"][cut + 4 :] if token_id < 256]
    assert message["content"] == bytes(rest).decode("utf-8", "replace").lstrip()
    told = streamed(client, model, **fields)
    assert (told["reasoning"], told["content"]) == (message.get("reasoning") or "", message["content"])
    assert told["token_ids"] == choice["token_ids"]
    assert told["usage"]["completion_tokens_details"] == {"reasoning_tokens": cut}


@pytest.mark.parametrize("fields", [{"thinking_token_budget": 9}, {"response_format": JSON_FORM}])
@pytest.mark.parametrize("model", [*MODES])
def test_every_mode_answers_what_lockstep_answers(client: TestClient, model: str, fields: Any) -> None:
    fields = fields | {"thinking_token_budget": 9, "temperature": 0.8, "seed": 3}
    found, wanted = answer(client, model, **fields), answer(client, "lockstep", **fields)
    assert found["choices"][0]["token_ids"] == wanted["choices"][0]["token_ids"]


@pytest.mark.parametrize("model", ["lockstep", "verify", "alpha"])
def test_a_budget_that_is_not_reached_changes_nothing(client: TestClient, model: str) -> None:
    free = answer(client, model)
    for budget in (-1, 24, 1000):
        assert answer(client, model, thinking_token_budget=budget)["choices"] == free["choices"]
    assert message_of(free)["content"] is None
    assert free["choices"][0]["finish_reason"] == "length"
    assert free["usage"]["completion_tokens_details"] == {"reasoning_tokens": 24}


@pytest.mark.parametrize("model", [*MODES, "alpha", "lockstep-pairs", "verify-pairs"])
def test_a_form_binds_what_follows_reasoning(client: TestClient, model: str) -> None:
    fields = {"response_format": JSON_FORM, "thinking_token_budget": 5, "max_completion_tokens": 200}
    whole = answer(client, model, **fields)
    content = json.loads(message_of(whole)["content"])
    assert set(content) == {"a", "b"}
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert message_of(whole)["reasoning"]
    assert streamed(client, model, **fields)["content"] == message_of(whole)["content"]


def test_a_form_never_lets_an_answer_end_within_reasoning(client: TestClient) -> None:
    bias = {"256": 90}  # the end of text
    cut = answer(client, "alpha", response_format=JSON_FORM, logit_bias=bias)
    assert cut["choices"][0]["finish_reason"] == "length"
    assert message_of(cut)["content"] is None
    free = answer(client, "alpha", logit_bias=bias)
    assert (free["choices"][0]["finish_reason"], message_of(free)["content"]) == ("stop", "")


@pytest.mark.parametrize("seed", range(8))
def test_an_answer_may_open_reasoning_itself_or_begin_with_the_form(client: TestClient, seed: int) -> None:
    """Member `opens` reasons from an `a` to a full stop; its JSON begins behind that, or at once."""
    for bias in ({}, {str(ord("a")): -100}):
        whole = answer(
            client,
            "opens",
            response_format=JSON_FORM,
            max_completion_tokens=150,
            temperature=1,
            seed=seed,
            logit_bias={str(ord(".")): 6, **bias},
        )
        (choice,), message = whole["choices"], message_of(whole)
        begun = choice["token_ids"][0] == ord("a")
        assert begun == (not bias)
        if choice["finish_reason"] == "stop":
            assert set(json.loads(message["content"])) == {"a", "b"}
        text = bytes(token_id for token_id in choice["token_ids"] if token_id < 256).decode("utf-8", "replace")
        if begun:
            thought, _, content = text[1:].partition(".")
            assert (message.get("reasoning") or "") == thought.strip()
            assert (message["content"] or "") == content
        else:
            assert message["content"] == text


def test_calls_come_after_reasoning(client: TestClient) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    whole = answer(client, "verify", thinking_token_budget=4, max_completion_tokens=200, **fields)
    message = message_of(whole)
    assert (whole["choices"][0]["finish_reason"], message["content"]) == ("tool_calls", None)
    assert message["reasoning"]
    assert set(json.loads(message["tool_calls"][0]["function"]["arguments"])) == {"a", "b"}
    auto = answer(client, "alpha", tools=TOOLS, thinking_token_budget=4)
    assert message_of(auto)["reasoning"]


@pytest.mark.parametrize("model", ["alpha", "lockstep", "verify", "limited"])
def test_nothing_forbids_the_forced_marker(client: TestClient, model: str) -> None:
    letters = {"allowed_token_ids": list(b"abcde")} if model != "limited" else {}
    for fields in (letters, {"bad_words": ["<", "</t>", "/"]}, {"logit_bias": {"60": -100}}, {"min_tokens": 20}):
        whole = answer(client, model, thinking_token_budget=3, **fields)
        cut = expected_cut(whole["choices"][0]["token_ids"], 3)
        assert bytes(whole["choices"][0]["token_ids"][cut : cut + 4]) == b"</t>"


def test_log_probabilities_cover_all_tokens(client: TestClient) -> None:
    whole = answer(client, "lockstep", thinking_token_budget=3, logprobs=True, top_logprobs=2)
    (choice,) = whole["choices"]
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == 24


def test_reasoning_is_left_out_where_it_is_not_wanted(client: TestClient) -> None:
    wanted = answer(client, "lockstep", thinking_token_budget=3)
    whole = answer(client, "lockstep", thinking_token_budget=3, include_reasoning=False)
    message = message_of(wanted)
    assert message_of(whole) == message | {"reasoning": None, "reasoning_content": None}
    assert whole["usage"] == wanted["usage"] | {"prompt_tokens_details": whole["usage"]["prompt_tokens_details"]}
    told = streamed(client, "lockstep", thinking_token_budget=3, include_reasoning=False)
    assert (told["reasoning"], told["content"]) == ("", message["content"])


def test_a_template_may_close_reasoning(client: TestClient) -> None:
    for fields in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "minimal"},
    ):
        whole = answer(client, "lockstep", **fields)
        assert message_of(whole)["reasoning"] is None
        assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    for fields in ({"reasoning_effort": "high"}, {"chat_template_kwargs": {"x": [1, {"y": None}]}}):
        assert answer(client, "lockstep", **fields)["choices"] == answer(client, "lockstep")["choices"]


def test_models_without_markers_have_no_reasoning(client: TestClient) -> None:
    for model in ("plain", "listener"):
        whole = answer(client, model)
        assert message_of(whole)["reasoning"] is None
        assert "completion_tokens_details" not in whole["usage"]
    assert answer(client, "plain", reasoning_effort="none", thinking_token_budget=-1)
    assert answer(client, "listener", reasoning_effort="high")  # its assistant's template knows it


def test_councils_count_the_reasoning_of_their_calls(client: TestClient) -> None:
    whole = answer(client, "vote", thinking_token_budget=3, reasoning_effort="high")
    told = {call["model"]: call["reasoning_tokens"] for call in whole["usage"]["calls"]}
    assert told["plain"] == 0
    assert told["alpha"] >= 3
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": told["alpha"]}


@pytest.mark.parametrize(
    ("model", "fields", "param", "words"),
    [
        ("plain", {"thinking_token_budget": 5}, "thinking_token_budget", "no markers"),
        ("listener", {"thinking_token_budget": 5}, "thinking_token_budget", "no markers"),
        ("deaf", {"thinking_token_budget": 5}, "thinking_token_budget", "no markers"),
        ("alpha", {"thinking_token_budget": -2}, "thinking_token_budget", "-1 to"),
        ("alpha", {"thinking_token_budget": "5"}, "thinking_token_budget", "integer"),
        ("plain", {"reasoning_effort": "high"}, "reasoning_effort", "no chat template"),
        ("deaf", {"reasoning_effort": "high"}, "reasoning_effort", "no chat template"),
        ("alpha", {"reasoning_effort": "huge"}, "reasoning_effort", "'none', 'minimal'"),
        ("alpha", {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "tools steers"),
        ("alpha", {"chat_template_kwargs": [1]}, "chat_template_kwargs", "object"),
        ("alpha", {"chat_template": "x"}, "chat_template", "templates run code"),
        ("limited", {"response_format": JSON_FORM}, "response_format", "whole distributions"),
        ("alpha", {"include_reasoning": 1}, "include_reasoning", "boolean"),
    ],
)
def test_refusals(client: TestClient, model: str, fields: dict[str, Any], param: str, words: str) -> None:
    reply = post(client, model, **fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_earlier_reasoning_goes_to_templates_that_read_it(client: TestClient) -> None:
    def count(**fields: Any) -> int:
        turn = {"role": "assistant", "content": "b"} | fields
        messages = [{"role": "user", "content": "a"}, turn, {"role": "user", "content": "c"}]
        found = client.post("/tokenize", json={"model": "alpha", "messages": messages}).json()
        assert "count" in found, found
        return int(found["count"])

    assert count(reasoning="xyz") == count(reasoning_content="xyz") == count() + 3
    assert count(reasoning="xyz", reasoning_content="xyz") == count() + 3
    assert count(content=None, reasoning="xyz") == count() + 2
    plain = {"model": "plain", "messages": [{"role": "user", "content": "a"}]}
    before = client.post("/tokenize", json=plain).json()["count"]
    plain["messages"] += [{"role": "assistant", "content": "", "reasoning": "xyz"}]  # type: ignore[operator]
    assert client.post("/tokenize", json=plain).json()["count"] == before + len("assistant: \n")


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"role": "user", "content": "a", "reasoning": "b"}, "role assistant alone"),
        ({"role": "assistant", "content": "a", "reasoning": "b", "reasoning_content": "c"}, "two names of one"),
        ({"role": "assistant", "content": "a", "reasoning": 5}, "string"),
        ({"role": "assistant", "content": None, "reasoning": ""}, "string or a list"),
    ],
)
def test_messages_with_reasoning_that_cannot_be(client: TestClient, turn: dict[str, Any], words: str) -> None:
    reply = post(client, "alpha", messages=[turn])
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


def test_an_answer_may_go_on_within_reasoning_or_behind_it(client: TestClient) -> None:
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    for content, reasons in (("<t>ab", True), ("<t>ab</t>c", False), ("ab", False)):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
        message = message_of(answer(client, "alpha", messages=messages, **flags))
        assert (message["reasoning"] is not None) == reasons


def test_templates_are_told_variables_when_tokens_are_counted(client: TestClient) -> None:
    messages = [{"role": "user", "content": "a"}]
    body = {"model": "alpha", "messages": messages}
    before = client.post("/tokenize", json=body).json()["count"]
    body["chat_template_kwargs"] = {"enable_thinking": False}
    assert client.post("/tokenize", json=body).json()["count"] == before + len("</t>") - 1


def respond(client: TestClient, model: str, **fields: Any) -> Any:
    body = {"model": model, "input": "cab", "temperature": 0, "max_output_tokens": 24}
    return client.post("/v1/responses", json=body | fields)


@pytest.mark.parametrize("model", ["lockstep", "verify", "alpha"])
def test_responses_have_the_same_reasoning(client: TestClient, model: str) -> None:
    message = message_of(answer(client, model, thinking_token_budget=5))
    whole = whole_of(respond(client, model, thinking_token_budget=5).json())
    thought, text = whole.output
    assert (thought.type, text.type) == ("reasoning", "message")
    assert thought.content[0].text == message["reasoning"]  # type: ignore[union-attr, index]
    assert whole.output_text == message["content"]
    assert whole.usage.output_tokens_details.reasoning_tokens >= 5  # type: ignore[union-attr]
    events = read_events(respond(client, model, thinking_token_budget=5, stream=True).text)
    assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]
    assert events[-1].response.output_text == whole.output_text


def test_the_effort_of_responses(client: TestClient) -> None:
    assert respond(client, "alpha", reasoning={"effort": "none"}).json()["output"][0]["type"] == "message"
    refused = respond(client, "plain", reasoning={"effort": "high"})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "reasoning.effort"
    assert error["message"].startswith("reasoning.effort: no chat template")


def test_messages_have_the_same_reasoning(client: TestClient) -> None:
    message = message_of(answer(client, "alpha", thinking_token_budget=5))
    body = {
        "model": "alpha",
        "messages": [{"role": "user", "content": "cab"}],
        "temperature": 0,
        "max_tokens": 24,
        "thinking": {"type": "enabled", "budget_tokens": 5},
    }
    told = client.post("/v1/messages", json=body).json()
    assert told["content"] == [
        {"type": "thinking", "thinking": message["reasoning"], "signature": ""},
        {"type": "text", "text": message["content"]},
    ]
    stream = client.post("/v1/messages", json=body | {"stream": True}).text
    deltas = [json.loads(line[6:])["delta"] for line in stream.splitlines() if '"thinking_delta"' in line]
    assert "".join(delta["thinking"] for delta in deltas) == message["reasoning"]
    off = client.post("/v1/messages", json=body | {"thinking": {"type": "disabled"}}).json()
    assert [block["type"] for block in off["content"]] == ["text"]
    refused = client.post("/v1/messages", json=body | {"model": "plain", "output_config": {"effort": "high"}})
    assert refused.json()["error"]["param"] in ("output_config.effort", "thinking.budget_tokens")
