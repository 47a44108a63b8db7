"""An error caused by one request's data ends only that request; the others get what they would get alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from fakes import Bench, FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary
from torch import Tensor

from ensemble_core.decoding import reports
from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.modes import lockstep
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import GenerationRequest, Output
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.errors import ConstraintError, MemberError
from ensemble_core.fusion.base import Fused
from ensemble_core.text.alignment import Track

SAMPLED = SamplingParams(max_tokens=12, temperature=1.0, seed=-7, logprobs=2)
Break = Callable[[pytest.MonkeyPatch, Sequence], None]


class Pair(Bench):
    """Two fake members."""

    def __init__(self, **scheduler: Any) -> None:
        members = {
            "alpha": FakeMember("alpha", byte_vocabulary(), seed=1),
            "beta": FakeMember("beta", pair_vocabulary(), seed=2),
        }
        config = fake_config(scheduler={"num_candidates": 64} | scheduler)
        super().__init__(fake_loaded(config, members), members)

    def add(self, prompt: str = "abcabc", params: SamplingParams = SAMPLED, model: str = "duo") -> Sequence:
        made = self.loaded.admission.admit(GenerationRequest(f"r-{prompt}", model, prompt, params, trace=True))
        self.engine.add([made])
        return made

    def said(self, sequence: Sequence) -> list[tuple[int, float | None]]:
        return [(e.token_id, e.logprob) for output in self.outputs[sequence.seq_id] for e in output.logprobs]


def alone(prompt: str) -> list[tuple[int, float | None]]:
    bench = Pair()
    request = bench.add(prompt)
    bench.run()
    return bench.said(request)


def _in_shaping(monkeypatch: pytest.MonkeyPatch, sick: Sequence) -> None:
    shape = lockstep.shape

    def broken(fused: Fused, sequences: list[Sequence], masks: list[Tensor | None]) -> Fused:
        assert sick not in sequences, "shaping went wrong"
        return shape(fused, sequences, masks)

    monkeypatch.setattr(lockstep, "shape", broken)


def _in_reports(monkeypatch: pytest.MonkeyPatch, sick: Sequence) -> None:
    trace = reports.trace

    def broken(recipe: Recipe, tracks: Mapping[str, Track], *rest: Any, **named: Any) -> Any:
        assert tracks is not sick.tracks, "reporting went wrong"
        return trace(recipe, tracks, *rest, **named)

    monkeypatch.setattr(reports, "trace", broken)


def _in_sampling(monkeypatch: pytest.MonkeyPatch, sick: Sequence) -> None:
    sample = lockstep.sample

    def broken(fused: Fused, sequences: list[Sequence]) -> list[int]:
        found = sample(fused, sequences)  # by now every sequence has drawn its number
        assert sick not in sequences, "sampling went wrong"
        return found

    monkeypatch.setattr(lockstep, "sample", broken)


def _in_spelling(monkeypatch: pytest.MonkeyPatch, sick: Sequence) -> None:
    def broken(data: bytes, *, armed: bool = True) -> str:
        raise UnicodeError("spelling went wrong")

    monkeypatch.setattr(sick.shown, "feed", broken)


def _in_respelling(monkeypatch: pytest.MonkeyPatch, sick: Sequence) -> None:
    respell = Track.respell

    def broken(track: Track, text: str) -> int:
        assert track is not sick.tracks.get("beta"), "respelling went wrong"
        return respell(track, text)

    monkeypatch.setattr(Track, "respell", broken)


def _in_its_constraint(monkeypatch: pytest.MonkeyPatch, sick: Sequence) -> None:
    class Broken:
        binds, chooses, forced = True, True, None

        def allowed(self) -> Tensor:
            raise ConstraintError("response_format", "JSON schema", "went wrong")

        def accept(self, token_id: int) -> None:
            """Never reached."""

    sick.constraint = Broken()  # type: ignore[assignment]


def _in_telling(monkeypatch: pytest.MonkeyPatch, sick: Sequence) -> None:
    def broken() -> Output:
        raise ValueError("telling went wrong")

    monkeypatch.setattr(
        Sequence, "take", lambda self, take=Sequence.take: broken() if self is sick else take(self)
    )


@pytest.mark.parametrize(
    "harm",
    [_in_shaping, _in_reports, _in_sampling, _in_spelling, _in_respelling, _in_its_constraint, _in_telling],
)
@pytest.mark.parametrize("after", [0, 4])
def test_a_fault_ends_its_own_request_alone(monkeypatch: pytest.MonkeyPatch, harm: Break, after: int) -> None:
    expected = {prompt: alone(prompt) for prompt in ("ab", "cab d")}
    bench = Pair()
    well = {prompt: bench.add(prompt) for prompt in ("ab", "cab d")}
    sick = bench.add("abcde")
    for _ in range(after):
        bench.step()
    harm(monkeypatch, sick)
    bench.run()
    last = bench.outputs[sick.seq_id][-1]
    assert last.finish_reason == "error"
    assert "went wrong" in (last.error or "")
    for prompt, request in well.items():
        assert bench.outputs[request.seq_id][-1].finish_reason == "length"
        assert bench.said(request) == expected[prompt]


def test_more_biases_than_candidates_beside_a_scored_prompt() -> None:
    """257 positive biases with echo and log-probabilities once stopped the engine."""
    bench = Pair(num_candidates=32)
    bias = tuple((token_id, 1.0) for token_id in range(257))
    params = SamplingParams(max_tokens=1, temperature=0.0, echo=True, logprobs=1, logit_bias=bias)
    request, other = bench.add("abcab dea", params), bench.add("ab")
    bench.run()
    assert bench.outputs[request.seq_id][-1].finish_reason == "length"
    assert len(bench.outputs[request.seq_id][0].prompt_logprobs) == 9
    assert bench.said(other) == _with_candidates("ab", 32)


def _with_candidates(prompt: str, num: int) -> list[tuple[int, float | None]]:
    bench = Pair(num_candidates=num)
    request = bench.add(prompt)
    bench.run()
    return bench.said(request)


@pytest.mark.parametrize("bf16", [False, True])
def test_what_a_neighbour_needs_changes_nobody(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    """A seeded request runs beside biases, a schema and a scored prompt, over logits with many ties."""
    logits = FakeMember.next_logits

    def tied(member: FakeMember, ids: list[int]) -> Tensor:
        found = logits(member, ids)
        return (found / 2).round().mul(2).to(torch.bfloat16).float() if bf16 else found

    monkeypatch.setattr(FakeMember, "next_logits", tied)
    expected = _with_candidates("ab", 24)
    bench = Pair(num_candidates=24)
    request = bench.add("ab")
    bench.add("cab", SamplingParams(max_tokens=20, logit_bias=tuple((i, 2.0) for i in range(60, 150))))
    bench.add("dea", SamplingParams(max_tokens=20, form=TextForm("json")))
    bench.add("abcabcabc", SamplingParams(max_tokens=20, echo=True, logprobs=3))
    bench.run()
    assert bench.said(request) == expected


def test_whole_vocabularies_are_asked_for_where_a_constraint_decides_and_nowhere_else() -> None:
    bench = Pair(num_candidates=16)
    scored = SamplingParams(max_tokens=4, echo=True, logprobs=1, form=TextForm("json"), temperature=0.0)
    request = bench.add("abcab dea " * 12, scored)
    bench.add("ab")
    bench.run()
    size = len(bench.members["alpha"].vocabulary)
    for call in bench.members["alpha"].calls:
        for feed in call:
            assert feed.top_k in (16, size)
            assert feed.top_k == 16 or (feed.seq_id == request.seq_id and feed.wanted == 1)
    assert all(feed.top_k == 16 for call in bench.members["beta"].calls for feed in call)
    assert len(bench.outputs[request.seq_id][0].prompt_logprobs) == len("abcab dea " * 12)


@pytest.mark.parametrize("call", ["reuse", "release"])
def test_a_member_that_fails_at_its_cache_fails_those_sequences_alone(call: str) -> None:
    bench = Pair(prefix_reuse=True)
    bench.members["beta"].broken_calls = {call: RuntimeError("out of luck")}
    request, other = bench.add("abcab dea"), bench.add("ab", model="alpha")
    while bench.engine.has_work:
        bench.step()
    last = bench.outputs[request.seq_id][-1]
    assert last.finish_reason == ("error" if call == "reuse" else "length")
    assert call == "release" or "out of luck" in (last.error or "")
    assert bench.outputs[other.seq_id][-1].finish_reason == "length"
    assert bench.members["alpha"].is_empty


def test_a_lost_cache_is_that_members_failure() -> None:
    """A restarted member has lost the tokens that it is asked to keep."""
    bench = Pair()
    request, other = bench.add("abcab dea"), bench.add("ab", model="alpha")
    bench.step()
    bench.members["beta"].cached.clear()
    bench.run()
    last = bench.outputs[request.seq_id][-1]
    assert (last.finish_reason, "are to be kept of 0" in (last.error or "")) == ("error", True)
    assert bench.outputs[other.seq_id][-1].finish_reason == "length"
    assert issubclass(MemberError, Exception)
