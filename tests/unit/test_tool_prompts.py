"""Tools in prompts: by a member's own template where it knows them, else in plain messages."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny_models import byte_level
from tool_cases import ARGS_TOOLS, BARE, CHATML_TOOLS, LLAMA_TOOLS, MISTRAL_TOOLS, WEATHER

from ensemble_core.errors import InvalidRequestError
from ensemble_core.text.call_forms import PLAIN
from ensemble_core.text.plain_tools import introduction, plain_messages
from ensemble_core.text.prompt import PromptEncoder
from ensemble_core.text.tools import Tool, ToolUse

TOKENIZER = byte_level(400, "<eos>", ("<|im_start|>", "<|im_end|>"))
USE = ToolUse((Tool("get_weather", "Tells the weather.", json.dumps(WEATHER)), Tool("now")))
CALL = {
    "id": "call_0123456789abcdef01234567",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Łódź"}},
}
ASKED = {"role": "user", "content": "Is it warm?"}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    ASKED,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "21 C", "tool_call_id": CALL["id"], "name": "get_weather"},
]


def read(template: str | None, messages: list[dict[str, Any]], tools: ToolUse | None = USE) -> str:
    text: str = TOKENIZER.decode(PromptEncoder("m", TOKENIZER, template).encode_chat(messages, tools=tools))
    return text


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (CHATML_TOOLS, "hermes"),
        (CHATML_TOOLS.replace("<tool_call>\n", "<tool_call>").replace("\n</tool", "</tool"), "hermes, one line"),
        (LLAMA_TOOLS, "llama"),
        (MISTRAL_TOOLS, "mistral, list"),
        (MISTRAL_TOOLS.replace("[TOOL_CALLS] [", "[TOOL_CALLS]["), "mistral, tight list"),
        (ARGS_TOOLS, "mistral"),
    ],
)
def test_a_members_form_is_read_off_its_template(template: str, form: str) -> None:
    encoder = PromptEncoder("m", TOKENIZER, template)
    assert encoder.call_form.name == form
    text = read(template, TURNS[1:])
    assert "Tells the weather." in text
    assert encoder.call_form.begun("get_weather", {"city": "Łódź"}) in text
    assert "21 C" in text


@pytest.mark.parametrize(
    "template",
    [
        None,
        BARE,
        CHATML_TOOLS.replace("tool_call>", "function>"),
        CHATML_TOOLS.replace("tool | tojson", "1"),
        CHATML_TOOLS.replace("{{ m.content }}\n</tool", "\n</tool"),
        "{{ 1 // 0 }}",
    ],
    ids=["none", "bare", "unknown form", "shows no tools", "shows no results", "fails"],
)
def test_else_the_form_is_the_plain_one(template: str | None) -> None:
    assert PromptEncoder("m", TOKENIZER, template).call_form is PLAIN


def test_the_plain_messages() -> None:
    assert read(BARE, TURNS) == (
        f"<|im_start|>system\nBe short.\n\n{introduction(USE)}<|im_end|>\n"
        "<|im_start|>user\nIs it warm?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n21 C\n</tool_response><|im_end|>\n"
    )
    assert read(None, [ASKED]) == f"system: {introduction(USE)}\nuser: Is it warm?\nassistant:"


def test_the_introduction_describes_every_tool_and_shows_a_call() -> None:
    words = introduction(USE)
    described = [
        json.loads(line) for line in words.splitlines() if line.startswith('{"name": ') and "the name" not in line
    ]
    assert [each["name"] for each in described] == ["get_weather", "now"]
    assert described[0]["parameters"] == WEATHER
    assert described[1]["description"] == ""
    assert PLAIN.write([("the name", {"an argument": "its value"})]) in words


def test_results_and_what_the_user_says_after_them_are_one_message() -> None:
    """Many templates want turns of user and assistant to alternate."""
    second = TURNS[3] | {"content": "wet"}
    turns = plain_messages([*TURNS, second, ASKED, {"role": "assistant", "content": "Yes."}, ASKED], None)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert turns[3]["content"] == (
        "<tool_response>\n21 C\n</tool_response>\n<tool_response>\nwet\n</tool_response>\nIs it warm?"
    )
    assert plain_messages([ASKED, ASKED], None) == [ASKED, ASKED]


def test_content_beside_calls_stays() -> None:
    spoken = TURNS[2] | {"content": "Let me look."}
    assert plain_messages([spoken], None)[0]["content"].startswith("Let me look.\n<tool_call>\n")


def test_a_template_without_system_messages_gets_the_tools_in_the_question() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + BARE
    assert read(strict, [ASKED]) == f"<|im_start|>user\n{introduction(USE)}\n\nIs it warm?<|im_end|>\n"
    with pytest.raises(InvalidRequestError, match="no system"):
        read(strict, TURNS)
    assert plain_messages(TURNS, USE, system=False)[1]["content"].endswith("\n\nIs it warm?")


def test_messages_without_tools_are_read_as_before() -> None:
    assert read(BARE, [ASKED], None) == "<|im_start|>user\nIs it warm?<|im_end|>\n"
    assert read(CHATML_TOOLS, [ASKED], None).startswith("<|im_start|>user\nIs it warm?")


def test_the_template_sees_short_ids_that_belong_together() -> None:
    """Mistral's own templates take nine characters and no more."""
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.id }} {% endfor %}"
        "{{ m.tool_call_id }}{% endfor %}"
    )
    text = read(MISTRAL_TOOLS + template, TURNS[1:])
    ids = text.rpartition("[/TOOL_RESULTS]")[2].split()
    assert len(ids) == 2
    assert ids[0] == ids[1]
    assert ids[0].isalnum()
    assert len(ids[0]) == 9


def test_what_a_template_refuses_is_told() -> None:
    both = TURNS[2] | {"tool_calls": [CALL, CALL]}
    with pytest.raises(InvalidRequestError, match="member 'm' refuses them: single calls only") as caught:
        read(LLAMA_TOOLS, [ASKED, both])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("message", [{"role": "tool"}, {"content": "x", "tool_calls": [CALL]}])
def test_a_message_without_role_or_content_is_told(message: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="message 0 has no"):
        read(BARE, [message])
