from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_runtime import FakeRuntime
from fakes import byte_vocabulary
from tiny_models import byte_level, metaspace

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.logprobs import Scored, describe_token
from ensemble_core.decoding.requests import Alternative, Conversation, TokenLogprob
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import InvalidRequestError
from ensemble_core.text.alignment import Track
from ensemble_core.text.vocabulary import Vocabulary, from_tokenizer
from server.api.chat import (
    ChatJob,
    chat_words,
    conversation,
    length_limit,
    plan,
    room_left,
    to_chat_token,
)
from server.schema.chat import ChatChunk, ChatCompletion, ChatRequest

USER = {"role": "user", "content": "hi there"}
BEGUN = {"role": "assistant", "content": "Well,"}
BASE: dict[str, Any] = {"model": "duo", "messages": [USER]}


def body_of(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate(BASE | fields)


def job_of(max_choices: int = 8, **fields: Any) -> ChatJob:
    body = body_of(**fields)
    return plan(body, conversation(body), length_limit(body) or 99, max_choices)


def run(job: ChatJob, runtime: FakeRuntime) -> list[ChatChunk]:
    async def collect() -> list[Any]:
        return [chunk async for chunk in job.chunks(await runtime.submit(job.ticket.requests))]  # type: ignore[arg-type]

    return asyncio.run(collect())


def answer(job: ChatJob, runtime: FakeRuntime) -> ChatCompletion:
    async def collect() -> Any:
        return await job.answer(await runtime.submit(job.ticket.requests))  # type: ignore[arg-type]

    return asyncio.run(collect())  # type: ignore[no-any-return]


def test_a_conversation_with_defaults() -> None:
    (request,) = job_of().ticket.requests
    assert request.prompt == Conversation((USER,))
    assert request.params == SamplingParams(max_tokens=99)
    assert request.request_id.startswith("chatcmpl-")


def test_every_parameter_reaches_the_engine() -> None:
    fields = {
        "max_completion_tokens": 7,
        "logprobs": True,
        "top_logprobs": 5,
        "response_format": {"type": "json_object"},
        "stop": ["x"],
        "seed": 4,
        "top_k": 3,
        "logit_bias": {"9": 1},
        "ensemble": {"trace": True, "members": ["a"]},
    }
    first, second = job_of(n=2, **fields).ticket.requests
    assert first.params == SamplingParams(
        max_tokens=7, logprobs=5, form=TextForm("json"), stop=("x",), seed=4, top_k=3, logit_bias=((9, 1.0),)
    )
    assert (first.trace, first.overrides.members) == (True, ("a",))
    assert (second.params.seed, second.group) == (5, first.group)


def test_it_goes_on_from_the_last_message() -> None:
    body = body_of(messages=[USER, BEGUN], continue_final_message=True, add_generation_prompt=False)
    assert conversation(body) == Conversation((USER, BEGUN), continue_final=True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "continue_final_message"),
    ],
)
def test_flags_that_contradict_each_other_or_the_messages(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        conversation(body_of(**fields))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 6, "max_completion_tokens": 6}, 6),
    ],
)
def test_the_length_limit_has_two_names(fields: dict[str, Any], limit: int | None) -> None:
    assert length_limit(body_of(**fields)) == limit


def test_two_length_limits_are_one_too_many() -> None:
    with pytest.raises(InvalidRequestError, match="send one of them, got 5 and 6"):
        length_limit(body_of(max_tokens=5, max_completion_tokens=6))


def test_without_a_limit_the_context_is_it() -> None:
    assert room_left(10, 512) == 502
    with pytest.raises(InvalidRequestError, match="have 512") as caught:
        room_left(512, 512)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("sent", "param", "named"),
    [
        ({}, "prompt", "messages"),
        ({"max_completion_tokens": 5}, "max_tokens", "max_completion_tokens"),
        ({"max_tokens": 5}, "max_tokens", "max_tokens"),
        ({}, "stop", "stop"),
    ],
)
def test_the_engines_refusals_name_the_fields_of_this_endpoint(
    sent: dict[str, Any], param: str, named: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught, chat_words(body_of(**sent)):
        raise InvalidRequestError(f"{param} is wrong", param)
    assert caught.value.param == named
    assert str(caught.value) == f"{named} is wrong"


def test_the_engines_own_words_stay_where_they_do_not_begin_with_the_field() -> None:
    with pytest.raises(InvalidRequestError, match=r"^the prompt has 600") as caught, chat_words(body_of()):
        raise InvalidRequestError("the prompt has 600 tokens", "prompt")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
def test_out_of_bounds(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        job_of(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, ""),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": True}}, "{}"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}, '{"type":"object"}'),
    ],
)
def test_response_formats(value: object, text: str | None) -> None:
    form = body_of(response_format=value).form
    assert form == (None if text is None else TextForm("json", text))
    assert form is None or form.field == "response_format"


@pytest.mark.parametrize("schema", [{"minimum": float("nan")}, {"enum": ["x" * 70_000]}])
def test_schemas_that_cannot_be_read(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        job_of(response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    assert caught.value.param == "response_format"


def test_the_first_piece_of_each_choice_says_who_speaks() -> None:
    chunks = run(job_of(n=2, stream=True), FakeRuntime(script=["", " a", "b"]))
    for index in range(2):
        pieces = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [piece.delta.model_dump(exclude_unset=True) for piece in pieces] == [
            {"role": "assistant", "content": " a"},
            {"content": "b"},
        ]
        assert [piece.finish_reason for piece in pieces] == [None, "stop"]


def test_a_stream_and_the_whole_answer_tell_the_same() -> None:
    fields: dict[str, Any] = {
        "n": 2,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "return_token_ids": True,
        "ensemble": {"trace": True},
    }
    chunks = run(job_of(**fields, stream=True), FakeRuntime())
    whole = answer(job_of(**fields), FakeRuntime())
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    for choice in whole.choices:
        pieces = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
        assert "".join(piece.delta.content for piece in pieces) == choice.message.content
        assert [piece.token_ids for piece in pieces] == [[token_id] for token_id in choice.token_ids or []]
        assert [piece.trace for piece in pieces] == [[step] for step in choice.trace or []]
        assert choice.logprobs is not None
        told = [token for piece in pieces if piece.logprobs for token in piece.logprobs.content]
        assert told == choice.logprobs.content
        assert len(told) == 4


def test_usage_chunks() -> None:
    *texts, last = run(job_of(stream=True, stream_options={"include_usage": True}), FakeRuntime())
    assert all(json.loads(chunk.model_dump_json(exclude_unset=True))["usage"] is None for chunk in texts)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 4


def test_what_was_not_asked_for_is_left_out_or_null() -> None:
    whole = answer(job_of(), FakeRuntime())
    (choice,) = whole.choices
    assert choice.logprobs is choice.token_ids is None
    assert choice.model_fields_set == {"index", "message", "logprobs", "finish_reason", "stop_reason", "token_ids"}
    assert whole.prompt_token_ids is whole.prompt_logprobs is None
    assert {"prompt_token_ids", "prompt_logprobs"} <= whole.model_fields_set


def test_a_token_has_its_bytes_and_the_likeliest_alternatives() -> None:
    top = (Alternative(1, "é".encode(), -3.0), Alternative(2, b"b", -0.5), Alternative(3, b"c", -1.0))
    token = TokenLogprob(1, "é".encode(), -3.0, 0, top)
    told = to_chat_token(token, 2).model_dump()
    assert told == {
        "token": "é",
        "logprob": -3.0,
        "bytes": [0xC3, 0xA9],
        "top_logprobs": [
            {"token": "b", "logprob": -0.5, "bytes": [98]},
            {"token": "c", "logprob": -1.0, "bytes": [99]},
        ],
    }
    assert to_chat_token(token, 0).top_logprobs == []


VOCABULARIES: dict[str, Callable[[], Vocabulary]] = {
    "bytes": byte_vocabulary,
    "byte level": lambda: from_tokenizer(byte_level(397, "<eos>", ("<|im_end|>",)), 400, [0], "m"),
    "metaspace": lambda: from_tokenizer(metaspace(477), 480, [2], "m"),
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_the_bytes_of_tokens_that_split_a_character_join_to_it(kind: str) -> None:
    vocabulary, text = VOCABULARIES[kind](), "é中😀👩‍👩‍👧"
    track = Track(vocabulary, [])
    ids = vocabulary.encode(text)
    described = [describe_token(track, i, Scored(-1.0, ((i, -1.0), (ids[0], -2.0))), 0) for i in ids]
    told = [to_chat_token(each, 2) for each in described]
    assert b"".join(bytes(each.bytes or []) for each in told).decode() == text
    assert any(each.token.startswith("bytes:\\x") for each in told), "no character is split"
    for each, token_id in zip(told, ids, strict=True):
        assert each.token == vocabulary.name_of(token_id)
        assert [bytes(top.bytes or []) for top in each.top_logprobs] == [
            vocabulary.tokens[token_id],
            vocabulary.tokens[ids[0]],
        ]


def test_prompt_logprobs_of_a_conversation() -> None:
    whole = answer(job_of(prompt_logprobs=1), FakeRuntime())
    assert whole.prompt_logprobs is not None
    assert whole.prompt_logprobs[0] is None
    assert all(told and len(told) == 1 for told in whole.prompt_logprobs[1:])


def test_ids_as_names_keep_the_bytes() -> None:
    token = TokenLogprob(
        7, "é".encode(), -3.0, 0, (Alternative(7, "é".encode(), -3.0), Alternative(2, b"b", -4.0))
    )
    told = to_chat_token(token, 2, as_ids=True)
    assert (told.token, told.bytes) == ("token_id:7", [0xC3, 0xA9])
    assert [each.token for each in told.top_logprobs] == ["token_id:7", "token_id:2"]


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_the_bytes_of_control_tokens_are_those_of_their_names(kind: str) -> None:
    """And ids that no token has, have none."""
    vocabulary = VOCABULARIES[kind]()
    for token_id in vocabulary.special_ids | vocabulary.stop_ids:
        told = to_chat_token(describe_token(Track(vocabulary, []), token_id, Scored(-1.0), 0), 0)
        assert bytes(told.bytes or []) == vocabulary.tokens[token_id] == told.token.encode()
