"""The gate that comes with the demo pair: it fits, and it weighs each place by itself."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.decoding.requests import Overrides, Weighting
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.llm import LLM

PROMPT = "The capital of France is"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, logprobs=1)


def test_the_gate_of_the_demo_fits_and_weighs_each_place(demo_config: Config) -> None:
    config = load_config(Path("configs/gate.yaml"))
    assert config.ensembles["duet"].fusion.name == demo_config.ensembles["duet"].fusion.name
    with closing(LLM(config)) as llm:
        (gated,) = llm.generate([PROMPT], GREEDY, model="duet")
        fixed = Overrides(weighting=Weighting("fixed"))
        (plain,) = llm.generate([PROMPT], GREEDY, model="duet", overrides=fixed)
        (alone,) = llm.generate(
            [PROMPT], GREEDY, model="duet", overrides=Overrides(weights={"gemma3": 1.0, "smollm2": 0.0})
        )
        (main,) = llm.generate([PROMPT], GREEDY, model="gemma3")
    assert gated.logprobs != plain.logprobs
    assert alone.token_ids == main.token_ids
