"""The official OpenAI SDK and plain HTTP against a real server process with the demo pair."""

from __future__ import annotations

import asyncio
import json
import re
import time

import httpx
import openai
import pytest

TRICKY = {
    "emoji": "A row of emoji: 😀🎉👩‍👩‍👧‍👦🏳️‍🌈 😀🎉👩‍👩‍👧‍👦🏳️‍🌈 😀🎉",
    "chinese": "从前有一座山，山里有一座庙，庙里有一个老和尚",
    "code": "def f(x):\n\tif x:\n\t\treturn 1\n\telse:\n\t\treturn 2\n\ndef g(x):\n\tif x:\n",
    "newlines": "one\n\n\n\ntwo\n\n\n\nthree\n\n\n\n",
}


@pytest.fixture
def client(server_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server_url}/v1", api_key="unused", max_retries=0)


@pytest.mark.parametrize("prompt", TRICKY.values(), ids=TRICKY.keys())
@pytest.mark.parametrize("model", ["duet", "duet-smollm2"])
def test_streams_whole_characters_that_join_to_the_whole_text(
    client: openai.OpenAI, model: str, prompt: str
) -> None:
    request = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0}
    # In bf16 a prompt that is read and one that is cached differ by rounding, which may turn a tie; both are cached.
    client.completions.create(**request)  # type: ignore[call-overload]
    whole = client.completions.create(**request)  # type: ignore[call-overload]
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]  # type: ignore
    assert "".join(pieces) == whole.choices[0].text
    if model == "duet":  # Gemma writes whole characters; a byte-level main may sample bytes that are none
        assert all("\ufffd" not in piece for piece in pieces[:-1])
    assert whole.usage.completion_tokens <= 24


def test_a_stream_ends_with_its_reason_and_usage(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="duet",
        prompt="Count: 1, 2, 3,",
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"


def test_stop_strings_and_several_choices(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="duet", prompt=["1 2 3 4", "a b c d"], n=2, max_tokens=20, temperature=0, stop=["7", " h"]
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all("7" not in choice.text for choice in answer.choices[:2])
    assert answer.choices[0].text == answer.choices[1].text


def test_members_and_overrides_answer_under_their_own_weights(client: openai.OpenAI) -> None:
    request = {"prompt": "The best way to learn is", "max_tokens": 16, "temperature": 0}
    duet = client.completions.create(model="duet", **request).choices[0].text
    alone = client.completions.create(model="gemma3", **request).choices[0].text
    override = {"ensemble": {"members": ["gemma3"]}}
    only = client.completions.create(model="duet", **request, extra_body=override).choices[0].text
    heavier = {"ensemble": {"weights": {"gemma3": 0.2, "smollm2": 0.8}}}
    shifted = client.completions.create(model="duet", **request, extra_body=heavier).choices[0].text
    assert only == alone
    assert shifted != alone
    assert shifted != duet


def test_sixteen_clients_at_once_all_finish_and_free_every_row(server_url: str) -> None:
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="unused", max_retries=0) as client:
            return list(await asyncio.gather(*(one(client, i) for i in range(16))))

    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        stream = await client.completions.create(
            model=["duet", "duet-smollm2", "duet-search", "smollm2"][i % 4],
            prompt=f"Story number {i}: once upon a time",
            max_tokens=8 + i,
            temperature=i % 2,
            seed=i,
            stream=True,
        )
        reasons = [chunk.choices[0].finish_reason async for chunk in stream]
        return str(reasons[-1])

    reasons = asyncio.run(all_of_them())
    assert set(reasons) <= {"stop", "length"}
    assert_rows_free(server_url)


def test_a_client_that_goes_away_frees_its_rows(server_url: str) -> None:
    body = {"model": "duet", "prompt": "A very long story:", "max_tokens": 1500, "stream": True}
    with httpx.stream("POST", f"{server_url}/v1/completions", json=body, timeout=60) as response:
        assert next(response.iter_lines()).startswith("data: ")
    assert_rows_free(server_url)
    assert metric(server_url, r'unisono_requests_total\{.*finish_reason="abort".*\} (\S+)') >= 1


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "nobody"}, 404, "model", "nobody"),
        ({"prompt": ""}, 400, "prompt", "empty"),
        ({"prompt": "x " * 5000}, 400, "prompt", "2048"),
        ({"max_tokens": 4000}, 400, "max_tokens", "2048"),
        ({"max_tokens": "many"}, 400, "max_tokens", "many"),
        ({"temperature": 3}, 400, "temperature", "2"),
        ({"top_p": 0}, 400, "top_p", "0"),
        ({"stop": ["x"] * 17}, 400, "stop", "16"),
        ({"n": 1000}, 400, "n", "128"),
        ({"suffix": "end"}, 400, "suffix", "suffix"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
        ({"ensemble": {"members": ["smollm2"]}}, 400, "ensemble.members", "gemma3"),
        ({"ensemble": {"fusion": "magic"}}, 400, "ensemble.fusion", "relative"),
        ({"ensemble": {"weights": {"gemma3": -1}}}, 400, "ensemble.weights", "-1"),
    ],
)
def test_bad_input_is_refused_by_name_and_the_server_lives_on(
    server_url: str, change: dict[str, object], status: int, param: str, words: str
) -> None:
    body = {"model": "duet", "prompt": "Hello", "max_tokens": 1} | change
    answer = httpx.post(f"{server_url}/v1/completions", json=body, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert str(error["param"]).startswith(param)
    assert words in error["message"]
    assert answer.headers["x-request-id"]
    assert httpx.get(f"{server_url}/health").status_code == 200


def test_malformed_json_is_refused(server_url: str) -> None:
    json_type = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server_url}/v1/completions", content=b'{"model": ', headers=json_type)
    assert answer.status_code == 400
    assert json.loads(answer.text)["error"]["type"] == "invalid_request_error"


def test_metrics_show_step_members_and_fusion(server_url: str, client: openai.OpenAI) -> None:
    client.completions.create(model="duet", prompt="Hello there", max_tokens=4)
    text = httpx.get(f"{server_url}/metrics").text
    for name in (
        "unisono_step_seconds_count",
        "unisono_member_forward_seconds_count",
        "unisono_fusion_seconds_count",
        "unisono_time_to_first_token_seconds_count",
        "unisono_inter_token_latency_seconds_count",
    ):
        assert name in text
    assert metric(server_url, r'unisono_fusion_seconds_count\{fusion="relative"\} (\S+)') >= 4


def metric(server_url: str, pattern: str) -> float:
    """The sum of all samples whose line matches."""
    return sum(float(value) for value in re.findall(pattern, httpx.get(f"{server_url}/metrics").text))


def assert_rows_free(server_url: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if metric(server_url, r"unisono_member_kv_usage_ratio\{.*\} (\S+)") == 0.0:
            return
        time.sleep(0.2)
    pytest.fail("some cache rows are still held")
