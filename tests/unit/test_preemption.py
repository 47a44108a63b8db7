"""Engines whose members have too few pages: whoever is preempted ends with the text that it has alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from fakes import Bench, FakeMember, Records, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Phase, Sequence
from ensemble_core.stats import PreemptionStats

SCHEMA = '{"type": "object", "properties": {"a": {"enum": ["b", "é"]}}, "required": ["a"]}'
PROMPTS = ["abc de", "a", "deed 中文 bad", "cab cab cab ", "be 😀 e"]


class Tight(Bench):
    """An engine over two fake members, and everything that its sequences said."""

    def __init__(self, page_size: int, num_pages: int, **scheduler: Any) -> None:
        options = {"page_size": page_size, "num_pages": num_pages, "max_len": 64}
        members = {
            "alpha": FakeMember("alpha", byte_vocabulary(), seed=1, **options),  # type: ignore[arg-type]
            "beta": FakeMember("beta", pair_vocabulary(), seed=2, **options),  # type: ignore[arg-type]
        }
        self.records = Records()
        config = fake_config(scheduler={"num_candidates": 32} | scheduler)
        super().__init__(fake_loaded(config, members, self.records.append), members)
        self.preempted: list[Phase] = []
        self._watch()

    def _watch(self) -> None:
        scheduler, admit = self.engine.scheduler, self.engine.scheduler.admit

        def watched() -> list[Sequence]:
            within = [s.spelt.mid_character for s in scheduler.running]
            phases = {s.seq_id: (s.phase, mid) for s, mid in zip(scheduler.running, within, strict=True)}
            gone = admit()
            self.preempted += [phases[s.seq_id][0] for s in gone]
            self.within += sum(phases[s.seq_id][1] for s in gone)
            return gone

        self.within = 0
        scheduler.admit = watched  # type: ignore[method-assign]

    def add(self, model: str, prompt: str, group: str | None, params: SamplingParams) -> Sequence:
        request = GenerationRequest("r", model, prompt, params, group=group)
        made = self.loaded.admission.admit(request)
        self.engine.add([made])
        return made

    def step(self) -> None:
        super().step()
        self.check()

    def check(self) -> None:
        running = {s.seq_id: s for s in self.engine.scheduler.running}
        for name, member in self.members.items():
            assert member.free_pages >= 0
            assert member.cached.keys() <= running.keys()
            for seq_id, ids in member.cached.items():
                track = running[seq_id].tracks[name]
                assert len(ids) == track.num_held >= track.num_cached  # the next feed rolls back the rest
                assert ids[: track.num_cached] == (track.prompt_ids + track.completion_ids)[: track.num_cached]

    def run(self) -> None:
        for _ in range(5000):
            if not self.engine.has_work:
                assert all(member.is_empty for member in self.members.values())
                return
            self.step()
        raise AssertionError("somebody starves")

    def said(self, sequence: Sequence) -> Mapping[str, object]:
        """What the client sees, put together."""
        outputs = self.outputs[sequence.seq_id]
        return {
            "text": "".join(output.text for output in outputs),
            "tokens": [token for output in outputs for token in output.token_ids],
            "reason": outputs[-1].finish_reason,
            "scored": [entry.token_id for output in outputs for entry in output.prompt_logprobs],
        }

    def logprobs(self, sequence: Sequence) -> list[float]:
        """Of prompt and completion, in order."""
        outputs = self.outputs[sequence.seq_id]
        entries = [entry for output in outputs for entry in (*output.prompt_logprobs, *output.logprobs)]
        return [entry.logprob or 0.0 for entry in entries]


def some_params(rng: random.Random, seed: int) -> SamplingParams:
    kind = rng.choice(["plain", "plain", "echo", "schema"])
    scored = {"echo": True, "logprobs": 2} if kind == "echo" else {}
    return SamplingParams(
        max_tokens=rng.randint(1, 40),
        temperature=rng.choice([0.0, 1.0]),
        seed=seed,
        presence_penalty=rng.choice([0.0, 0.5]),
        form=TextForm("json", SCHEMA) if kind == "schema" else None,
        **scored,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("page_size", [4, 8, 16])
@pytest.mark.parametrize("seed", range(4))
def test_everybody_ends_with_the_text_that_it_has_alone(seed: int, page_size: int, reuse: bool) -> None:
    rng = random.Random(seed)
    num_pages = -(-64 // page_size) + rng.randint(0, 48 // page_size)
    bench = Tight(page_size, num_pages, token_budget=rng.choice([7, 30]), prefix_reuse=reuse)
    wanted = [
        (
            rng.choice(["duo", "duo", "alpha", "beta"]),
            rng.choice(PROMPTS),
            rng.choice([None, None, "g"]),
            some_params(rng, i),
        )
        for i in range(14)
    ]
    # A group is one prompt of one model.
    wanted = [
        (*(("duo", PROMPTS[2]) if group else (model, prompt)), group, params)
        for model, prompt, group, params in wanted
    ]
    made = []
    for each in wanted:
        made.append(bench.add(*each))
        if rng.random() < 0.5:
            bench.step()
    bench.run()
    assert bench.preempted or page_size == 16, "there is no want of pages"
    assert len(bench.records.of(PreemptionStats)) == len(bench.preempted)
    for sequence, (model, prompt, _, params) in zip(made, wanted, strict=True):
        alone = Tight(page_size, num_pages)
        reference = alone.add(model, prompt, None, params)
        alone.run()
        assert not alone.preempted
        assert bench.said(sequence) == alone.said(reference)
        assert bench.logprobs(sequence) == pytest.approx(alone.logprobs(reference), abs=1e-4)


def test_all_phases_are_preempted_and_within_characters_too() -> None:
    """What the walk above must meet, met."""
    phases, within = set(), 0
    for seed in range(12):
        bench = Tight(4, 20, token_budget=5, prefix_reuse=False)
        for i in range(6):
            bench.add("duo", PROMPTS[i % 5], None, SamplingParams(max_tokens=40, seed=10 * seed + i))
        bench.run()
        phases |= set(bench.preempted)
        within += bench.within
    assert phases == {Phase.PREFILL, Phase.DECODE}
    assert within
