"""Prompts become ids by each member's own tokenizer and template."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import byte_level, metaspace

from ensemble_core.errors import ConfigError, InvalidRequestError
from ensemble_core.text.prompt import PromptEncoder, plain_chat, read_template

BYTE_LEVEL = byte_level(400, "<eos>", ("<|im_start|>", "<|im_end|>"))
METASPACE = metaspace(420)
MESSAGES = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi 😀"}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE])
@pytest.mark.parametrize("text", ["hello world", " 中文\n\n", "a<|im_end|>b"])
def test_a_plain_prompt_is_the_tokenizers_own(tokenizer: object, text: str) -> None:
    assert PromptEncoder("m", tokenizer).encode(text) == tokenizer(text)["input_ids"]  # type: ignore[operator]


def test_an_empty_prompt_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match="'m'") as caught:
        PromptEncoder("m", BYTE_LEVEL).encode("")
    assert PromptEncoder("m", BYTE_LEVEL).tokenize("") == []
    assert caught.value.param == "prompt"


def test_a_chat_goes_through_the_template_once() -> None:
    ids = PromptEncoder("m", BYTE_LEVEL, CHATML).encode_chat(MESSAGES)
    assert BYTE_LEVEL.decode(ids) == (
        "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nhi 😀<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(BYTE_LEVEL.convert_tokens_to_ids("<|im_start|>")) == 3


def test_the_configured_template_wins_over_the_tokenizers_own() -> None:
    tokenizer = byte_level(400, "<eos>")
    tokenizer.chat_template = "own"
    assert tokenizer.decode(PromptEncoder("m", tokenizer).encode_chat(MESSAGES)) == "own"
    other = PromptEncoder("m", tokenizer, "{{ messages[1].content }}")
    assert tokenizer.decode(other.encode_chat(MESSAGES)) == "hi 😀"


def test_without_a_template_roles_become_lines() -> None:
    assert plain_chat(MESSAGES) == "system: be short\nuser: hi 😀\nassistant:"
    ids = PromptEncoder("m", METASPACE).encode_chat(MESSAGES)
    assert ids == METASPACE(plain_chat(MESSAGES))["input_ids"]


def test_what_a_template_refuses_is_the_requests_fault() -> None:
    encoder = PromptEncoder("m", BYTE_LEVEL, "{{ raise_exception('no system turns') }}")
    with pytest.raises(InvalidRequestError, match="no system turns") as caught:
        encoder.encode_chat(MESSAGES)
    assert caught.value.param == "messages"


def test_a_chat_that_renders_to_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="'m'") as caught:
        PromptEncoder("m", BYTE_LEVEL, "{% if false %}x{% endif %}").encode_chat(MESSAGES)
    assert caught.value.param == "messages"


def test_templates_are_read_from_files(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages }}", encoding="utf-8")
    assert read_template("m", str(path)) == "{{ messages }}"
    assert read_template("m", "{{ inline }}") == "{{ inline }}"
    assert read_template("m", None) is None
    with pytest.raises(ConfigError, match=r"members\.m\.chat_template"):
        read_template("m", str(tmp_path / "missing.jinja"))


def test_threads_share_a_tokenizer() -> None:
    texts = [f"prompt {i} " * (i % 7 + 1) for i in range(64)]
    plain, chat = PromptEncoder("m", BYTE_LEVEL), PromptEncoder("m", BYTE_LEVEL, CHATML)

    def both(text: str) -> tuple[list[int], list[int]]:
        return plain.encode(text), chat.encode_chat([{"role": "user", "content": text}])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(both, texts)) == [both(text) for text in texts]


@pytest.mark.parametrize(
    ("message", "missing"), [({"content": "hi"}, "no role"), ({"role": "user"}, "no content"), ({}, "no content")]
)
def test_a_message_without_its_parts_is_refused(message: dict[str, str], missing: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"message 1 has {missing}") as caught:
        plain_chat([MESSAGES[0], message])
    assert caught.value.param == "messages"


def test_the_last_message_can_be_left_open() -> None:
    assert plain_chat(MESSAGES, continue_final=True) == "system: be short\nuser: hi 😀"
    ids = PromptEncoder("m", BYTE_LEVEL, CHATML).encode_chat(MESSAGES, continue_final=True)
    assert BYTE_LEVEL.decode(ids) == "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nhi 😀"


def test_pieces_are_what_the_vocabulary_writes() -> None:
    encoder = PromptEncoder("m", BYTE_LEVEL)
    ids = encoder.encode("a b é")
    assert encoder.pieces(ids) == BYTE_LEVEL.convert_ids_to_tokens(ids)
    assert "Ġ" in "".join(encoder.pieces(ids))
    assert encoder.pieces([10_000]) == [""]


@pytest.mark.parametrize(("bos", "eos", "start"), [(5, 7, [5]), (0, 7, [0]), (None, 7, [7]), (None, None, [])])
def test_a_text_begins_with_bos_or_behind_an_end(bos: int | None, eos: int | None, start: list[int]) -> None:
    tokenizer = SimpleNamespace(bos_token_id=bos, eos_token_id=eos)
    assert PromptEncoder("m", tokenizer).start() == start
