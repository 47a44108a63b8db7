"""Prompts and crowds that several tests share."""

from __future__ import annotations

from typing import Any

from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.llm import LLM, Completion, _completion

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived",
    "中国的首都是",
    "Question: What is 12 + 30?\nAnswer:",
    "The three primary colours are",
    "😀 means",
]


def together(llm: LLM, asked: list[tuple[str, str, SamplingParams]]) -> list[Completion]:
    """(model, prompt, parameters): all at once, of different models."""
    requests = [llm._requests([prompt], [params], model, None)[0] for model, prompt, params in asked]
    outputs: dict[int, list[Any]] = {request.seq_id: [] for request in requests}
    for seq_id, output in llm._run(requests):
        outputs[seq_id].append(output)
    return [_completion(outputs[request.seq_id]) for request in requests]
