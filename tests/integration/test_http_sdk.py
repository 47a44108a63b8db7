"""OpenAI's own client, sync and async, over every endpoint of a real server on a loopback port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_runtime import FakeRuntime, live_server

from ensemble_core.decoding.forms import TextForm
from ensemble_core.errors import NotReadyError, QueueFullError
from ensemble_core.server_config import ServerConfig

TEXT = " Hello wörld 😀!"
MESSAGES: Any = [{"role": "user", "content": "a b c"}]
USAGE = {"include_usage": True}


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def base(runtime: FakeRuntime) -> Iterator[str]:
    with live_server(runtime, ServerConfig(drain_seconds=0.2)) as base:
        yield base


@pytest.fixture
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        yield client


def run(base: str, work: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    """What some work with the async client gives."""

    async def inside() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
            return await work(client)

    return asyncio.run(inside())


async def listed(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


def test_completions(client: openai.OpenAI, base: str) -> None:
    fields: Any = {"model": "duo", "prompt": [3, 4], "echo": True, "logprobs": 2, "n": 2, "best_of": 3, "seed": 1}

    async def work(client: openai.AsyncOpenAI) -> Any:
        return await client.completions.create(**fields)

    first, second = client.completions.create(**fields), run(base, work)
    for answer in (first, second):
        assert [choice.text for choice in answer.choices] == [" t3 t4" + TEXT] * 2
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 12
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.token_logprobs[0] is None
        assert logprobs.text_offset == [0, 3, 6, 12, 18, 20]
        assert logprobs.top_logprobs is not None
        for token, value, top in list(
            zip(logprobs.tokens or [], logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
        )[1:]:
            assert top[token] == value
    assert first.choices == second.choices


def test_completion_streams(client: openai.OpenAI, base: str) -> None:
    fields: Any = {"model": "duo", "prompt": "p q", "stream": True, "stream_options": USAGE, "logprobs": 1}

    async def work(client: openai.AsyncOpenAI) -> list[Any]:
        return await listed(await client.completions.create(**fields))

    for chunks in (list(client.completions.create(**fields)), run(base, work)):
        *texts, last = chunks
        assert "".join(chunk.choices[0].text for chunk in texts) == TEXT
        offsets = [offset for chunk in texts for offset in chunk.choices[0].logprobs.text_offset]
        assert offsets == [0, 6, 12, 14]
        assert all(chunk.usage is None for chunk in texts)
        assert (last.choices, last.usage.prompt_tokens, last.usage.completion_tokens) == ([], 2, 4)


def test_chat(client: openai.OpenAI, base: str) -> None:
    fields: Any = {"model": "duo", "messages": MESSAGES, "n": 2, "logprobs": True, "top_logprobs": 1}

    async def work(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.create(**fields)

    for answer in (client.chat.completions.create(**fields), run(base, work)):
        assert [choice.message.content for choice in answer.choices] == [TEXT] * 2
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].logprobs is not None
        tokens = answer.choices[0].logprobs.content
        assert tokens is not None
        assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == TEXT


def test_chat_streams(client: openai.OpenAI, base: str) -> None:
    fields: Any = {"model": "duo", "messages": MESSAGES, "stream": True, "stream_options": USAGE}

    async def work(client: openai.AsyncOpenAI) -> list[Any]:
        return await listed(await client.chat.completions.create(**fields))

    for chunks in (list(client.chat.completions.create(**fields)), run(base, work)):
        *texts, last = chunks
        assert texts[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content for chunk in texts) == TEXT
        assert texts[-1].choices[0].finish_reason == "stop"
        assert (last.choices, last.usage.completion_tokens) == ([], 4)


def test_the_sdks_own_stream_helper_adds_the_pieces_up(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="duo", messages=MESSAGES) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == TEXT
        assert stream.get_final_completion().choices[0].message.content == TEXT


def test_structured_answers_through_the_sdk(client: openai.OpenAI, runtime: FakeRuntime) -> None:
    runtime.script = ('{"a"', ": 5}")
    wanted: Any = {
        "type": "json_schema",
        "json_schema": {"name": "x", "strict": True, "schema": {"type": "object"}},
    }
    answer = client.chat.completions.create(model="duo", messages=MESSAGES, response_format=wanted)
    assert answer.choices[0].message.content == '{"a": 5}'
    assert runtime.seen[0].params.form == TextForm("json", '{"type":"object"}')


def test_our_extension_goes_through_extra_body(client: openai.OpenAI, runtime: FakeRuntime) -> None:
    extra = {"ensemble": {"members": ["a"], "trace": True}, "top_k": 5, "return_token_ids": True}
    answer = client.completions.create(model="duo", prompt="p", extra_body=extra)
    told: Any = answer.choices[0]
    assert told.trace[0]["members"]["a"][0] == {"token": " Hello", "prob": 0.5}
    assert told.token_ids == [0, 1, 2, 3]
    assert len(told.prompt_token_ids) == 1
    assert (runtime.seen[0].overrides.members, runtime.seen[0].params.top_k) == (("a",), 5)


def test_models(client: openai.OpenAI, base: str) -> None:
    async def work(client: openai.AsyncOpenAI) -> list[str]:
        return [model.id async for model in client.models.list()]

    assert [model.id for model in client.models.list()] == run(base, work) == ["duo", "a", "b"]
    assert client.models.retrieve("a").id == "a"


def test_the_tokenizer_routes_through_the_sdks_own_transport(base: str) -> None:
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
        found = client.post("/tokenize", body={"model": "a", "prompt": "p q"}, cast_to=httpx.Response).json()
        assert found["count"] == 3
        text = client.post("/detokenize", body={"tokens": [7]}, cast_to=httpx.Response).json()
        assert text == {"prompt": " t7"}
        info = client.get("/tokenizer_info?model=b", cast_to=httpx.Response).json()
        assert info["name"] == "b"


WRONG: list[tuple[dict[str, Any], Exception | None, type[openai.APIStatusError]]] = [
    ({"temperature": 3}, None, openai.BadRequestError),
    ({"model": "nope"}, None, openai.NotFoundError),
    ({}, QueueFullError("full"), openai.RateLimitError),
    ({}, NotReadyError("loading"), openai.InternalServerError),
    ({}, RuntimeError("a bug"), openai.InternalServerError),
]


@pytest.mark.parametrize(("fields", "refuse", "error"), WRONG)
def test_refusals_are_the_sdks_own_error_classes(
    client: openai.OpenAI,
    base: str,
    runtime: FakeRuntime,
    fields: dict[str, Any],
    refuse: Exception | None,
    error: type[openai.APIStatusError],
) -> None:
    runtime.refuse = refuse
    body = {"model": "duo", "messages": MESSAGES, "max_tokens": 5} | fields
    with pytest.raises(error) as caught:
        client.chat.completions.create(**body)
    assert caught.value.request_id
    if "temperature" in fields:
        assert caught.value.param == "temperature"

    async def work(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.create(**body)

    with pytest.raises(error):
        run(base, work)


def test_a_failure_inside_a_stream_is_raised(client: openai.OpenAI, runtime: FakeRuntime) -> None:
    runtime.breaks = NotReadyError("stopping")
    with pytest.raises(openai.APIError, match="stopping"):
        list(client.chat.completions.create(model="duo", messages=MESSAGES, stream=True))


def test_the_sdk_comes_back_after_the_seconds_that_a_429_names(base: str, runtime: FakeRuntime) -> None:
    runtime.refuse_once = [QueueFullError("full")]
    started = time.monotonic()
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=1) as client:
        assert client.completions.create(model="duo", prompt="p").choices[0].text == TEXT
    assert time.monotonic() - started >= 1.0  # the SDK's own first wait is at most half a second


def test_the_sdk_comes_back_after_the_seconds_that_a_503_names(base: str, runtime: FakeRuntime) -> None:
    runtime.refuse_once = [NotReadyError("loading")]

    async def work(_client: openai.AsyncOpenAI) -> Any:
        return await _client.with_options(max_retries=1).completions.create(model="duo", prompt="p")

    started = time.monotonic()
    assert run(base, work).choices[0].text == TEXT
    assert time.monotonic() - started >= 5.0
