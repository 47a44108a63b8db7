"""The `llm` command as its users run it: `llm openai endpoint URL`, and a completion model of its own settings.

It never sends `tool_choice`, so whether a call comes is up to the model; that it sends tools is tried all the same.
tests/e2e/test_clients.py tests with a scripted model that it carries out the calls that come.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import client_report

LLM = str(Path(sys.executable).parent / "llm")
QUESTION = "What is the capital of France?"
FUNCTION = """
def get_weather(city: str) -> str:
    "The weather of a city."
    return "It is 21 degrees in " + city
"""
SCHEMA = {
    "type": "object",
    "properties": {
        "degrees": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["degrees", "unit"],
}
HOME = tempfile.mkdtemp()
GREEDY = ("-o", "temperature", "0", "-o", "max_tokens", "40")


def told(*arguments: str) -> str:
    """What the command prints."""
    environment = os.environ | {"LLM_USER_PATH": HOME}
    done = subprocess.run([LLM, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-500:])
    return done.stdout.strip()


def ask(url: str, model: str, text: str, *options: str) -> str:
    return told("openai", "endpoint", url, text, "-m", model, *GREEDY, *options)


def completion(url: str, model: str) -> object:
    known = [{"model_id": "ours", "model_name": model, "api_base": url, "completion": True}]
    Path(HOME, "extra-openai-models.yaml").write_text(json.dumps(known))
    text = told("-m", "ours", "The capital of France is", *GREEDY)
    assert text
    return text


def chat(url: str, model: str) -> object:
    assert model in told("openai", "endpoint", url, "--models").split()
    text = ask(url, model, QUESTION, "--no-stream")
    assert text
    return text


def stream(url: str, model: str) -> object:
    text = ask(url, model, QUESTION)
    assert text == ask(url, model, QUESTION, "--no-stream")
    return text


def tools_offered(url: str, model: str) -> object:
    text = ask(url, model, "How warm is it in Oslo?", "--functions", FUNCTION, "--chain-limit", "2")
    assert text
    return text


def structured(url: str, model: str) -> object:
    found = json.loads(ask(url, model, "How warm is it in Oslo?", "--schema", json.dumps(SCHEMA)))
    assert found["unit"] in ("celsius", "fahrenheit")
    return found


def responses(url: str, model: str) -> object:
    text = told("openai", "endpoint", url, QUESTION, "-m", model, "--responses", "-o", "temperature", "0")
    assert text
    return text


if __name__ == "__main__":
    tried = [completion, chat, stream, tools_offered, structured, responses]
    cannot = {"tool_call": "it never sends tool_choice, so whether a call comes is up to the model"}
    client_report.run("llm", {task.__name__: task for task in tried}, cannot)
