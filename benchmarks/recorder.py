"""The engine's own records of its decode steps, with the engine driven by hand.

A recorder keeps the record of every step with the moment at which it came, so that the time from step to step, text
and all, can be had as well as the time inside a step.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from benchmarks import prose
from ensemble_core import factory
from ensemble_core.config import Config
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.members.loading.checkpoints import load_tokenizer
from ensemble_core.stats import Stats, StepStats

SETTLING = 3  # first decode steps of a batch, which do not count


@dataclass(frozen=True, slots=True)
class Told:
    """A step, and when its record came (perf_counter seconds)."""

    stats: StepStats
    at: float

    @property
    def forward_seconds(self) -> float:
        """Sum over the members."""
        return sum(member.forward_seconds for member in self.stats.members)


class StepRecorder:
    """Keeps the records of all steps."""

    def __init__(self) -> None:
        self.steps: list[Told] = []

    def record(self, stats: Stats) -> None:
        """Keep what is of a step; see `stats.Record`."""
        if isinstance(stats, StepStats):
            self.steps.append(Told(stats, time.perf_counter()))


class DecodeBench:
    """A loaded configuration whose decode steps can be measured at any batch and length."""

    def __init__(self, config: Config) -> None:
        self._recorder = StepRecorder()
        self._config = config
        self._loaded = factory.load(config, self._recorder.record)
        self._names = itertools.count()

    def decode(self, model: str, batch: int, length: int, num_steps: int) -> list[Told]:
        """`num_steps` steps in a row in which `batch` sequences decode, around a context of `length` main tokens.

        Prompts differ from row to row. Rows begin to decode while the prompts of others are still read, so the first
        rows are a little longer than the last.
        """
        start = length - SETTLING - num_steps // 2
        requests = [self._request(model, row, start) for row in range(batch)]
        engine = self._loaded.engine
        engine.add(requests)
        self._recorder.steps.clear()
        try:
            while len(steps := self._full_steps(batch)) < SETTLING + num_steps:
                assert engine.has_work, f"the rows ended before {batch} of them decoded for {num_steps} steps"
                engine.step()
        finally:
            engine.abort([request.seq_id for request in requests])
        return steps[SETTLING:]

    def close(self) -> None:
        """End the engine's threads."""
        self._loaded.engine.close()

    def _full_steps(self, batch: int) -> list[Told]:
        return [told for told in self._recorder.steps if _all_decode(told.stats, batch)]

    def _request(self, model: str, seed: int, length: int) -> Sequence:
        ensemble = self._config.ensembles.get(model)
        main = ensemble.main if ensemble else model
        ids = prose.token_ids(load_tokenizer(main, self._config.members[main]), seed, length)
        room = self._config.members[main].max_len - length
        params = SamplingParams(max_tokens=room, ignore_eos=True, temperature=0.0)
        return self._loaded.admission.admit(
            GenerationRequest(f"row-{next(self._names)}", model, tuple(ids), params)
        )


def step_to_step(steps: list[Told]) -> list[float]:
    """Seconds from one step to the next, everything between them included."""
    return [after.at - before.at for before, after in itertools.pairwise(steps)]


def _all_decode(stats: StepStats, batch: int) -> bool:
    return stats.batch_size == batch and all(member.phase == "decode" for member in stats.members)
