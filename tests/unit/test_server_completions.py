from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable
from typing import Any

import pytest
from fake_runtime import FakeRuntime, outputs_of
from pydantic import ValidationError

from ensemble_core.decoding.requests import Alternative, Output, Overrides, TokenLogprob, Weighting
from ensemble_core.decoding.sampling_params import MAX_SEED, SamplingParams
from ensemble_core.errors import InvalidRequestError, NotReadyError
from server.api.completions import CompletionJob, best, plan, to_logprobs
from server.edge.errors import RequestFailedError
from server.schema.completions import CompletionRequest, TextCompletion


def job_of(max_choices: int = 128, **fields: Any) -> CompletionJob:
    return plan(CompletionRequest.model_validate({"model": "duo", "prompt": "a b c"} | fields), max_choices)


def run(job: CompletionJob, runtime: FakeRuntime) -> list[TextCompletion]:
    async def collect() -> list[TextCompletion]:
        return [chunk async for chunk in job.chunks(await runtime.submit(job.ticket.requests))]  # type: ignore[arg-type,misc]

    return asyncio.run(collect())


def answer(job: CompletionJob, runtime: FakeRuntime) -> TextCompletion:
    async def collect() -> TextCompletion:
        return await job.answer(await runtime.submit(job.ticket.requests))  # type: ignore[arg-type,return-value]

    return asyncio.run(collect())


def test_defaults() -> None:
    (request,) = job_of().ticket.requests
    assert request.params == SamplingParams()
    assert request.params.max_tokens == 16
    assert request.overrides == Overrides()


def test_requests_run_prompt_by_prompt() -> None:
    job = job_of(prompt=["p", "q"], n=3)
    assert [request.prompt for request in job.ticket.requests] == ["p"] * 3 + ["q"] * 3
    assert [request.request_id for request in job.ticket.requests] == [f"{job.ticket.id}-{i}" for i in range(6)]
    assert job.ticket.id.startswith("cmpl-")


def test_choice_i_of_each_prompt_draws_with_seed_plus_i() -> None:
    job = job_of(prompt=["p", "q"], n=3, seed=7, temperature=0.5, top_p=0.9, stop=["x"], max_tokens=5)
    assert [request.params.seed for request in job.ticket.requests] == [7, 8, 9, 7, 8, 9]
    assert {request.params.temperature for request in job.ticket.requests} == {0.5}
    assert {request.params.stop for request in job.ticket.requests} == {("x",)}


def test_the_largest_seed_wraps() -> None:
    seeds = [request.params.seed for request in job_of(n=2, seed=MAX_SEED).ticket.requests]
    assert seeds == [MAX_SEED, -MAX_SEED - 1]


@pytest.mark.parametrize("seed", [-1, -2, 0, -MAX_SEED - 1, MAX_SEED, MAX_SEED - 1])
@pytest.mark.parametrize("counts", [{"n": 5}, {"n": 2, "best_of": 5}])
def test_every_choice_has_a_seed_of_its_own(seed: int, counts: dict[str, int]) -> None:
    """Negative ones and those around the ends too. Choice i draws as the only choice of a request with seed + i."""
    seeds = [request.params.seed for request in job_of(seed=seed, **counts).ticket.requests]
    assert len(set(seeds)) == 5
    lone = [seed + i if seed + i <= MAX_SEED else seed + i - 2**64 for i in range(5)]
    assert seeds == lone
    assert [job_of(seed=each).ticket.requests[0].params.seed for each in lone] == lone


def test_without_a_seed_no_choice_has_one() -> None:
    assert [request.params.seed for request in job_of(n=2).ticket.requests] == [None, None]


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
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"n": 1, "best_of": 0}, "best_of"),
        ({"prompt": ["a"] * 64, "best_of": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
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
    assert job.ticket.requests[0].overrides == Overrides(("a", "b"), weights, "relative", {"steps": 3}, "lockstep")


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (None, None),
        ("fixed", Weighting("fixed")),
        ("perplexity", Weighting("perplexity")),
        ({"by": "perplexity", "tau": 0.5}, Weighting("perplexity", 0.5)),
    ],
)
def test_weighting_is_named_or_spelt_out(sent: object, expected: Weighting | None) -> None:
    assert job_of(ensemble={"weighting": sent}).ticket.requests[0].overrides.weighting == expected


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
    both = {"include_usage": True, "continuous_usage_stats": True}
    running = run(job_of(stream=True, stream_options=both), FakeRuntime())
    assert [chunk.usage and chunk.usage.completion_tokens for chunk in running] == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("final", [{}, {"include_usage": False}, {"include_usage": None}])
def test_running_usage_comes_only_with_final_usage(final: dict[str, Any]) -> None:
    """As in vLLM."""
    options = final | {"continuous_usage_stats": True}
    chunks = run(job_of(stream=True, stream_options=options), FakeRuntime())
    assert len(chunks) == 4
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_outputs_that_say_nothing_are_not_sent() -> None:
    runtime = FakeRuntime(script=["", "a", "", "b", ""])
    assert [chunk.choices[0].text for chunk in run(job_of(stream=True), runtime)] == ["a", "b", ""]
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert len(run(job_of(stream=True, stream_options=options), runtime)) == 6


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
    assert runtime.aborted == [f"{job.ticket.id}-1"]


def test_an_engine_that_ends_too_early_is_an_error() -> None:
    runtime = FakeRuntime(outputs={"p": [Output("a", (1,), 1, 1)]})
    with pytest.raises(RequestFailedError, match="before all choices were done"):
        answer(job_of(prompt="p"), runtime)


def test_closing_the_stream_aborts() -> None:
    runtime = FakeRuntime()
    job = job_of(stream=True)

    async def leave() -> None:
        outputs = await runtime.submit(job.ticket.requests)
        stream = job.chunks(outputs)  # type: ignore[arg-type]
        await anext(stream)
        await stream.aclose()
        assert runtime.aborted == [f"{job.ticket.id}-0"]

    asyncio.run(leave())


def test_every_parameter_reaches_the_engine() -> None:
    job = job_of(
        prompt=[5, 6],
        max_tokens=0,
        echo=True,
        logprobs=3,
        top_k=7,
        top_p=0.5,
        min_p=0.25,
        min_tokens=0,
        ignore_eos=True,
        stop_token_ids=[1, 2],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={"7": -100, "8": 2.5},
        add_special_tokens=False,
        ensemble={"trace": True},
    )
    (request,) = job.ticket.requests
    assert request.prompt == (5, 6)
    assert (request.add_special_tokens, request.trace) == (False, True)
    assert request.params == SamplingParams(
        max_tokens=0,
        echo=True,
        logprobs=3,
        top_k=7,
        top_p=0.5,
        min_p=0.25,
        ignore_eos=True,
        stop_token_ids=(1, 2),
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.5,
        logit_bias=((7, -100.0), (8, 2.5)),
    )


@pytest.mark.parametrize("top_k", [-1, 0])
def test_both_ways_to_switch_top_k_off(top_k: int) -> None:
    assert job_of(top_k=top_k).ticket.requests[0].params.top_k == 0


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [(1, 2)]), ([[1, 2], [3]], [(1, 2), (3,)])],
)
def test_text_and_ids_one_and_many(prompt: object, prompts: list[object]) -> None:
    assert [request.prompt for request in job_of(prompt=prompt).ticket.requests] == prompts


def test_choices_of_one_prompt_share_its_group() -> None:
    job = job_of(prompt=["p", "q"], n=2)
    groups = [request.group for request in job.ticket.requests]
    assert groups == [f"{job.ticket.id}-0"] * 2 + [f"{job.ticket.id}-1"] * 2


def logprobs_of(answer: TextCompletion) -> list[Any]:
    return [choice.logprobs for choice in answer.choices]


def test_logprobs_are_parallel_lists_with_the_token_among_its_alternatives() -> None:
    (found,) = logprobs_of(answer(job_of(logprobs=2), FakeRuntime()))
    assert found.tokens == [" Hello", " wörld", " 😀", "!"]
    assert found.text_offset == [0, 6, 12, 14]
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == logprob  # the identical float


def test_echo_puts_the_prompt_first_and_its_first_token_has_no_logprob() -> None:
    whole = answer(job_of(echo=True, logprobs=0, prompt="a b"), FakeRuntime())
    (choice,) = whole.choices
    assert choice.text == "a b Hello wörld 😀!"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens[:3] == ["a", " b", " Hello"]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.text_offset[:3] == [0, 1, 3]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 4


def test_echo_alone_answers_with_the_prompt() -> None:
    whole = answer(job_of(echo=True, max_tokens=0, logprobs=1, prompt=[[3, 4], [5]]), FakeRuntime())
    assert [choice.text for choice in whole.choices] == [" t3 t4", " t5"]
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    assert [len(found.tokens) for found in logprobs_of(whole)] == [2, 1]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 0)


EXTRAS = {"echo": True, "logprobs": 3, "return_token_ids": True, "ensemble": {"trace": True}}


def joined(parts: Iterable[list[Any] | None]) -> list[Any]:
    return [item for part in parts for item in part or []]


def test_a_stream_and_the_whole_answer_tell_the_same() -> None:
    fields = EXTRAS | {"prompt": ["a b", "c"], "n": 2, "seed": 3}
    streamed = run(job_of(**fields, stream=True), FakeRuntime())
    whole = answer(job_of(**fields), FakeRuntime())
    for choice in whole.choices:
        pieces = [piece for chunk in streamed for piece in chunk.choices if piece.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert pieces[0].prompt_token_ids == choice.prompt_token_ids
        assert all(piece.prompt_token_ids is None for piece in pieces[1:])
        assert joined(piece.token_ids for piece in pieces) == choice.token_ids == [0, 1, 2, 3]
        assert joined(piece.trace for piece in pieces) == choice.trace
        assert choice.logprobs is not None
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [getattr(piece.logprobs, name) for piece in pieces]
            assert joined(parts) == getattr(choice.logprobs, name)


def test_tokens_whose_text_is_held_back_still_tell_their_logprobs() -> None:
    runtime = FakeRuntime(script=["a", "", "b"])
    streamed = run(job_of(stream=True, logprobs=0), runtime)
    assert [len(chunk.choices[0].logprobs.tokens) for chunk in streamed if chunk.choices[0].logprobs] == [1, 1, 1]


def test_what_was_not_asked_for_is_left_out_or_null() -> None:
    (choice,) = answer(job_of(), FakeRuntime()).choices
    told = {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    nulls = {"token_ids", "prompt_token_ids", "prompt_logprobs"}
    assert choice.model_fields_set == told | nulls
    assert choice.logprobs is None
    assert all(getattr(choice, name) is None for name in nulls)


def test_a_trace_tells_what_the_members_proposed() -> None:
    (choice,) = answer(job_of(ensemble={"trace": True}), FakeRuntime()).choices
    assert choice.trace is not None
    assert [step.token for step in choice.trace] == [" Hello", " wörld", " 😀", "!"]
    step = choice.trace[0].model_dump()
    assert step["members"]["b"] == [{"token": "y", "prob": 0.75}]
    assert step["fused"] == [{"token": " Hello", "prob": 0.375}]
    assert (step["agreed"], step["consulted"]) == ({"b": False}, True)


def test_best_of_keeps_the_likeliest_and_counts_all() -> None:
    runtime = FakeRuntime()
    whole = answer(job_of(prompt=["p", "q"], n=2, best_of=5, seed=1), runtime)
    assert [request.params.logprobs for request in runtime.seen] == [0] * 10
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [choice.logprobs for choice in whole.choices] == [None] * 4
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (2, 40)
    all_of_them = answer(job_of(prompt=["p", "q"], n=5, seed=1, logprobs=0), FakeRuntime())
    means = sorted((sum(found.token_logprobs) / 4 for found in logprobs_of(all_of_them)[:5]), reverse=True)
    kept = answer(job_of(prompt=["p", "q"], n=2, best_of=5, seed=1, logprobs=0), FakeRuntime())
    assert [sum(found.token_logprobs) / 4 for found in logprobs_of(kept)] == means[:2] * 2


def test_best_of_n_is_no_contest() -> None:
    runtime = FakeRuntime()
    answer(job_of(n=2, best_of=2), runtime)
    assert [request.params.logprobs for request in runtime.seen] == [None, None]
    run(job_of(n=2, best_of=2, stream=True), runtime)


def test_a_choice_without_tokens_comes_last() -> None:
    empty = Output("", (), 1, 0, "stop")
    (told,) = [Output("x", (1,), 1, 1, "stop", logprobs=(TokenLogprob(1, b"x", -9.0, 0),))]
    assert best([empty, told], 1) == [told]


def test_of_two_alternatives_with_one_text_the_likelier_counts() -> None:
    top = (Alternative(2, b"x", -0.5), Alternative(1, b"x", -2.0), Alternative(3, b"y", -3.0))
    token = TokenLogprob(1, b"x", -2.0, 0, top)
    assert to_logprobs([token]).top_logprobs == [{"x": -0.5, "y": -3.0}]


def test_what_json_cannot_spell_is_floored() -> None:
    token = TokenLogprob(1, b"x", -math.inf, 0, (Alternative(1, b"x", -math.inf),))
    found = to_logprobs([token])
    assert found.token_logprobs == [-9999.0]
    assert found.top_logprobs == [{"x": -9999.0}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_watched_where_it_is_streamed(stream: bool) -> None:
    (request,) = job_of(stream=stream).ticket.requests
    assert request.watched is stream


def test_prompt_logprobs_have_vllms_form() -> None:
    (choice,) = answer(job_of(prompt="a b c", prompt_logprobs=2), FakeRuntime()).choices
    assert (choice.text, choice.logprobs) == (" Hello wörld 😀!", None)
    assert choice.prompt_logprobs is not None
    first, second, third = choice.prompt_logprobs
    assert first is None
    assert second is not None
    assert [(told.rank, told.decoded_token) for told in second.values()] == [(1, " b"), (2, "alt1")]
    assert third is not None
    assert len(third) == 2
    sent = json.loads(choice.model_dump_json(exclude_unset=True))["prompt_logprobs"]
    assert set(sent[1][str(next(iter(second)))]) == {"logprob", "rank", "decoded_token"}


def test_prompt_logprobs_beside_an_echo_change_neither() -> None:
    both = answer(job_of(prompt="a b c", echo=True, logprobs=1, prompt_logprobs=3), FakeRuntime()).choices[0]
    echo = answer(job_of(prompt="a b c", echo=True, logprobs=1), FakeRuntime()).choices[0]
    assert both.logprobs == echo.logprobs
    assert both.prompt_logprobs is not None
    assert [len(told or {}) for told in both.prompt_logprobs] == [0, 3, 3]
    (none,) = answer(job_of(prompt="a b c", prompt_logprobs=0), FakeRuntime()).choices
    assert [len(told or {}) for told in none.prompt_logprobs or []] == [0, 1, 1]


def test_prompt_logprobs_are_not_streamed() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        job_of(stream=True, prompt_logprobs=1)
    assert caught.value.param == "prompt_logprobs"


def test_tokens_may_be_named_by_their_ids() -> None:
    plain, named = (
        answer(job_of(logprobs=2, return_tokens_as_token_ids=flag), FakeRuntime()).choices[0].logprobs
        for flag in (False, True)
    )
    assert plain is not None
    assert named is not None
    assert named.tokens == ["token_id:0", "token_id:1", "token_id:2", "token_id:3"]
    assert named.token_logprobs == plain.token_logprobs
    for told in named.top_logprobs:
        assert told is not None
        assert all(name.startswith("token_id:") for name in told)


@pytest.mark.parametrize(("most", "fine"), [(1, True), (-1, True), (0, False), (-2, False), (2**31, False)])
def test_how_far_a_prompt_is_cut(most: int, fine: bool) -> None:
    if fine:
        assert [each.truncate for each in job_of(truncate_prompt_tokens=most).ticket.requests] == [most]
        return
    with pytest.raises((InvalidRequestError, ValidationError), match="truncate_prompt_tokens"):
        job_of(truncate_prompt_tokens=most)
