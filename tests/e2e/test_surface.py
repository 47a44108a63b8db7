"""The rest of OpenAI's surface on the demo pair: chat, log-probabilities, constraints, tokenizers."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "inhabitants": {"type": "integer", "maximum": 99999999},
    },
    "required": ["city", "inhabitants"],
    "additionalProperties": False,
}


@pytest.fixture
def client(server_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server_url}/v1", api_key="unused", max_retries=0)


def test_chat_answers_through_each_members_template(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="duet-smollm2",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_completion_tokens=16,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert "Paris" in str(answer.choices[0].message.content)
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert len(entries) == answer.usage.completion_tokens  # type: ignore[union-attr]
    assert all(len(entry.top_logprobs) >= 2 and entry.logprob <= 0 for entry in entries)


def test_a_chat_stream_joins_to_the_whole(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "duet-smollm2",
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 10,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**request).choices[0].message.content
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


@pytest.mark.parametrize("mode", ["lockstep", "verify"])
def test_a_prompt_of_control_tokens_alone_is_answered(client: openai.OpenAI, mode: str) -> None:
    """2 is Gemma's BOS."""
    for model in ("duet", "gemma3"):
        extra = {"ensemble": {"mode": mode}} if model == "duet" else {}
        answer = client.completions.create(model=model, prompt=[2], max_tokens=4, temperature=0, extra_body=extra)
        assert answer.choices[0].finish_reason in ("length", "stop")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 1


def test_a_window_of_mains_whole_context_is_scored(client: openai.OpenAI) -> None:
    """As lm-evaluation-harness sends them. The assistant spells the same text in more tokens than it can hold."""
    ids = httpx.post(
        f"{client.base_url}".removesuffix("/v1/") + "/tokenize",
        json={"model": "duet", "prompt": "Ω≈ç√∫˜µ≤≥÷ 日本語 " * 400, "add_special_tokens": False},
    ).json()["tokens"]
    window = ids[:2047]
    answer = client.completions.create(
        model="duet", prompt=[window], max_tokens=1, temperature=0, echo=True, logprobs=1, timeout=300
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert len(choice.logprobs.token_logprobs or []) == 2048
    assert answer.usage is not None
    assert answer.usage.dropped_members == {"smollm2": "full"}  # type: ignore[attr-defined]


def test_a_schema_is_kept_by_the_ensemble(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="duet-smollm2",
        messages=[{"role": "user", "content": "Name a city and its inhabitants as JSON."}],
        max_tokens=80,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
    )
    assert answer.choices[0].finish_reason == "stop"
    parsed = json.loads(str(answer.choices[0].message.content))
    assert isinstance(parsed["city"], str)
    assert isinstance(parsed["inhabitants"], int)


@pytest.mark.parametrize("model", ["duet", "duet-smollm2"])
def test_patterns_and_choices_are_kept_by_the_ensemble(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {
        "model": model,
        "prompt": "The capital of France is",
        "max_tokens": 24,
        "temperature": 0.7,
    }
    dated = client.completions.create(**asked, extra_body={"structured_outputs": {"regex": "[0-9]{4}-[0-9]{2}"}})
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", dated.choices[0].text)
    cities = ["Paris", "Łódź", "New York"]
    chosen = list(client.completions.create(**asked, stream=True, extra_body={"guided_choice": cities}))
    assert "".join(chunk.choices[0].text for chunk in chosen) in cities
    assert chosen[-1].choices[0].finish_reason == "stop"
    bad = client.completions.create(**asked | {"temperature": 0}, extra_body={"bad_words": ["Paris", "the"]})
    assert "Paris" not in bad.choices[0].text


def test_echoed_logprobs_are_parallel_and_cover_prompt_and_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="duet", prompt="The capital of France is", max_tokens=3, temperature=0, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    lists = choice.logprobs
    assert lists is not None
    assert choice.text.startswith("The capital of France is")
    tokens, numbers, offsets = lists.tokens or [], lists.token_logprobs or [], lists.text_offset or []
    assert len(tokens) == len(numbers) == len(offsets) == answer.usage.total_tokens  # type: ignore[union-attr]
    assert numbers[0] is None
    assert all(choice.text[at:].startswith(token) for token, at in zip(tokens[1:], offsets[1:], strict=True))
    for number, top in list(zip(numbers, lists.top_logprobs or [], strict=True))[1:]:
        assert number in top.values()


def test_ids_are_taken_as_they_are(server_url: str, client: openai.OpenAI) -> None:
    sent = {"model": "gemma3", "prompt": "The capital of France is", "add_special_tokens": False}
    ids = httpx.post(f"{server_url}/tokenize", json=sent).json()["tokens"]
    answer = client.completions.create(
        model="gemma3", prompt=[ids, ids[:3]], max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    first, second = (choice.logprobs for choice in answer.choices)
    assert first is not None
    assert second is not None
    assert [len(first.tokens or []), len(second.tokens or [])] == [len(ids) + 1, 4]
    back = httpx.post(f"{server_url}/detokenize", json={"model": "gemma3", "tokens": ids}).json()
    assert back["prompt"] == "The capital of France is"


def test_n_choices_of_a_seed_are_reproducible(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "duet",
        "prompt": "My favourite animal is",
        "max_tokens": 8,
        "n": 3,
        "seed": 5,
    }
    first = [choice.text for choice in client.completions.create(**request).choices]
    again = [choice.text for choice in client.completions.create(**request).choices]
    assert first == again
    assert len(set(first)) > 1


def test_a_trace_names_every_member(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="duet",
        prompt="One, two, three,",
        max_tokens=3,
        temperature=0,
        extra_body={"ensemble": {"trace": True}},
    )
    trace = answer.choices[0].model_extra["trace"]  # type: ignore[index]
    assert len(trace) == 3
    assert set(trace[0]["members"]) == {"gemma3", "smollm2"}
    assert all(0 <= proposal["prob"] <= 1 for proposal in trace[0]["fused"])


def test_an_invalid_schema_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(
            model="duet",
            messages=[{"role": "user", "content": "x"}],
            response_format={"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": 7}}},
        )
