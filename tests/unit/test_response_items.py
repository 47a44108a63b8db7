"""What a body of /v1/responses becomes: messages, tools, a form, parameters; and what it is refused for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_runtime import FakeTokenized
from pydantic import ValidationError

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.requests import Conversation
from ensemble_core.errors import InvalidRequestError
from ensemble_core.text.tools import Tool, ToolUse
from ensemble_core.text.variables import TemplateVariables
from server.api.responses import ResponseJob, fitted, plan, response_words, to_conversation
from server.schema.responses import ResponseRequest

USER = {"role": "user", "content": "How warm?"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}', "id": "fc_1"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "21"}
REASONING = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True}

JSON_OBJECT = {"format": {"type": "json_object"}}


def body_of(sent: Any = "Hi!", **fields: Any) -> ResponseRequest:
    return ResponseRequest.model_validate({"model": "duo", "input": sent} | fields)


def planned(body: ResponseRequest) -> ResponseJob:
    return plan(body, to_conversation(body), 5 if body.max_output_tokens is None else body.max_output_tokens)


def messages_of(sent: Any, **fields: Any) -> list[dict[str, Any]]:
    return [dict(message) for message in to_conversation(body_of(sent, **fields)).messages]


def called(*names: str, content: str = "") -> dict[str, Any]:
    """The assistant's turn with calls c1, c2, ..."""
    calls = [
        {"id": f"c{rank}", "type": "function", "function": {"name": name, "arguments": {"a": 1}}}
        for rank, name in enumerate(names, 1)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def returned(call_id: str = "c1", name: str = "f", content: str = "21") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id, "name": name}


def test_a_text_is_one_message_of_the_user() -> None:
    assert messages_of("Hi!") == [{"role": "user", "content": "Hi!"}]
    assert messages_of("Hi!", instructions="Be brief.")[0] == {"role": "system", "content": "Be brief."}


def test_messages_come_in_every_form() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    own = {"type": "output_text", "text": "Well,", "annotations": [], "logprobs": []}
    sent = [
        {"role": "user", "content": parts},
        {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [own]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "message", "role": "user", "content": "c"},
    ]
    assert messages_of(sent) == [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "Well,"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "c"},
    ]


def test_system_messages_at_the_beginning_are_one() -> None:
    sent = [{"role": "developer", "content": "b"}, {"role": "system", "content": "c"}, USER]
    assert messages_of(sent, instructions="a") == [{"role": "system", "content": "a\n\nb\n\nc"}, USER]
    later = [USER, {"role": "developer", "content": "b"}]
    assert messages_of(later) == [USER, {"role": "system", "content": "b"}]


def test_calls_belong_to_the_turn_that_they_follow() -> None:
    text = {"role": "assistant", "content": "Let me see."}
    second = CALL | {"call_id": "c2"}
    assert messages_of([USER, text, CALL, second, RESULT]) == [
        USER,
        called("f", "f", content="Let me see."),
        returned(),
    ]
    assert messages_of([USER, CALL, text, RESULT])[1] == called("f", content="Let me see.")
    assert messages_of([USER, CALL, RESULT, second])[1:3] == [called("f"), returned()]


def thought(*texts: str, **fields: Any) -> dict[str, Any]:
    return REASONING | {"content": [{"type": "reasoning_text", "text": each} for each in texts]} | fields


def test_reasoning_belongs_to_the_turn_that_comes_next() -> None:
    own = dict.fromkeys(("reasoning", "reasoning_content"), "Hm.\nOslo.")
    text = {"role": "assistant", "content": "21."}
    sent = [USER, thought("Hm.", "Oslo."), CALL, RESULT, thought("Hm.", "Oslo."), text]
    assert messages_of(sent) == [USER, called("f") | own, returned(), text | own]
    again = messages_of([USER, text, thought("Hm.", "Oslo."), CALL, RESULT])
    assert again == [USER, text, called("f") | own, returned()]


def test_reasoning_that_cannot_be_read_is_left_out() -> None:
    assert messages_of([USER, REASONING, CALL, RESULT]) == [USER, called("f"), returned()]
    assert messages_of([USER, thought("Hm."), USER]) == [USER, USER]
    with pytest.raises(InvalidRequestError, match="no message") as caught:
        messages_of([REASONING])
    assert caught.value.param == "input"


def test_effort_goes_to_the_templates() -> None:
    assert to_conversation(body_of(reasoning={"effort": "low"})).variables == TemplateVariables(effort="low")
    assert to_conversation(body_of(reasoning={})).variables == TemplateVariables()


def test_what_a_call_returned_may_be_parts() -> None:
    parts = [{"type": "input_text", "text": "21"}, {"type": "input_text", "text": "degrees"}]
    assert messages_of([USER, CALL, RESULT | {"output": parts}])[2] == returned(content="21\ndegrees")


def test_a_result_needs_its_call() -> None:
    with pytest.raises(InvalidRequestError, match=r"^input\.1\.call_id: 'c9'") as caught:
        messages_of([USER, RESULT | {"call_id": "c9"}])
    assert caught.value.param == "input.1.call_id"


@pytest.mark.parametrize(
    ("item", "path", "words"),
    [
        ({"role": "user"}, "content", "required"),
        ({"content": "x"}, "role", "required"),
        ({"role": "tool", "content": "x"}, "role", "must be user, assistant"),
        ({"role": "user", "content": []}, "content", "list of text parts"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "content", "'input_image'"),
        ({"role": "user", "content": [{"type": "input_file"}]}, "content", "'input_file'"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "content", "must be a string"),
        ({"role": "user", "content": "\ud800"}, "content", "Unicode"),
        (CALL | {"arguments": "[1]"}, "arguments", "JSON text of an object"),
        (CALL | {"name": "not a name"}, "name", "letters"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "call_id", "required"),
        ({"type": "function_call_output", "call_id": "c1"}, "output", "required"),
        (REASONING | {"content": [{"type": "output_text", "text": "x"}]}, "content", "'output_text'"),
        ({"type": "item_reference", "id": "msg_1"}, "type", "'item_reference'"),
        ({"type": "web_search_call"}, "type", "'web_search_call'"),
        ({"type": ["message"]}, "type", "not supported"),
    ],
)
def test_items_that_are_none(item: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        body_of([USER, item])
    assert caught.value.errors()[0]["loc"] == ("input", 1, path)


def test_tools_in_the_flat_form() -> None:
    use = to_conversation(body_of(tools=[TOOL | {"description": "warmth"}], parallel_tool_calls=False)).tools
    assert use == ToolUse((Tool("f", "warmth", '{"type": "object", "properties": {}}'),), parallel=False)
    assert to_conversation(body_of(tool_choice="auto")).tools is None


@pytest.mark.parametrize(
    ("choice", "mode", "allowed"),
    [
        ("none", "none", None),
        ("required", "required", None),
        ({"type": "function", "name": "g"}, "required", ("g",)),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            "auto",
            ("f",),
        ),
    ],
)
def test_choices_of_tools(choice: Any, mode: str, allowed: tuple[str, ...] | None) -> None:
    body = body_of(tools=[TOOL, TOOL | {"name": "g"}], tool_choice=choice)
    use = to_conversation(body).tools
    assert use is not None
    assert (use.choice, use.allowed) == (mode, allowed)
    assert body.tool_choice is not None
    assert body.tool_choice.told() == choice


@pytest.mark.parametrize(
    "kind",
    [
        "web_search", "web_search_preview", "file_search", "computer", "computer_use_preview", "code_interpreter",
        "mcp", "image_generation", "local_shell", "shell", "custom", "apply_patch", "namespace", "tool_search",
    ],
)  # fmt: skip
def test_other_kinds_of_tools_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ValidationError, match=f"tools of type '{kind}' are not served") as caught:
        body_of(tools=[TOOL, {"type": kind, "name": "x"}])
    assert caught.value.errors()[0]["loc"] == ("tools", 1, "type")
    with pytest.raises(ValidationError, match=f"'{kind}' is not served") as caught:
        body_of(tools=[TOOL], tool_choice={"type": kind})
    assert caught.value.errors()[0]["loc"] == ("tool_choice", "type")


@pytest.mark.parametrize("name", ["async", "defer_loading"])
def test_tools_that_would_work_another_way_are_refused(name: str) -> None:
    body_of(tools=[TOOL | {name: False, "allowed_callers": ["direct"]}])
    with pytest.raises(ValidationError, match="is not supported") as caught:
        body_of(tools=[TOOL | {name: True}])
    assert caught.value.errors()[0]["loc"] == ("tools", 0, name)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL, TOOL]}, "tools.1.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "g"}],
                },
            },
            "tool_choice.tools.0.name",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"temperature": 3}, "temperature"),
        ({"text": JSON_OBJECT, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
    ],
)  # fmt: skip
def test_refusals_have_this_endpoints_names(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught, response_words():
        planned(body_of(**fields))
    assert caught.value.param == param
    assert param in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("text", {"verbosity": "low"}, "text.verbosity"),
        ("text", {"format": {"type": "json_schema", "name": "x"}}, "text.format"),
        ("text", {"format": {"type": "grammar"}}, "text.format.type"),
        ("reasoning", {"effort": "much"}, "reasoning.effort"),
        ("reasoning", {"summary": "detailed"}, "reasoning.summary"),
        ("include", ["file_search_call.results"], "include"),
        ("metadata", {"a": 1}, "metadata"),
        ("metadata", {str(rank): "" for rank in range(17)}, "metadata"),
        ("metadata", {"a": "x" * 513}, "metadata"),
        ("truncation", "middle", "truncation"),
    ],
)
def test_values_that_are_refused(name: str, value: Any, path: str) -> None:
    with pytest.raises(ValidationError) as caught:
        body_of(**{name: value})
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == path


def test_what_coding_agents_send_is_taken() -> None:
    """Fields that change nothing here, beside those that are served."""
    body = body_of(
        [{"role": "developer", "content": "Be brief."}, USER],
        instructions="You code.",
        tools=[TOOL],
        tool_choice="auto",
        parallel_tool_calls=False,
        reasoning=None,
        store=False,
        stream=True,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="session",
        text={"verbosity": "medium"},
    )
    job = plan(body, to_conversation(body), 5)
    assert job.ticket.requests[0].params.logprobs is None


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (None, None),
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "json_object"}}, TextForm("json")),
        (
            {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": {"type": "object"}}},
            TextForm("json", '{"type":"object"}'),
        ),
    ],
)
def test_forms_of_text(text: Any, form: TextForm | None) -> None:
    body = body_of(text=text)
    assert plan(body, to_conversation(body), 5).ticket.requests[0].params.form == form


def fit(body: ResponseRequest, most: int = 100, each: int = 10) -> tuple[list[str], int, int]:
    """The contents that are left, the limit, and how often tokens were counted; a message has `each` tokens."""
    num = 0

    async def measure(prompt: Conversation) -> Any:
        nonlocal num
        num += 1
        return FakeTokenized((0,) * each * len(prompt.messages), (), most)

    prompt, limit = asyncio.run(fitted(body, measure))
    return [message["content"] for message in prompt.messages], limit, num


def turns(num: int) -> list[dict[str, Any]]:
    """Questions q0, q1, ..., each with an answer but the last."""
    pairs = [
        [{"role": "user", "content": f"q{rank}"}, {"role": "assistant", "content": f"a{rank}"}]
        for rank in range(num)
    ]
    return [item for pair in pairs for item in pair][:-1]


def test_without_a_limit_the_answer_may_fill_the_context() -> None:
    assert fit(body_of(turns(2))) == (["q0", "a0", "q1"], 70, 1)
    assert fit(body_of(turns(2), max_output_tokens=5)) == (["q0", "a0", "q1"], 5, 0)
    with pytest.raises(InvalidRequestError) as caught, response_words():
        fit(body_of(turns(6)))
    assert caught.value.param == "input"


def test_auto_leaves_out_the_oldest_turns_and_keeps_the_instructions() -> None:
    kept, limit, num = fit(body_of(turns(40), truncation="auto", instructions="s"))
    assert kept == ["s", "q37", "a37", "q38", "a38", "q39"]  # 60 tokens; a quarter of 100 is left
    assert limit == 40
    assert num <= 8
    kept, limit, _ = fit(body_of(turns(40), truncation="auto", max_output_tokens=60))
    assert (kept, limit) == (["q38", "a38", "q39"], 60)
    assert fit(body_of(turns(2), truncation="auto"))[0] == ["q0", "a0", "q1"]


def test_auto_keeps_the_last_turn_whole() -> None:
    """A conversation can only begin with a turn of the user, and what was called is left out with its call."""
    with pytest.raises(InvalidRequestError), response_words():
        fit(body_of([USER, *[CALL, RESULT] * 10], truncation="auto"))
    sent = [USER, CALL, {"role": "user", "content": "And?"}, RESULT]
    assert fit(body_of(sent, truncation="auto"), most=30)[0] == ["And?"]
