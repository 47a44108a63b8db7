"""Failing members: which requests lose them, what the others write, and what is reported."""

from __future__ import annotations

import logging
import time
from collections import abc
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from fakes import Bench, FakeMember, Records, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary

from ensemble_core.decoding.modes.base import choose_mode
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import GenerationRequest, Output, Overrides, Prompt, TokenLogprob
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Phase, Sequence
from ensemble_core.members.parallel import _Late
from ensemble_core.stats import Cause, DropStats, HealthStats, StepStats

WEIGHTS = {"alpha": 0.5, "beta": 0.25, "gamma": 0.25}
FUSIONS: dict[str, dict[str, Any]] = {
    "relative": {"name": "relative"},
    "relative-full": {"name": "relative", "options": {"support": "full", "steps": 1}},
    "linear": {"name": "projection"},
    "log-linear": {"name": "projection", "options": {"pool": "log-linear"}},
    "union": {"name": "union"},
    "gac": {"name": "gac"},
    "eva": {"name": "eva"},
    "core": {"name": "core", "options": {"base": {"name": "projection"}}},
    # These fusions need beta.
    "gac-gate": {"name": "gac", "options": {"gate": "beta"}},
    "robust": {"name": "robust"},
    "contrastive": {"name": "contrastive", "options": {"expert": "beta", "base": "gamma", "alpha": 0.5}},
}
NEEDS_BETA = {"gac-gate", "robust", "contrastive"}
SAMPLED = SamplingParams(max_tokens=14, temperature=1.0, seed=5, logprobs=2)
GREEDY = SamplingParams(max_tokens=14, temperature=0.0, logprobs=2)
LATE = 0.4  # seconds; far more than a fake's forward takes


class Trio(Bench):
    """An engine over three fake members with an ensemble per fusion; `strict` fails if any member fails."""

    def __init__(self, **scheduler: Any) -> None:
        members = {
            "alpha": FakeMember("alpha", byte_vocabulary(), seed=1),
            "beta": FakeMember("beta", pair_vocabulary(), seed=2),
            "gamma": FakeMember("gamma", byte_vocabulary(("ab", "cd", " e")), seed=3),
        }
        base = {"members": WEIGHTS, "main": "alpha"}
        ensembles = {
            name: base | {"fusion": fusion, "on_member_failure": "drop"} for name, fusion in FUSIONS.items()
        }
        ensembles["strict"] = base | {"fusion": {"name": "projection"}}
        ensembles["weighed"] = ensembles["linear"] | {"weighting": {"by": "perplexity", "tau": 0.5}}
        self.records = Records()
        config = fake_config(tuple(members), ensembles=ensembles, scheduler={"num_candidates": 32} | scheduler)
        super().__init__(fake_loaded(config, members, self.records.append), members)

    def add(
        self,
        model: str,
        prompt: Prompt = "abc de",
        params: SamplingParams = SAMPLED,
        members: tuple[str, ...] | None = None,
    ) -> Sequence:
        overrides = Overrides(members=members)
        made = self.loaded.admission.admit(
            GenerationRequest(f"request-{prompt}", model, prompt, params, overrides, trace=True)
        )
        self.engine.add([made])
        return made

    def run(self) -> int:
        """By the clock, since late members take no steps; those that are still busy need not be empty."""
        deadline, steps = time.monotonic() + 20.0, 0
        while self.engine.has_work:
            assert time.monotonic() < deadline, "the engine does not come to an end"
            self.step()
            steps += 1
        if not self.engine._pool.busy:
            assert all(member.is_empty for member in self.members.values())
        return steps

    def close(self) -> None:
        for member in self.members.values():
            member.gate.set()
        self.engine.close()

    def last(self, sequence: Sequence) -> Output:
        return self.outputs[sequence.seq_id][-1]

    def said(self, sequence: Sequence) -> list[tuple[int, float | None, tuple[tuple[int, str, float], ...]]]:
        """Every token with its log-probabilities."""
        entries = [e for output in self.outputs[sequence.seq_id] for e in output.logprobs]
        return [(e.token_id, e.logprob, e.top) for e in entries]

    def break_member(self, name: str, cause: Cause, *seq_ids: int) -> None:
        member = self.members[name]
        if cause == "timeout":
            member.gate.clear()
        (member.fails_on if cause == "exception" else member.nan_on).update(seq_ids)


def alone(model: str, prompt: Prompt, params: SamplingParams, members: tuple[str, ...] | None = None) -> Any:
    bench = Trio()
    request = bench.add(model, prompt, params, members)
    bench.run()
    return bench.said(request)


@pytest.mark.parametrize("params", [SAMPLED, GREEDY])
@pytest.mark.parametrize("cause", ["exception", "non_finite"])
@pytest.mark.parametrize("fusion", [*FUSIONS, "weighed"])
def test_what_is_left_is_the_smaller_ensemble(fusion: str, cause: Cause, params: SamplingParams) -> None:
    """Equal in tokens and log-probabilities; main alone if the fusion needs the member that failed."""
    bench = Trio()
    request = bench.add(fusion, params=params)
    bench.break_member("beta", cause, request.seq_id)
    bench.run()
    left = ("alpha",) if fusion in NEEDS_BETA else ("alpha", "gamma")
    reference = alone("alpha", "abc de", params) if len(left) == 1 else alone(fusion, "abc de", params, left)
    assert bench.said(request) == reference
    gone = {"beta": cause} | ({"gamma": "idle"} if len(left) == 1 else {})
    assert bench.last(request).dropped == gone
    assert bench.last(request).finish_reason == "length"
    traces = [trace for output in bench.outputs[request.seq_id] for trace in output.traces]
    assert all(trace.left_out == gone for trace in traces)
    assert all(trace.members.keys() <= set(left) for trace in traces)
    assert all(trace.consulted == (len(trace.members) > 1) for trace in traces)
    assert all(step.fusions[0].agreed.keys() <= {"gamma"} for step in bench.records.of(StepStats) if step.fusions)


@pytest.mark.parametrize("cause", ["exception", "non_finite"])
@pytest.mark.parametrize("fusion", ["linear", "relative", "contrastive"])
def test_a_request_goes_on_from_where_it_was(fusion: str, cause: Cause) -> None:
    """Before the failure as with all members; after it as the smaller ensemble given the text so far."""
    bench, prompt, params = Trio(), "cab", SamplingParams(max_tokens=16, temperature=0.0, logprobs=2)
    request = bench.add(fusion, prompt, params)
    while request.num_completion_tokens < 6 or request.spelt.mid_character:
        bench.step()
    num_before, so_far = request.num_completion_tokens, request.main.prompt_ids + request.main.completion_ids
    bench.break_member("beta", cause, request.seq_id)
    bench.run()
    assert bench.said(request)[:num_before] == alone(fusion, prompt, params)[:num_before]
    left = None if fusion == "contrastive" else ("alpha", "gamma")
    rest = alone(
        "alpha" if left is None else fusion,
        tuple(so_far),
        SamplingParams(max_tokens=16 - num_before, temperature=0.0, logprobs=2),
        left,
    )
    assert [token for token, *_ in bench.said(request)[num_before:]] == [token for token, *_ in rest]
    traces = [trace for output in bench.outputs[request.seq_id] for trace in output.traces]
    assert ["beta" in trace.left_out for trace in traces] == [i >= num_before for i in range(16)]


@pytest.mark.parametrize("cause", ["exception", "non_finite"])
def test_weights_that_follow_the_prompt_are_of_those_that_read_it_all(cause: Cause) -> None:
    """A member lost during the prompt or after it: both times the others get their own weights, rescaled."""
    early, late = Trio(token_budget=4), Trio()
    requests = [bench.add("weighed", "cab cab bed") for bench in (early, late)]
    while requests[1].weighing:
        late.step()
    before = requests[1].recipe.weights
    early.step()
    assert requests[0].weighing
    assert requests[0].tracks["beta"].num_cached > 0
    for bench, request in zip((early, late), requests, strict=True):
        bench.break_member("beta", cause, request.seq_id)
        bench.run()
        assert request.recipe.members == ("alpha", "gamma")
    scaled = [before[0] / (before[0] + before[2]), before[2] / (before[0] + before[2])]
    for request in requests:
        assert request.recipe.weights == pytest.approx(scaled, rel=1e-5)
    assert scaled != pytest.approx([2 / 3, 1 / 3], rel=1e-2)


@pytest.mark.parametrize("model", ["linear", "strict"])
@pytest.mark.parametrize("member", ["alpha", "beta", "gamma"])
def test_rows_beside_one_that_is_not_finite_never_know(member: str, model: str) -> None:
    bench, prompts = Trio(), ["abc de", "a", "deed 中文 bad"]
    requests = [bench.add(model, prompt) for prompt in prompts]
    for _ in range(3):
        bench.step()
    bench.break_member(member, "non_finite", requests[1].seq_id)
    bench.run()
    for i in (0, 2):
        assert bench.said(requests[i]) == alone(model, prompts[i], SAMPLED)
        assert not bench.last(requests[i]).dropped
    fails = model == "strict" or member == "alpha"
    assert bench.last(requests[1]).finish_reason == ("error" if fails else "length")
    assert fails == (f"member '{member}': its numbers are not finite" in (bench.last(requests[1]).error or ""))


def test_a_forward_that_raises_concerns_those_that_it_was_fed() -> None:
    bench = Trio()
    fed = [bench.add("linear", "abc"), bench.add("union", "a")]
    others = [bench.add("alpha", "ab"), bench.add("linear", "de", members=("alpha", "gamma"))]
    bench.break_member("beta", "exception", fed[0].seq_id)
    bench.run()
    assert all(bench.last(request).dropped == {"beta": "exception"} for request in fed)
    assert bench.said(fed[1]) == alone("union", "a", SAMPLED, ("alpha", "gamma"))
    assert not any(bench.last(request).dropped for request in others)
    assert bench.said(others[0]) == alone("alpha", "ab", SAMPLED)
    assert bench.said(others[1]) == alone("linear", "de", SAMPLED, ("alpha", "gamma"))


@pytest.mark.parametrize("cause", ["exception", "non_finite", "timeout"])
@pytest.mark.parametrize(("model", "member"), [("strict", "beta"), ("strict", "alpha"), ("linear", "alpha")])
def test_the_request_fails_with_main_and_where_it_is_told_to(model: str, member: str, cause: Cause) -> None:
    bench = Trio(member_timeout=LATE if cause == "timeout" else None)
    request = bench.add(model)
    bench.break_member(member, cause, request.seq_id)
    while not bench.outputs:
        bench.step()
    assert bench.last(request).finish_reason == "error"
    assert f"member '{member}'" in (bench.last(request).error or "")
    assert bench.records.of(HealthStats) == [HealthStats(member, cause)]
    assert not bench.records.of(DropStats)
    bench.close()


@pytest.mark.parametrize("cause", ["exception", "non_finite"])
def test_a_member_that_recovers_serves_the_next_request(cause: Cause, caplog: pytest.LogCaptureFixture) -> None:
    bench = Trio()
    first = bench.add("linear")
    bench.break_member("beta", cause, first.seq_id)
    with caplog.at_level(logging.WARNING):
        bench.run()
    told = [record.getMessage() for record in caplog.records if "beta" in record.getMessage()]
    assert len(told) == 1
    assert first.request.request_id in told[0]
    assert bench.records.of(DropStats) == [DropStats("linear", "beta", cause)]
    assert bench.records.of(HealthStats) == [HealthStats("beta", cause)]
    second = bench.add("linear", "bad")
    bench.run()
    assert bench.said(second) == alone("linear", "bad", SAMPLED)
    assert bench.records.of(HealthStats) == [HealthStats("beta", cause), HealthStats("beta", None)]


def test_a_late_member_is_done_without_until_it_is_back() -> None:
    bench = Trio(member_timeout=LATE)
    beta = bench.members["beta"]
    first, other = bench.add("linear"), bench.add("alpha", "ab")
    beta.gate.clear()
    bench.run()
    assert bench.last(first).dropped == {"beta": "timeout"}
    assert bench.said(first) == alone("linear", "abc de", SAMPLED, ("alpha", "gamma"))
    assert bench.said(other) == alone("alpha", "ab", SAMPLED)
    assert len(beta.calls) == 1
    newcomer = bench.add("linear", "bad")
    bench.run()
    assert bench.last(newcomer).dropped == {"beta": "busy"}
    assert bench.said(newcomer) == alone("linear", "bad", SAMPLED, ("alpha", "gamma"))
    beta.gate.set()
    await_return(bench)
    assert beta.is_empty, "its pages do not come back"
    last = bench.add("linear", "cab")
    bench.run()
    assert bench.said(last) == alone("linear", "cab", SAMPLED)
    assert bench.records.of(HealthStats) == [HealthStats("beta", "timeout"), HealthStats("beta", None)]
    bench.close()


def test_who_needs_a_late_member_waits_and_fails_once_it_is_stuck() -> None:
    bench = Trio(member_timeout=LATE)
    first, waiting = bench.add("linear"), None
    bench.members["beta"].gate.clear()
    bench.run()
    waiting = bench.add("strict", "bad")
    bench.step()
    assert waiting.phase is Phase.PREFILL
    bench.members["beta"].gate.set()
    bench.run()
    assert bench.said(waiting) == alone("strict", "bad", SAMPLED)
    bench.add("linear", "a")
    bench.members["beta"].gate.clear()
    bench.run()
    stuck = bench.add("strict", "bad")
    bench.run()
    assert "has not returned" in (bench.last(stuck).error or "")
    assert bench.last(first).finish_reason == "length"
    bench.close()


def await_return(bench: Trio) -> None:
    deadline = time.monotonic() + 5.0
    while bench.engine._pool.busy:
        assert time.monotonic() < deadline, "the member does not come back"
        bench.engine.report_caches()


def test_a_request_that_decodes_misses_a_busy_member_for_some_steps() -> None:
    """The member catches up; the next tokens are again those of all members."""
    bench, params = Trio(member_timeout=60.0), SamplingParams(max_tokens=24, temperature=0.0, logprobs=2)
    request = bench.add("linear", "cab", params)
    while request.num_completion_tokens < 4:
        bench.step()
    future: Future[Any] = Future()
    bench.engine._pool._late["beta"] = _Late(future, time.perf_counter())
    while request.num_completion_tokens < 9 or request.spelt.mid_character:
        bench.step()
    num_before, so_far = request.num_completion_tokens, request.main.prompt_ids + request.main.completion_ids
    future.set_result(None)
    bench.run()
    assert not bench.last(request).dropped
    traces = [trace for output in bench.outputs[request.seq_id] for trace in output.traces]
    assert any(trace.left_out == {"beta": "busy"} for trace in traces[4:num_before])
    assert not any(trace.left_out for trace in traces[:4] + traces[num_before:])
    rest = alone("linear", tuple(so_far), SamplingParams(max_tokens=24 - num_before, temperature=0.0, logprobs=2))
    assert [token for token, *_ in bench.said(request)[num_before:]] == [token for token, *_ in rest]
    bench.close()


@pytest.mark.parametrize("busy", ["beta", "gamma"])
@pytest.mark.parametrize("begin", [4, 7])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("lockstep", {"positions": "shared"}),
        ("verify", {}),
        ("verify", {"draft": 3, "lookup": False}),
        ("verify", {"drafter": "beta"}),
        ("verify", {"drafter": "gamma", "draft": 3}),
    ],
)
def test_no_text_waits_for_a_busy_member(busy: str, begin: int, mode: str, options: dict[str, Any]) -> None:
    """Whatever main has drafted, a part of a character for one, when a member does not return."""
    bench, params = Trio(member_timeout=60.0), SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    request = bench.add("linear", "cab", params)
    request.recipe = replace(request.recipe, mode=choose_mode(mode, options, "mode"))
    while request.num_completion_tokens < begin:
        bench.step()
    future: Future[Any] = Future()
    bench.engine._pool._late[busy] = _Late(future, time.perf_counter())
    for _ in range(300):
        bench.step()
    assert bench.last(request).finish_reason == "length"
    future.set_result(None)
    bench.close()


def test_a_member_that_is_too_far_behind_is_lost() -> None:
    bench = Trio(member_timeout=60.0, token_budget=6)
    request = bench.add("linear", "cab", SamplingParams(max_tokens=24, temperature=0.0))
    while request.num_completion_tokens < 4:
        bench.step()
    future: Future[Any] = Future()
    bench.engine._pool._late["beta"] = _Late(future, time.perf_counter())
    while bench.engine.has_work:
        bench.step()
    assert bench.last(request).dropped == {"beta": "busy"}
    assert not bench.members["beta"].is_empty
    future.set_result(None)
    bench.engine.report_caches()
    assert bench.members["beta"].is_empty
    bench.close()


def prompt_scores(bench: Trio, request: Sequence) -> list[TokenLogprob]:
    return [entry for output in bench.outputs[request.seq_id] for entry in output.prompt_logprobs]


SCORED = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2, echo=True)
TEXT = "deed 中文 bad cab de ab" * 2


def scored_alone(model: str, members: tuple[str, ...] | None = None) -> list[TokenLogprob]:
    bench = Trio()
    request = bench.add(model, TEXT, SCORED, members)
    bench.run()
    return prompt_scores(bench, request)


@pytest.mark.parametrize("cause", ["exception", "non_finite"])
@pytest.mark.parametrize("fusion", ["linear", "contrastive"])
def test_a_scored_prompt_loses_a_member(fusion: str, cause: Cause) -> None:
    small = scored_alone("alpha") if fusion == "contrastive" else scored_alone(fusion, ("alpha", "gamma"))
    bench = Trio()
    request = bench.add(fusion, TEXT, SCORED)
    bench.break_member("beta", cause, request.seq_id)
    bench.run()
    assert prompt_scores(bench, request) == small
    assert bench.last(request).dropped["beta"] == cause


@pytest.mark.parametrize("num_steps", range(1, 7))
def test_scores_before_a_failure_stay(num_steps: int) -> None:
    """Each position has a score of all members, of the remaining ones or of main; the last, of the remaining ones."""
    whole, small, single = (
        scored_alone("linear"),
        scored_alone("linear", ("alpha", "gamma")),
        scored_alone("alpha"),
    )
    bench = Trio(token_budget=9)
    request = bench.add("linear", TEXT, SCORED)
    for _ in range(num_steps):
        bench.step()
    bench.break_member("beta", "non_finite", request.seq_id)
    bench.run()
    found = prompt_scores(bench, request)
    assert [entry.token_id for entry in found] == [entry.token_id for entry in whole]
    for i, entry in enumerate(found[1:], start=1):
        known = [each[i].logprob for each in (whole, small, single)]
        assert any(entry.logprob == pytest.approx(number, abs=1e-5) for number in known), i
    assert found[-1].logprob == pytest.approx(small[-1].logprob, abs=1e-5)
    assert [e.logprob for e in found[1:]] != pytest.approx([e.logprob for e in small[1:]], abs=1e-5)


def test_a_scored_prompt_fails_with_main() -> None:
    bench = Trio()
    request = bench.add("linear", TEXT, SCORED)
    bench.break_member("alpha", "non_finite", request.seq_id)
    bench.run()
    assert "not finite" in (bench.last(request).error or "")


def test_both_assistants_may_go() -> None:
    bench = Trio()
    request = bench.add("linear")
    bench.break_member("beta", "exception", request.seq_id)
    bench.break_member("gamma", "non_finite", request.seq_id)
    bench.run()
    assert bench.said(request) == alone("alpha", "abc de", SAMPLED)
    assert bench.last(request).dropped == {"beta": "exception", "gamma": "non_finite"}


def weighted(weights: abc.Sequence[float]) -> Recipe:
    names = ("alpha", "beta", "gamma")[: len(weights)]
    fusion: Any = object()
    return Recipe("m", names, tuple(weights), fusion, "linear", on_failure="drop", refit=lambda _: fusion)


def test_weights_are_scaled_to_sum_to_one() -> None:
    left = weighted((0.5, 0.3, 0.2)).without({"beta"})
    assert left.members == ("alpha", "gamma")
    assert left.weights == pytest.approx((0.5 / 0.7, 0.2 / 0.7))
    whole = weighted((0.5, 0.3, 0.2))
    assert whole.without(()) is whole
    both = whole.without({"beta", "gamma"})
    assert (both.members, both.weights, both.fusion, both.fusion_name) == (("alpha",), (1.0,), None, "single")


def test_main_decides_alone_where_nobody_else_has_weight() -> None:
    left = weighted((0.0, 1.0, 0.0)).without({"beta"})
    assert (left.members, left.weights, left.fusion) == (("alpha",), (1.0,), None)


def test_the_fusions_of_what_may_be_left_are_built_at_start() -> None:
    bench = Trio()
    book = bench.loaded.admission._book
    book.warm()
    recipe = book.resolve("linear", Overrides())
    assert recipe.without({"beta"}).fusion is book.resolve("linear", Overrides(members=("alpha", "gamma"))).fusion
    assert recipe.without({"beta"}).fusion is not None
    built = len(book._built)
    recipe.without({"gamma"})
    assert len(book._built) == built
