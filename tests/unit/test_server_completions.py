from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_runtime import FakeRuntime, outputs_of

from ensemble_core.decoding.requests import Output, Overrides
from ensemble_core.decoding.sampling_params import MAX_SEED, SamplingParams
from ensemble_core.errors import InvalidRequestError, NotReadyError
from server.completions import Job, chunks, fold, plan
from server.errors import RequestFailedError
from server.schemas import Completion, CompletionRequest


def job_of(max_choices: int = 128, **fields: Any) -> Job:
    return plan(CompletionRequest.model_validate({"model": "duo", "prompt": "a b c"} | fields), max_choices)


def run(job: Job, runtime: FakeRuntime) -> list[Completion]:
    async def collect() -> list[Completion]:
        return [chunk async for chunk in chunks(job, await runtime.submit(job.requests))]

    return asyncio.run(collect())


def answer(job: Job, runtime: FakeRuntime) -> Completion:
    async def collect() -> Completion:
        return await fold(job, chunks(job, await runtime.submit(job.requests)))

    return asyncio.run(collect())


def test_defaults() -> None:
    (request,) = job_of().requests
    assert request.params == SamplingParams()
    assert request.params.max_tokens == 16
    assert request.overrides == Overrides()


def test_requests_run_prompt_by_prompt() -> None:
    job = job_of(prompt=["p", "q"], n=3)
    assert [request.prompt for request in job.requests] == ["p"] * 3 + ["q"] * 3
    assert [request.request_id for request in job.requests] == [f"{job.id}-{i}" for i in range(6)]
    assert job.id.startswith("cmpl-")


def test_choice_i_of_each_prompt_draws_with_seed_plus_i() -> None:
    job = job_of(prompt=["p", "q"], n=3, seed=7, temperature=0.5, top_p=0.9, stop=["x"], max_tokens=5)
    assert [request.params.seed for request in job.requests] == [7, 8, 9, 7, 8, 9]
    assert {request.params.temperature for request in job.requests} == {0.5}
    assert {request.params.stop for request in job.requests} == {("x",)}


def test_the_largest_seed_wraps() -> None:
    seeds = [request.params.seed for request in job_of(n=2, seed=MAX_SEED).requests]
    assert seeds == [MAX_SEED, -MAX_SEED - 1]


def test_without_a_seed_no_choice_has_one() -> None:
    assert [request.params.seed for request in job_of(n=2).requests] == [None, None]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 129}, "n"),
        ({"n": 10**18}, "n"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"seed": MAX_SEED + 1}, "seed"),
    ],
)
def test_out_of_bounds(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        job_of(**fields)
    assert caught.value.param == param


def test_overrides() -> None:
    fusion = {"name": "relative", "options": {"steps": 3}}
    weights = {"a": 1, "b": 0.5}
    job = job_of(ensemble={"members": ["a", "b"], "weights": weights, "fusion": fusion, "mode": "lockstep"})
    assert job.requests[0].overrides == Overrides(("a", "b"), weights, "relative", {"steps": 3}, "lockstep")


@pytest.mark.parametrize("options", [{}, {"include_usage": True}, {"continuous_usage_stats": True}])
def test_the_answer_is_the_fold_of_the_stream(options: dict[str, bool]) -> None:
    fields = {"prompt": ["a b", "c"], "n": 2}
    streamed = run(job_of(**fields, stream=True, stream_options=options), FakeRuntime())
    whole = answer(job_of(**fields), FakeRuntime())
    for choice in whole.choices:
        pieces = [piece for chunk in streamed for piece in chunk.choices if piece.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text == " Hello wörld 😀!"
        assert [piece.finish_reason for piece in pieces] == [None, None, None, "stop"]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]


def test_usage_counts_a_prompt_once_and_every_choice() -> None:
    usage = answer(job_of(prompt=["a b", "c"], n=2), FakeRuntime()).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 16, 19)


def test_chunks_have_a_usage_field_only_where_it_was_asked_for() -> None:
    plain = run(job_of(stream=True), FakeRuntime())
    assert all("usage" not in chunk.model_fields_set for chunk in plain)
    final = run(job_of(stream=True, stream_options={"include_usage": True}), FakeRuntime())
    assert [chunk.usage is None for chunk in final] == [True, True, True, True, False]
    assert [len(chunk.choices) for chunk in final] == [1, 1, 1, 1, 0]
    assert all("usage" in chunk.model_fields_set for chunk in final)
    running = run(job_of(stream=True, stream_options={"continuous_usage_stats": True}), FakeRuntime())
    assert [chunk.usage and chunk.usage.completion_tokens for chunk in running] == [1, 2, 3, 4]


def test_outputs_that_say_nothing_are_not_sent() -> None:
    runtime = FakeRuntime(script=["", "a", "", "b", ""])
    assert [chunk.choices[0].text for chunk in run(job_of(stream=True), runtime)] == ["a", "b", ""]
    options = {"continuous_usage_stats": True}
    assert len(run(job_of(stream=True, stream_options=options), runtime)) == 5


def test_the_stop_string_is_told() -> None:
    runtime = FakeRuntime(outputs={"p": [Output("a", (1,), 1, 1), Output("b", (2,), 1, 2, "stop", "END")]})
    (choice,) = answer(job_of(prompt="p"), runtime).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("ab", "stop", "END")


@pytest.mark.parametrize(
    ("last", "error", "words"),
    [
        (Output("", (), 1, 1, "error", error="member 'b' ran dry"), RequestFailedError, "member 'b' ran dry"),
        (Output("", (), 1, 1, "abort"), NotReadyError, "stopping"),
    ],
)
def test_a_choice_that_fails_fails_the_job_and_aborts_the_others(
    last: Output, error: type[Exception], words: str
) -> None:
    long = outputs_of(["x"] * 9, "q")
    runtime = FakeRuntime(outputs={"p": [Output("a", (1,), 1, 1), last], "q": long})
    job = job_of(prompt=["p", "q"], stream=True)
    with pytest.raises(error, match=words):
        run(job, runtime)
    assert runtime.aborted == [f"{job.id}-1"]


def test_an_engine_that_ends_too_early_is_an_error() -> None:
    runtime = FakeRuntime(outputs={"p": [Output("a", (1,), 1, 1)]})
    with pytest.raises(RequestFailedError, match="before all choices were done"):
        answer(job_of(prompt="p"), runtime)


def test_closing_the_stream_aborts() -> None:
    runtime = FakeRuntime()
    job = job_of(stream=True)

    async def leave() -> None:
        outputs = await runtime.submit(job.requests)
        stream = chunks(job, outputs)
        await anext(stream)
        await stream.aclose()
        assert runtime.aborted == [f"{job.id}-0"]

    asyncio.run(leave())
