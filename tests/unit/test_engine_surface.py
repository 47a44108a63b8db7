"""The whole surface over fake members: scores, constraints, groups and traces in a running engine."""

from __future__ import annotations

import itertools
import json
import math
from collections import abc
from typing import Any

import pytest
from fakes import Bench, FakeMember, byte_vocabulary, fake_config, fake_loaded, mid_character, pair_vocabulary

from ensemble_core.decoding.forms import TextForm, one_of
from ensemble_core.decoding.requests import GenerationRequest, Output, Prompt, TokenLogprob
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Phase, Sequence

K = 32
GREEDY: dict[str, Any] = {"temperature": 0.0}


class Pair(Bench):
    """Two fake members, an engine and its admission."""

    def __init__(self, twins: bool = False, **scheduler: int) -> None:
        second = byte_vocabulary() if twins else pair_vocabulary()
        members = {
            "alpha": FakeMember("alpha", byte_vocabulary(), seed=1),
            "beta": FakeMember("beta", second, seed=1 if twins else 2),
        }
        config = fake_config(
            scheduler={"num_candidates": K, "token_budget": 64, "prefix_reuse": False} | scheduler
        )
        super().__init__(fake_loaded(config, members), members)

    def admit(self, prompt: Prompt, model: str = "duo", group: str | None = None, **params: Any) -> Sequence:
        trace = bool(params.pop("trace", False))
        made = GenerationRequest("r", model, prompt, SamplingParams(**params), trace=trace, group=group)
        return self.loaded.admission.admit(made)

    def add(self, *args: Any, **params: Any) -> Sequence:
        sequence = self.admit(*args, **params)
        self.engine.add([sequence])
        return sequence

    def of(self, sequence: Sequence) -> list[Output]:
        return self.outputs[sequence.seq_id]

    def fed(self, member: str) -> int:
        return sum(len(feed.token_ids) for call in self.members[member].calls for feed in call)


def tokens(outputs: abc.Sequence[Output]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.token_ids)


def text(outputs: abc.Sequence[Output]) -> str:
    return "".join(output.text for output in outputs)


def entries(outputs: abc.Sequence[Output]) -> tuple[TokenLogprob, ...]:
    return outputs[0].prompt_logprobs + tuple(entry for output in outputs for entry in output.logprobs)


def alone(*args: Any, **params: Any) -> list[Output]:
    bench = Pair()
    sequence = bench.add(*args, **params)
    bench.run()
    return bench.of(sequence)


# Biases


@pytest.mark.parametrize("model", ["duo", "alpha"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_full_bias_forces_a_token_and_harms_nobody_beside_it(model: str, temperature: float) -> None:
    bench = Pair()
    unlikely = ord("~")  # far outside of main's candidates
    params = {"max_tokens": 6, "temperature": temperature, "seed": 3}
    forced = bench.add("abc", model, logit_bias=((unlikely, 100.0),), **params)
    forced_more = bench.add("abc", model, logit_bias=((ord("}"), 100.0), (ord("{"), 99.0)), **params)
    beside = [bench.add(prompt, each, **params) for prompt in ("abc", "de") for each in ("duo", "alpha", "beta")]
    bench.run()
    assert text(bench.of(forced)) == "~~~~~~"
    assert set(text(bench.of(forced_more))) <= {"}", "{"}
    for sequence in beside:
        request = sequence.request
        expected = alone(request.prompt, request.model, **params)
        assert tokens(bench.of(sequence)) == tokens(expected)


def test_a_full_negative_bias_bans() -> None:
    free = tokens(alone("abc", max_tokens=10, **GREEDY))
    banned = tokens(alone("abc", max_tokens=10, logit_bias=tuple((i, -100.0) for i in set(free)), **GREEDY))
    assert not set(free) & set(banned)


@pytest.mark.parametrize("model", ["duo", "alpha"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_allowed_ids_and_bad_words_hold_and_harm_nobody_beside_them(model: str, temperature: float) -> None:
    bench = Pair()
    params = {"max_tokens": 40, "temperature": temperature, "seed": 3}
    few = bench.add(
        "abc", model, allowed_token_ids=(ord("~"), ord("}"), 1), **params
    )  # far outside of the candidates
    free = text(alone("abc", model, **params))
    words = (free[:1], free[1:3], free[4:7])
    clean = bench.add("abc", model, bad_words=words, **params)
    beside = [bench.add("abc", each, **params) for each in ("duo", "alpha", "beta")]
    bench.run()
    assert set(text(bench.of(few))) <= {"~", "}", "\x01"}
    assert bench.of(few)[-1].num_completion_tokens == 40
    assert not any(word in text(bench.of(clean)) for word in words)
    for sequence in beside:
        assert tokens(bench.of(sequence)) == tokens(alone("abc", sequence.request.model, **params))


def test_bad_words_hold_in_a_constraint() -> None:
    form = one_of(["cat", "cow"])
    assert text(alone("abc", max_tokens=9, form=form, bad_words=("ca",), **GREEDY)) == "cow"
    done = alone("abc", max_tokens=9, form=form, bad_words=("c",), **GREEDY)
    assert done[-1].finish_reason == "error"


def test_the_end_is_held_off_until_min_tokens() -> None:
    for least in (0, 5):
        bench = Pair()
        (end,) = bench.members["alpha"].vocabulary.stop_ids
        made = bench.add("abc", max_tokens=20, min_tokens=least, logit_bias=((end, 100.0),), **GREEDY)
        bench.run()
        assert bench.of(made)[-1].num_completion_tokens == least + 1
        assert bench.of(made)[-1].finish_reason == "stop"


# Constraints


@pytest.mark.parametrize("model", ["duo", "alpha"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_constrained_text_fits_and_changes_nothing_beside_it(model: str, temperature: float) -> None:
    bench = Pair()
    schema = json.dumps({"type": "array", "items": {"enum": ["cat", 7]}, "minItems": 2, "maxItems": 4})
    params = {"max_tokens": 200, "temperature": temperature, "seed": 4}
    bound = bench.add("abc", model, form=TextForm("json", schema), **params)
    beside = [bench.add("abc", each, **params) for each in ("duo", "alpha", "beta")]
    bench.run()
    value = json.loads(text(bench.of(bound)))
    assert 2 <= len(value) <= 4
    assert set(value) <= {"cat", 7}
    assert bench.of(bound)[-1].finish_reason == "stop"
    assert tokens(bench.of(bound))[-1] in bench.members["alpha"].vocabulary.stop_ids
    for sequence in beside:
        assert tokens(bench.of(sequence)) == tokens(alone("abc", sequence.request.model, **params))
    assert tokens(bench.of(bound)) == tokens(alone("abc", model, form=TextForm("json", schema), **params))


def test_constrained_text_that_is_cut_has_its_length() -> None:
    done = alone("abc", max_tokens=5, form=TextForm("json", '{"enum": ["a long text"]}'), **GREEDY)
    assert (text(done), done[-1].finish_reason) == ('"a lo', "length")


def test_a_complete_text_ends_though_min_tokens_wants_more() -> None:
    done = alone("abc", max_tokens=40, min_tokens=30, form=TextForm("json", '{"enum": ["ab"]}'), **GREEDY)
    assert json.loads(text(done)) == "ab"
    assert done[-1].finish_reason in ("stop", "length")


# Scores


@pytest.mark.parametrize("model", ["duo", "alpha", "beta"])
def test_a_prompt_is_scored_the_same_in_pieces_and_in_company(model: str) -> None:
    params: dict[str, Any] = {"max_tokens": 3, "echo": True, "logprobs": 2, **GREEDY}
    prompts = ["cab de deed 中文 bad " * 2, "abc", "a"]
    whole = [entries(alone(prompt, model, **params)) for prompt in prompts]
    for budget in (1, 7):
        bench = Pair(token_budget=budget)
        made = [bench.add(prompt, model, **params) for prompt in prompts]
        bench.add("deed bad", "alpha", max_tokens=30, **GREEDY)
        bench.run()
        for sequence, expected in zip(made, whole, strict=True):
            found = entries(bench.of(sequence))
            assert [e.token_id for e in found] == [e.token_id for e in expected]
            numbers = [e.logprob for e in expected[1:]]
            assert [e.logprob for e in found[1:]] == pytest.approx(numbers, abs=1e-5)
            assert bench.of(sequence)[0].prompt_text == sequence.request.prompt


def test_two_identical_members_score_as_one() -> None:
    params: dict[str, Any] = {"max_tokens": 0, "echo": True, "logprobs": 1, **GREEDY}
    bench = Pair(twins=True)
    both, one = bench.add("cab de deed", "duo", **params), bench.add("cab de deed", "alpha", **params)
    bench.run()
    found, expected = entries(bench.of(both)), entries(bench.of(one))
    assert [e.logprob for e in found[1:]] == pytest.approx([e.logprob for e in expected[1:]], abs=1e-4)
    assert bench.of(both)[-1].finish_reason == "length"
    assert tokens(bench.of(both)) == ()


def test_a_scored_prompt_continues_as_an_unscored_one() -> None:
    # The token after a prompt does not depend on whether the prompt was scored.
    scored = alone("cab de", max_tokens=8, echo=True, logprobs=1, **GREEDY)
    assert tokens(scored) == tokens(alone("cab de", max_tokens=8, **GREEDY))


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("num_top", [0, 3])
def test_offsets_and_the_best_of_each_token(echo: bool, num_top: int) -> None:
    prompt = "a 中é "
    params: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 1, "logprobs": num_top, "echo": echo}
    done = alone(prompt, **params)
    found = entries(done)
    ids = (list(prompt.encode()) if echo else []) + list(tokens(done))
    assert [e.token_id for e in found] == ids
    whole = (prompt if echo else "") + text(done)
    assert any(ord(c) > 127 for c in text(done))
    for i, entry in enumerate(found):
        before = bytes(ids[:i]).decode("utf-8", "ignore")
        assert entry.text_offset == len(before)
        assert whole.startswith(before)
    for entry in found[1 if echo else 0 :]:
        assert len(entry.top) in ({num_top, num_top + 1} if num_top else {0})
        if num_top:
            assert {i: p for i, _, p in entry.top}[entry.token_id] == entry.logprob


def test_numbers_are_before_temperature_and_bias() -> None:
    plain = alone("abc", max_tokens=1, logprobs=5, **GREEDY)[0].logprobs[0]
    token = plain.top[3][0]
    bent = alone("abc", max_tokens=1, logprobs=5, logit_bias=((token, 100.0),), temperature=2.0, seed=1)
    entry = bent[0].logprobs[0]
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(plain.top[3][2], abs=1e-4)


def test_a_scored_prompt_beside_a_stream_is_fused_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step fuses more than it is granted; the stream gets a token in each; the numbers are the same."""
    prompt, apart = "cab de deed bad 中文 " * 6, Pair()
    expected = apart.add(prompt, echo=True, logprobs=2, max_tokens=3, **GREEDY)
    apart.run()
    bench = Pair()
    monkeypatch.setattr(bench.engine.scheduler.pace, "grant", lambda kinds, num, *_: 16 if num else None)
    stream = bench.add("abc", max_tokens=200, **GREEDY)
    bench.step()
    scored = bench.add(prompt, echo=True, logprobs=2, max_tokens=3, **GREEDY)
    assert scored.scores is not None
    steps = fused = 0
    while scored.phase is not Phase.DECODE:
        bench.step()
        steps += 1
        now = len(scored.scores._scored) or fused
        assert now - fused <= 16
        fused = now
        assert stream.num_completion_tokens == steps + 1
    assert fused >= len(scored.main.prompt_ids) - 40
    assert steps >= fused / 16
    bench.run()
    found, own = ([e for o in each for e in o.prompt_logprobs] for each in (bench.of(scored), apart.of(expected)))
    assert [e.logprob for e in found[1:]] == pytest.approx([e.logprob for e in own[1:]], abs=1e-4)
    assert text(bench.of(scored)) == text(apart.of(expected))


# Groups


def group_of(bench: Pair, prompt: str, num: int, group: str | None = "g", **params: Any) -> list[Sequence]:
    sampling = {"max_tokens": 6, "temperature": 1.0} | params
    made = [bench.admit(prompt, group=group, seed=i, **sampling) for i in range(num)]
    bench.engine.add(made)
    return made


@pytest.mark.parametrize("prompt", ["cab de deed bad 中文 " * 3, "ab", "a"])
@pytest.mark.parametrize("budget", [5, 200])
@pytest.mark.parametrize("max_running", [2, 8])
def test_choices_share_a_prefill_and_differ_in_nothing(prompt: str, budget: int, max_running: int) -> None:
    shared, apart = (Pair(token_budget=budget, max_running=max_running) for _ in range(2))
    made, expected = group_of(shared, prompt, 5), group_of(apart, prompt, 5, group=None)
    shared.run()
    apart.run()
    for one, other in zip(made, expected, strict=True):
        assert tokens(shared.of(one)) == tokens(apart.of(other))
        assert text(shared.of(one)) == text(apart.of(other))


def test_a_prompt_is_prefilled_once_a_member() -> None:
    prompt = "cab de deed bad"
    bench = Pair()
    made = group_of(bench, prompt, 5, max_tokens=1)
    made += group_of(bench, prompt, 1, group="other", max_tokens=1)
    group_of(bench, prompt, 1, group=None, max_tokens=2)
    bench.run()
    # Leaders of one token have ended when others would take over: everybody prefills.
    assert bench.fed("alpha") == 7 * len(prompt) + 1
    bench = Pair()
    group_of(bench, prompt, 5, max_tokens=2)
    while any(s.phase is not Phase.DECODE for s in bench.engine.scheduler.running) or not bench.outputs:
        bench.step()
    for name, member in bench.members.items():
        length = len(member.vocabulary.encode(prompt))
        first = [feed for call in member.calls for feed in call if len(feed.token_ids) > 1]
        assert max(len(feed.token_ids) for feed in first) == length, name
        assert member.reuses == [(i, length - 1) for i in range(1, 5)]
    bench.run()
    assert bench.fed("alpha") == len(prompt) + 4 + 5  # the prompt, its last token for four, one more token each


@pytest.mark.parametrize("end", ["abort", "fail"])
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_follower_takes_over(end: str, when: str) -> None:
    bench = Pair(token_budget=4)
    made = group_of(bench, "cab de deed bad", 3)
    wanted = Phase.PREFILL if when == "prefill" else Phase.DECODE
    bench.step()
    while made[0].phase is not wanted:
        bench.step()
    if end == "abort":
        for seq_id, output in bench.engine.abort([made[0].seq_id]):
            bench.outputs.setdefault(seq_id, []).append(output)
    else:
        bench.members["beta"].fails_on.add(made[0].seq_id)
    bench.run()
    assert bench.of(made[0])[-1].finish_reason == ("abort" if end == "abort" else "error")
    reference = Pair()
    expected = group_of(reference, "cab de deed bad", 3, group=None)
    reference.run()
    for i in (1, 2):
        if bench.of(made[i])[-1].finish_reason != "error":  # fed in the same forward
            assert tokens(bench.of(made[i])) == tokens(reference.of(expected[i]))


def test_a_follower_of_one_token_runs_beside_its_leader() -> None:
    bench = Pair()
    made = group_of(bench, "a", 3, max_tokens=20)
    bench.step()
    assert all(s.phase is Phase.DECODE for s in made)
    bench.run()


def test_a_late_follower_prefills_by_itself_or_takes_over_who_runs() -> None:
    bench = Pair(max_running=1)
    made = group_of(bench, "cab de", 3)
    bench.run()
    assert not bench.members["alpha"].reuses
    assert all(len(tokens(bench.of(s))) == 6 for s in made)
    bench = Pair(max_running=2)
    made = group_of(bench, "cab de", 2, max_tokens=20) + group_of(bench, "cab de", 1)
    made[0].finish("abort")
    bench.run()
    assert [goal for goal, _ in bench.members["alpha"].reuses] == [made[1].seq_id, made[2].seq_id]


def test_scores_of_a_prompt_are_handed_over() -> None:
    bench = Pair()
    made = group_of(bench, "cab de", 3, echo=True, logprobs=2)
    bench.run()
    first, *others = ([e for o in bench.of(s) for e in o.prompt_logprobs] for s in made)
    assert len(first) == len("cab de")
    assert others == [first, first]
    assert len(bench.members["alpha"].reuses) == 2


# Traces


def test_traces_say_what_was_proposed() -> None:
    bench = Pair()
    made = bench.add("a", max_tokens=80, temperature=1.0, seed=1, trace=True)
    bench.run()
    outputs = bench.of(made)
    traces = list(itertools.chain.from_iterable(output.traces for output in outputs))
    assert len(traces) == len(tokens(outputs)) == 80
    vocabulary = bench.members["alpha"].vocabulary
    within, spelt = False, b""
    for token, trace in zip(tokens(outputs), traces, strict=True):
        assert trace.token == vocabulary.name_of(token)
        assert trace.consulted is not within
        assert set(trace.members) == ({"alpha"} if within else {"alpha", "beta"})
        assert trace.agreed.keys() == trace.members.keys() - {"alpha"}
        for proposals in (*trace.members.values(), trace.fused):
            chances = [p for _, p in proposals]
            assert 1 <= len(chances) <= 5
            assert chances == sorted(chances, reverse=True)
            assert all(0.0 <= p <= 1.0 for p in chances)
        if not within:
            assert trace.agreed["beta"] == (trace.members["beta"][0][0] == trace.token)
        assert trace.spelling == vocabulary.tokens[token]
        assert 0.0 < trace.prob <= 1.0
        assert 0.0 <= trace.entropy <= math.log(len(vocabulary))
        assert trace.given.keys() == trace.members.keys()
        chance = dict(trace.fused).get(trace.token, trace.prob)
        assert trace.prob == chance
        for member, given in trace.given.items():
            assert given is None or dict(trace.members[member]).get(trace.token, given) == given
        assert trace.unmapped.keys() == trace.members.keys()
        spelt += vocabulary.text_bytes(token)
        within = mid_character(spelt)
    assert b"".join(trace.spelling or b"" for trace in traces) == spelt
    assert {trace.consulted for trace in traces} == {True, False}


def test_a_member_alone_is_consulted() -> None:
    (first, *_) = alone("a", "alpha", max_tokens=3, trace=True, **GREEDY)
    (trace,) = first.traces
    assert (trace.consulted, set(trace.members), trace.agreed) == (True, {"alpha"}, {})
    assert trace.members["alpha"] == trace.fused
    assert trace.given == {"alpha": trace.prob}
    assert trace.unmapped == {"alpha": 0.0}
    assert not alone("a", max_tokens=3, **GREEDY)[0].traces
