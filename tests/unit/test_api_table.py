"""docs/api.md has every parameter, and each row's status is what the schema does with the row's example."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import pytest
from fake_runtime import FakeTokenized
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params
from pydantic import ValidationError

from ensemble_core.decoding.requests import Conversation
from ensemble_core.errors import InvalidRequestError
from server.api import chat, completions, messages, responses
from server.api.jobs import Job
from server.schema import table
from server.schema.chat import ChatRequest
from server.schema.completions import CompletionRequest
from server.schema.messages import MessagesRequest
from server.schema.responses import ResponseRequest

DOCUMENT = table.DOCUMENT.read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| (supported|400|no effect) \| `(.+?)` \|", re.MULTILINE)
KINDS = table.TABLES

# The parameters of vLLM's completions; best_of is of its older releases.
VLLM = """
    model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
    stream_options suffix temperature top_p user use_beam_search top_k min_p repetition_penalty length_penalty
    stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
    spaces_between_special_tokens truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs
    logprob_token_ids bad_words prompt_embeds add_special_tokens response_format structured_outputs priority
    request_id return_tokens_as_token_ids return_token_ids return_token_offsets cache_salt kv_transfer_params
    ec_transfer_params vllm_xargs repetition_detection thinking_token_budget best_of watermarking session_id
    routed_experts_prompt_start return_mm_kwargs stream_interval
    """
# What vLLM's chat completions take beside those and OpenAI's.
VLLM_CHAT = """
    add_generation_prompt continue_final_message add_special_tokens documents chat_template chat_template_kwargs echo
    include_reasoning media_io_kwargs mm_processor_kwargs prompt_token_ids return_prompt_text
    """
# What vLLM's responses take beside OpenAI's.
VLLM_RESPONSES = """
    logit_bias top_k skip_special_tokens include_stop_str_in_output request_id mm_processor_kwargs priority cache_salt
    enable_response_messages previous_input_messages previous_response structured_outputs repetition_penalty seed stop
    ignore_eos vllm_xargs
    """
# The parameters of Anthropic's client, version 2.14.
ANTHROPIC = """
    max_tokens messages model cache_control container diagnostics inference_geo metadata output_config service_tier
    speed stop_sequences stream system temperature thinking tool_choice tools top_k top_p user_profile_id workspace_id
    """
TURNS = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Well,"}]
BASES: dict[str, dict[str, Any]] = {
    "completions": {"model": "duo", "prompt": "Hi!"},
    "chat": {"model": "duo", "messages": TURNS},
    "responses": {"model": "duo", "input": TURNS},
    "messages": {"model": "duo", "max_tokens": 20, "messages": TURNS},
}
TOOLS = [{"type": "function", "name": "f", "function": {"name": "f"}}]  # in both of OpenAI's forms
# What a parameter needs beside it.
COMPANIONS: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True, "include": ["message.output_text.logprobs"]},
    "add_generation_prompt": {"continue_final_message": True},
    "continue_final_message": {"add_generation_prompt": False},
    "tool_choice": {"tools": TOOLS},
    "parallel_tool_calls": {"tools": TOOLS},
}
ALONE = (
    "logprob_token_ids",
    "stream_options",
    "top_logprobs",
    "tool_choice",
    "parallel_tool_calls",
)  # whose companions can be sent without them


@dataclass(frozen=True, slots=True)
class Row:
    table: str
    name: str
    status: str
    example: Any

    @property
    def base(self) -> dict[str, Any]:
        return BASES[self.table] | (companions(self.table, self.name) if self.name in ALONE else {})


def companions(table: str, name: str) -> dict[str, Any]:
    known = KINDS[table].model_fields
    if name == "logprob_token_ids" and name in known:
        return {"logprobs": 1 if table == "completions" else True}
    if table == "messages" and name == "tool_choice":
        return {"tools": [{"name": "f", "input_schema": {}}]}
    return {key: value for key, value in COMPANIONS.get(name, {}).items() if key in known}


def rows() -> list[Row]:
    found = []
    for kind in KINDS:
        text = DOCUMENT.partition(f"<!-- {kind}: begin -->")[2].partition(f"<!-- {kind}: end -->")[0]
        lines = [line for line in text.strip().splitlines()[2:] if line]
        matches = ROW.findall(text)
        assert len(matches) == len(lines), f"{kind}: a row does not have the form of the others"
        found += [Row(kind, name, status, json.loads(example)) for name, status, example in matches]
    return found


ROWS = rows()


async def measured(prompt: Conversation) -> Any:
    return FakeTokenized((0,) * 10 * len(prompt.messages), (), 100)


def job_of(table: str, body: dict[str, Any]) -> tuple[Job, bool]:
    """The job that a body asks for, and whether its answer is a stream."""
    if table == "completions":
        completion = CompletionRequest.model_validate(body)
        return completions.plan(completion, 128), bool(completion.stream)
    if table == "responses":
        asked = ResponseRequest.model_validate(body)
        prompt, limit = asyncio.run(responses.fitted(asked, measured))
        return responses.plan(asked, prompt, limit), bool(asked.stream)
    if table == "messages":
        said = MessagesRequest.model_validate(body)
        return messages.plan(said), bool(said.stream)
    talk = ChatRequest.model_validate(body)
    return chat.plan(talk, chat.conversation(talk), chat.length_limit(talk) or 100, 128), bool(talk.stream)


def effect(table: str, body: dict[str, Any]) -> object:
    """All that a body can change: what the engine is asked for, and what the answer carries."""
    job, stream = job_of(table, body)
    ticket = job.ticket
    requests = [replace(request, request_id="", group=None) for request in ticket.requests]
    told = {
        name: value for name, value in vars(job).items() if name not in ("ticket", "wire", "_writer", "_content")
    }
    if "_response" in told:
        told["_response"] = told["_response"].model_copy(update={"id": "", "created_at": 0})
    counts = (ticket.num_choices, ticket.num_sampled, ticket.final_usage, ticket.running_usage)
    return requests, told, counts, stream


def test_the_tables_are_those_of_the_schemas() -> None:
    written = table.with_tables(DOCUMENT)
    assert written == DOCUMENT, "docs/api.md is out of date: run `python -m server.schema.table`"
    assert table.with_tables(DOCUMENT.replace("| supported |", "| 400 |")) == written


@pytest.mark.parametrize("table", KINDS)
def test_the_table_and_the_schema_name_the_same_parameters(table: str) -> None:
    names = [row.name for row in ROWS if row.table == table]
    assert len(names) == len(set(names))
    kind = KINDS[table]
    assert set(names) == kind.model_fields.keys() | kind.refused.keys() | kind.ignored.keys()


def test_no_parameter_of_the_sdk_or_of_vllm_is_left_out() -> None:
    of_completions = {row.name for row in ROWS if row.table == "completions"}
    of_chat = {row.name for row in ROWS if row.table == "chat"}
    assert set(get_type_hints(completion_params.CompletionCreateParamsBase)) | set(VLLM.split()) <= of_completions
    of_vllm = set(VLLM.split()) - {"prompt", "suffix", "prompt_embeds"} | set(VLLM_CHAT.split())
    assert set(get_type_hints(chat_params.CompletionCreateParamsBase)) | of_vllm <= of_chat
    of_responses = {row.name for row in ROWS if row.table == "responses"}
    assert (
        set(get_type_hints(response_params.ResponseCreateParamsBase)) | set(VLLM_RESPONSES.split()) <= of_responses
    )
    assert set(ANTHROPIC.split()) <= {row.name for row in ROWS if row.table == "messages"}


@pytest.mark.parametrize("row", [row for row in ROWS if row.status == "supported"], ids=str)
def test_what_is_supported_has_an_effect(row: Row) -> None:
    body = BASES[row.table] | companions(row.table, row.name) | {row.name: row.example}
    assert row.name in KINDS[row.table].model_fields
    assert effect(row.table, body) != effect(row.table, row.base)


@pytest.mark.parametrize("row", [row for row in ROWS if row.status == "no effect"], ids=str)
def test_what_has_no_effect_has_none(row: Row) -> None:
    assert effect(row.table, row.base | {row.name: row.example}) == effect(row.table, row.base)


@pytest.mark.parametrize("row", [row for row in ROWS if row.status == "400"], ids=str)
def test_what_is_a_400_is_refused_by_name(row: Row) -> None:
    with pytest.raises((InvalidRequestError, ValidationError)) as caught:
        effect(row.table, row.base | {row.name: row.example})
    assert isinstance(caught.value, InvalidRequestError)
    assert caught.value.param == row.name


@pytest.mark.parametrize("row", [row for row in ROWS if row.status == "400"], ids=str)
def test_the_neutral_values_of_a_row_are_those_that_pass(row: Row) -> None:
    line = next(each for each in table_lines(row.table) if each.startswith(f"| `{row.name}` |"))
    told = re.findall(r"`(.+?)`", line.partition("neutral: ")[2])
    assert [json.loads(value) for value in told] == list(KINDS[row.table].refused[row.name].neutral)


def table_lines(table: str) -> list[str]:
    return DOCUMENT.partition(f"<!-- {table}: begin -->")[2].partition("<!-- ")[0].splitlines()
