"""Reasoning over the demo pair, whose models have none of their own: markers from the YAML, OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import yaml
from processes import ROOT, served

QUESTION: Any = [{"role": "user", "content": "What is 6 + 7?"}]
OPENING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "maximum": 99}},
    "required": ["sum"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(demo_config: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("reasoning")
    raw = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    raw["members"]["smollm2"] |= {
        "chat_template": OPENING,
        "reasoning": {"start": "<think>", "end": "</think>"},
    }
    duet = raw["ensembles"]["duet-smollm2"]
    raw["ensembles"] = {
        "duet-smollm2": duet,
        "ahead": duet | {"mode": "verify"},
        "duet": raw["ensembles"]["duet"],
    }
    raw["matrices"]["folder"] = str(ROOT / "matrices")
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    with (
        served(folder / "config.yaml", folder / "server.log") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    sent: dict[str, Any] = {"max_completion_tokens": 40, "temperature": 0, **fields}
    return client.chat.completions.create(model=model, messages=QUESTION, **sent)


@pytest.mark.parametrize("model", ["smollm2", "duet-smollm2", "ahead"])
def test_the_sdk_reads_reasoning_and_its_tokens(client: openai.OpenAI, model: str) -> None:
    bounds = {"thinking_token_budget": 12, "min_tokens": 30}  # small models may end within their thoughts
    answer = ask(client, model, extra_body=bounds)
    message = answer.choices[0].message
    assert message.reasoning_content == message.reasoning
    assert message.reasoning
    assert "think>" not in message.reasoning + message.content
    assert answer.usage.completion_tokens_details.reasoning_tokens <= 12
    chunks = list(ask(client, model, stream=True, extra_body=bounds))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning
    assert "".join(delta.content or "" for delta in deltas) == message.content


@pytest.mark.parametrize("model", ["smollm2", "duet-smollm2"])
def test_a_schema_binds_what_follows(client: openai.OpenAI, model: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}
    answer = ask(client, model, response_format=form, extra_body={"thinking_token_budget": 8})
    assert set(json.loads(answer.choices[0].message.content)) == {"sum"}
    assert answer.choices[0].message.reasoning


def test_effort_switches_it_off(client: openai.OpenAI) -> None:
    answer = ask(client, "duet-smollm2", reasoning_effort="none")
    assert answer.choices[0].message.reasoning is None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_who_has_no_markers_refuses_a_budget(client: openai.OpenAI) -> None:
    assert ask(client, "duet").usage.completion_tokens_details is None
    with pytest.raises(openai.BadRequestError, match="no markers"):
        ask(client, "duet", extra_body={"thinking_token_budget": 8})
