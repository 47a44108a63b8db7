"""Our side of the comparison with vLLM: a model of a configuration, an ensemble or a member; prints one JSON line.

python -m benchmarks.anchor.our_side CONFIG MODEL WORK.json
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from benchmarks.anchor.work import Plan, Prompt, measure
from ensemble_core import factory
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.stats import discard


class OurEngine:
    """See `work.Stepped`."""

    def __init__(self, config: Config, model: str) -> None:
        self._loaded, self._model = factory.load(config, discard), model
        self._names = itertools.count()

    def add(self, prompt: Prompt, num_tokens: int) -> None:
        """See `work.Stepped`."""
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
        name = f"row-{next(self._names)}"
        request = GenerationRequest(name, self._model, tuple(prompt), params, watched=False)
        self._loaded.engine.add([self._loaded.admission.admit(request)])

    def step(self) -> tuple[int, int]:
        """See `work.Stepped`."""
        news = self._loaded.engine.step()
        ended = sum(output.finish_reason is not None for _, output in news)
        return len({seq_id for seq_id, _ in news}), ended


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    work, config = json.loads(args.work.read_text()), load_config(args.config)
    plan, texts = Plan.of(work["plan"]), [{int(n): ids for n, ids in text.items()} for text in work["texts"]]
    engine = OurEngine(config, args.model)
    print(json.dumps({"seconds": measure(engine, plan, texts)}))


if __name__ == "__main__":
    main()
