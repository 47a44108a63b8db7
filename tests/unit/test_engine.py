"""The engine over fake members: batched = single, chunked = whole, and every end gives back all pages."""

from __future__ import annotations

import random
from collections import abc

import pytest
from fakes import (
    FakeMember,
    Records,
    byte_vocabulary,
    ensemble,
    fake_engine,
    pair_vocabulary,
    sequence,
)

from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import Output
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Phase, Sequence
from ensemble_core.engine import Engine
from ensemble_core.errors import InvalidRequestError, QueueFullError
from ensemble_core.stats import CacheStats, QueueStats, RequestStats, StepStats, TokenStats

PROMPTS = ["abc de", "a", "deed 中文 bad", "cab " * 12, "\n\nbe 😀", "x" * 90]


def pair(**options: object) -> list[FakeMember]:
    """A main member with a byte vocabulary and an assistant whose tokens are pairs of letters."""
    return [
        FakeMember("alpha", byte_vocabulary(), seed=1, **options),  # type: ignore[arg-type]
        FakeMember("beta", pair_vocabulary(), seed=2, **options),  # type: ignore[arg-type]
    ]


def run(engine: Engine, limit: int = 2000) -> dict[int, list[Output]]:
    """Step until no work is left; returns every sequence's outputs."""
    outputs: dict[int, list[Output]] = {}
    for _ in range(limit):
        if not engine.has_work:
            return outputs
        collect(engine, outputs)
    raise AssertionError("the engine does not come to an end")


def collect(engine: Engine, outputs: dict[int, list[Output]]) -> None:
    for seq_id, output in engine.step():
        outputs.setdefault(seq_id, []).append(output)
    check(engine)


def check(engine: Engine) -> None:
    """Each member has cached what the tracks say, and the scheduler's integrity check passes."""
    engine.scheduler.check()
    running = {s.seq_id: s for s in engine.scheduler.running}
    for name, member in engine.members.items():
        assert isinstance(member, FakeMember)
        assert member.cached.keys() <= running.keys()
        for seq_id, ids in member.cached.items():
            track = running[seq_id].tracks[name]
            assert len(ids) == track.num_held >= track.num_cached  # the next feed rolls back the rest
            assert ids[: track.num_cached] == (track.prompt_ids + track.completion_ids)[: track.num_cached]


def folded(outputs: abc.Sequence[Output]) -> tuple[str, tuple[int, ...], str | None]:
    text = "".join(output.text for output in outputs)
    tokens = tuple(token for output in outputs for token in output.token_ids)
    return text, tokens, outputs[-1].finish_reason


def alone(members: abc.Sequence[FakeMember], prompt: str, params: SamplingParams, **limits: int) -> Sequence:
    """The sequence after it ran alone in a fresh engine over the same members."""
    engine = fake_engine(members, **limits)
    request = sequence(0, prompt, members, ensemble(members), params)
    engine.add([request])
    run(engine)
    assert_empty(members)
    return request


def assert_empty(members: abc.Sequence[FakeMember]) -> None:
    assert all(member.is_empty for member in members)


def mixed_params(index: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=4 + 5 * (index % 6),
        temperature=[0.0, 0.7, 1.3][index % 3],
        top_p=[1.0, 0.8][index % 2],
        stop=[(), ("e", "abca"), (" b",)][index % 3],
        seed=index,
    )


@pytest.mark.parametrize("num_members", [1, 2])
def test_a_request_is_the_same_alone_and_among_sixteen(num_members: int) -> None:
    members = pair()[:num_members]
    recipe = ensemble(members)
    cases = [(PROMPTS[i % len(PROMPTS)], mixed_params(i)) for i in range(17)]
    engine = fake_engine(members, token_budget=40, max_running=7)
    outputs: dict[int, list[Output]] = {}
    rng = random.Random(0)
    waiting = list(enumerate(cases))
    while waiting or engine.has_work:
        for _ in range(min(rng.randrange(4), len(waiting))):
            seq_id, (prompt, params) = waiting.pop(0)
            engine.add([sequence(seq_id, prompt, members, recipe, params)])
        collect(engine, outputs)
    assert_empty(members)
    for seq_id, (prompt, params) in enumerate(cases):
        reference = alone(members, prompt, params)
        text, tokens, reason = folded(outputs[seq_id])
        assert (text, list(tokens)) == (reference.shown.text, reference.main.completion_ids), seq_id
        assert reason == reference.finish_reason


@pytest.mark.parametrize("budget", [1, 3, 17])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_chunked_prefill_is_the_whole_prefill(prompt: str, budget: int) -> None:
    members = pair()
    params = SamplingParams(max_tokens=10, temperature=0.0)
    chunked = alone(members, prompt, params, token_budget=budget)
    prefills = [feed for call in members[0].calls for feed in call if len(feed.token_ids) > 1]
    assert all(len(feed.token_ids) <= budget for feed in prefills)
    whole = alone(members, prompt, params, token_budget=4096)
    assert chunked.main.completion_ids == whole.main.completion_ids
    assert chunked.shown.text == whole.shown.text


def test_a_single_member_writes_its_own_greedy_text() -> None:
    member = FakeMember()
    request = alone([member], "abc", SamplingParams(max_tokens=30, temperature=0.0))
    ids = list(request.main.prompt_ids)
    for token in request.main.completion_ids:
        assert token == int(member.next_logits(ids).argmax())
        ids.append(token)


def test_two_identical_members_are_one() -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0)
    one = alone([FakeMember("alpha", pair_vocabulary())], "abc", params)
    twins = [FakeMember("alpha", pair_vocabulary()), FakeMember("beta", pair_vocabulary())]
    two = alone(twins, "abc", params)
    assert two.shown.text == one.shown.text


def test_the_assistant_counts() -> None:
    members = pair()
    params = SamplingParams(max_tokens=20, temperature=0.0)
    fused, single = alone(members, "abc", params), alone(members[:1], "abc", params)
    assert fused.main.completion_ids != single.main.completion_ids


def test_an_assistant_sees_its_own_spelling_of_the_text() -> None:
    members = pair()
    engine = fake_engine(members)
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=3)
    request = sequence(0, "abc", members, ensemble(members), params)
    engine.add([request])
    track = request.tracks["beta"]
    while engine.has_work:
        engine.step()
        if request.phase is Phase.DECODE and not request.spelt.mid_character:
            assert track.completion_ids == track.vocabulary.encode(request.spelt.text)
            spelt = (track.prompt_ids + track.completion_ids)[: track.num_cached]
            assert members[1].cached[0][: track.num_cached] == spelt
    assert members[1].rollbacks, "no token of the assistant ever ran over main's boundaries"


def start(members: abc.Sequence[FakeMember], params: SamplingParams, phase: str) -> tuple[Engine, Sequence]:
    """An engine with one sequence in the wanted phase and one more sequence."""
    engine = fake_engine(members, token_budget=8, max_running=1 if phase == "waiting" else 4)
    recipe = ensemble(members)
    other = sequence(1, "a", members, recipe, SamplingParams(max_tokens=30, temperature=0.0))
    request = sequence(0, "cab " * 12, members, recipe, params)
    engine.add([other, request])
    wanted = {"waiting": Phase.WAITING, "prefill": Phase.PREFILL, "decode": Phase.DECODE}[phase]
    engine.step()
    while request.phase is not wanted:
        engine.step()
    return engine, request


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode"])
def test_abort_gives_back_every_page(phase: str) -> None:
    members = pair()
    engine, request = start(members, SamplingParams(max_tokens=30, temperature=0.0), phase)
    news = engine.abort([request.seq_id, 12345])
    assert [(seq_id, output.finish_reason) for seq_id, output in news] == [(0, "abort")]
    assert all(0 not in member.cached for member in members)
    check(engine)
    assert engine.abort([request.seq_id]) == []
    outputs = run(engine)
    assert outputs.keys() == {1}
    assert outputs[1][-1].finish_reason == "length"
    assert_empty(members)
    assert all(engine.scheduler.reserved(member.name) == 0 for member in members)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_failing_member_fails_those_it_was_fed(phase: str, failing: int) -> None:
    members = pair()
    engine, request = start(members, SamplingParams(max_tokens=30, temperature=0.0), phase)
    survivor = members[1 - failing]
    params = SamplingParams(max_tokens=9, temperature=0.0)
    engine.add([sequence(7, "ab", [survivor], ensemble([survivor]), params)])
    members[failing].fails_on.add(request.seq_id)
    outputs: dict[int, list[Output]] = {}
    while not outputs.get(0) or outputs[0][-1].finish_reason is None:
        collect(engine, outputs)
    fed = {feed.seq_id for feed in members[failing].calls[-1]}
    ended = {seq_id for seq_id, each in outputs.items() if each[-1].finish_reason == "error"}
    assert ended == fed >= {0}
    assert members[failing].name in (outputs[0][-1].error or "")
    members[failing].fails_on.clear()
    later = sequence(8, "ab", members, ensemble(members), SamplingParams(max_tokens=5, temperature=0.0))
    engine.add([later])
    outputs |= run(engine)
    assert outputs[7][-1].finish_reason == "length"
    assert later.main.completion_ids == alone(members, "ab", later.request.params).main.completion_ids
    assert_empty(members)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("num_members", "broken"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("support", ["full", "closed"])
def test_nan_fails_one_request_alone(num_members: int, broken: int, temperature: float, support: str) -> None:
    members, records = pair()[:num_members], Records()
    recipe = ensemble(members, support=support)
    engine = fake_engine(members, records.append)
    params = [SamplingParams(max_tokens=12, temperature=temperature, seed=i) for i in range(3)]
    engine.add([sequence(i, PROMPTS[i], members, recipe, params[i]) for i in range(3)])
    outputs: dict[int, list[Output]] = {}
    for _ in range(4):
        collect(engine, outputs)
    members[broken].nan_on.add(1)
    for seq_id, more in run(engine).items():
        outputs[seq_id] += more
    assert outputs[1][-1].finish_reason == "error"
    assert "finite" in (outputs[1][-1].error or "")
    members[broken].nan_on.clear()
    for i in (0, 2):
        single = fake_engine(members)
        single.add([sequence(i, PROMPTS[i], members, recipe, params[i])])
        assert folded(outputs[i]) == folded(run(single)[i])
    masses = [
        m for step in records.of(StepStats) for f in step.fusions for rows in f.unmapped.values() for m in rows
    ]
    assert all(0.0 <= mass <= 1.0 for mass in masses)
    assert_empty(members)


def test_a_stop_string_ends_before_itself() -> None:
    member = FakeMember()
    free = alone([member], "abc", SamplingParams(max_tokens=40, temperature=0.0)).shown.text
    stop = free[11:14]
    engine, request = fake_engine([member]), None
    params = SamplingParams(max_tokens=40, temperature=0.0, stop=("zzz", stop))
    request = sequence(0, "abc", [member], ensemble([member]), params)
    engine.add([request])
    outputs = run(engine)[0]
    assert folded(outputs)[0] == free[: free.index(stop)]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)
    assert outputs[-1].num_completion_tokens == len(request.main.completion_ids)


def test_a_stop_token_ends_without_text() -> None:
    member, records = FakeMember(eos_bias=3.0), Records()
    engine = fake_engine([member], records.append)
    params = SamplingParams(max_tokens=200, temperature=1.0, seed=5)
    engine.add([sequence(0, "abc", [member], ensemble([member]), params)])
    outputs = run(engine)[0]
    text, tokens, reason = folded(outputs)
    assert (reason, outputs[-1].stop_reason) == ("stop", None)
    assert tokens[-1] in member.vocabulary.stop_ids
    assert text.encode() == bytes(tokens[:-1]).decode("utf-8", "replace").encode()
    assert outputs[-1].num_completion_tokens == len(tokens) == records.of(RequestStats)[0].generation_tokens


def test_length_and_usage() -> None:
    members, records = pair(), Records()
    engine = fake_engine(members, records.append)
    engine.add([sequence(0, "ab 中", members, ensemble(members), SamplingParams(max_tokens=7, temperature=0.0))])
    outputs = run(engine)[0]
    assert [output.num_completion_tokens for output in outputs] == list(range(1, 8))
    assert all(len(output.token_ids) == 1 for output in outputs)
    assert {output.num_prompt_tokens for output in outputs} == {6}
    assert [output.finish_reason for output in outputs] == [None] * 6 + ["length"]
    (finished,) = records.of(RequestStats)
    assert (finished.prompt_tokens, finished.generation_tokens, finished.finish_reason) == (6, 7, "length")
    assert 0 <= finished.queue_seconds <= (finished.ttft_seconds or 0) <= finished.e2e_seconds
    assert len(records.of(TokenStats)) == 6


def test_a_text_that_fills_the_context_ends_with_its_last_token() -> None:
    members = pair(max_len=32)
    request = alone(members, "a" * 20, SamplingParams(max_tokens=12, temperature=0.0))
    assert (request.finish_reason, request.num_completion_tokens) == ("length", 12)


def test_an_assistant_at_its_longest_ends_the_request() -> None:
    members = [
        FakeMember("alpha", pair_vocabulary(), seed=1, max_len=200),
        FakeMember("beta", byte_vocabulary(), seed=2, max_len=24),
    ]
    request = alone(members, "abcd", SamplingParams(max_tokens=150, temperature=0.0))
    assert request.finish_reason == "length"
    assert request.num_completion_tokens < 150
    assert len(request.tracks["beta"]) > 24
    assert max(len(feed.token_ids) for call in members[1].calls for feed in call) <= 24


def test_main_decides_alone_within_a_character() -> None:
    members, records = pair(), Records()
    engine = fake_engine(members, records.append)
    request = sequence(0, "a", members, ensemble(members), SamplingParams(max_tokens=150, temperature=1.0, seed=1))
    engine.add([request])
    num_alone = 0
    while engine.has_work:
        within = request.phase is Phase.DECODE and request.spelt.mid_character
        before = len(members[1].calls)
        cached = list(members[1].cached.get(0, []))
        engine.step()
        if within:
            assert len(members[1].calls) == before
            assert records.of(StepStats)[-1].fusions[0].fusion == "single"
            assert request.phase is Phase.FINISHED or members[1].cached[0] == cached[: len(members[1].cached[0])]
            num_alone += 1
        elif request.phase is not Phase.FINISHED:
            assert records.of(StepStats)[-1].fusions[0].fusion == "relative"
    assert num_alone > 10
    text = bytes(b for t in request.main.completion_ids for b in members[0].vocabulary.text_bytes(t))
    assert request.shown.text == text.decode("utf-8", "replace")


def test_the_numbers_of_a_step_are_sane() -> None:
    members, records = pair(), Records()
    engine = fake_engine(members, records.append, token_budget=16)
    recipe = ensemble(members)
    params = SamplingParams(max_tokens=20, temperature=0.0)
    engine.add([sequence(i, PROMPTS[i], members, recipe, params) for i in range(4)])
    outputs = run(engine)
    num_tokens = sum(len(output.token_ids) for each in outputs.values() for output in each)
    assert sum(step.batch_size for step in records.of(StepStats)) == num_tokens == 80
    for step in records.of(StepStats):
        assert step.seconds >= step.alignment_seconds >= 0
        assert step.seconds >= step.sampling_seconds >= 0
        for member in step.members:
            assert member.forward_seconds > 0
            assert member.wait_seconds >= 0
            assert (member.phase == "prefill") == (member.prefill_tokens > 0)
        for fusion in step.fusions:
            rows = len(next(iter(fusion.unmapped.values())))
            assert all(sum(counts) == rows for counts in fusion.agreed.values())
            assert 0 <= fusion.overruled <= rows
    for member in members:
        fed = sum(len(feed.token_ids) for call in member.calls for feed in call)
        told = [m for step in records.of(StepStats) for m in step.members if m.member == member.name]
        assert sum(m.prefill_tokens + m.decode_tokens for m in told) == fed
        prompts = sum(len(member.vocabulary.encode(prompt)) for prompt in PROMPTS[:4])
        assert sum(m.prefill_tokens for m in told) == prompts
    agreed = [fusion.agreed["beta"] for step in records.of(StepStats) for fusion in step.fusions if fusion.agreed]
    assert sum(hits for hits, _ in agreed) > 0
    assert sum(misses for _, misses in agreed) > 0
    assert 0 < sum(fusion.overruled for step in records.of(StepStats) for fusion in step.fusions) < num_tokens
    assert records.of(QueueStats)[-1].num_running == records.of(QueueStats)[-1].num_waiting == 0


def test_every_cut_back_token_is_told() -> None:
    members, records = pair(), Records()
    engine = fake_engine(members, records.append)
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=3)
    engine.add([sequence(0, "abc", members, ensemble(members), params)])
    run(engine)
    told = sum(m.rollback_tokens for step in records.of(StepStats) for m in step.members)
    assert told == sum(count for _, count in members[1].rollbacks) > 0


def test_a_full_queue_takes_all_or_none() -> None:
    member = FakeMember()
    engine = fake_engine([member], max_waiting=2, max_running=1)
    recipe: Recipe = ensemble([member])
    made = [sequence(i, "a", [member], recipe, SamplingParams(max_tokens=2)) for i in range(4)]
    with pytest.raises(InvalidRequestError, match="max_waiting"):  # it could never succeed
        engine.add(made[:3])
    assert not engine.has_work
    engine.add(made[:1])
    engine.step()  # it runs, so nothing waits and no place is free
    engine.add(made[1:2])
    with pytest.raises(QueueFullError, match="max_waiting"):
        engine.add(made[2:])
    engine.add(made[2:3])
    assert run(engine).keys() == {0, 1, 2}


def test_a_burst_is_not_refused_while_places_are_free() -> None:
    member = FakeMember()
    engine = fake_engine([member], max_waiting=2, max_running=3)
    recipe: Recipe = ensemble([member])
    made = [sequence(i, "a", [member], recipe, SamplingParams(max_tokens=2)) for i in range(6)]
    for each in made[:5]:
        engine.add([each])
    with pytest.raises(QueueFullError, match="has room for 0"):
        engine.add(made[5:])
    assert run(engine).keys() == set(range(5))


def test_sequences_wait_for_pages() -> None:
    members = pair(num_pages=2, max_len=128, page_size=128)  # a page holds the longest sequence, so none grows
    engine = fake_engine(members, token_budget=512)
    recipe = ensemble(members)
    params = SamplingParams(max_tokens=10, temperature=0.0)
    engine.add([sequence(i, PROMPTS[i % 3], members, recipe, params) for i in range(7)])
    most = 0
    outputs: dict[int, list[Output]] = {}
    while engine.has_work:
        collect(engine, outputs)
        most = max(most, len(engine.scheduler.running))
    assert most == 2
    assert all(each[-1].finish_reason == "length" for each in outputs.values())
    assert len(outputs) == 7
    assert_empty(members)


def test_the_sink_hears_of_the_caches() -> None:
    member, records = FakeMember(), Records()
    engine = fake_engine([member], records.append)
    engine.add([sequence(0, "a" * 20, [member], ensemble([member]), SamplingParams(max_tokens=5))])
    engine.step()
    engine.report_caches()
    assert (records.of(CacheStats)[-1].used_pages, records.of(CacheStats)[-1].num_pages) == (2, member.num_pages)


def test_members_of_two_lanes_answer_the_same() -> None:
    params = SamplingParams(max_tokens=15, temperature=0.0)
    together = alone(pair(), "abc", params)
    apart = pair()
    apart[1].lane = "node-7/cpu"  # the pool runs it in a thread
    assert alone(apart, "abc", params).main.completion_ids == together.main.completion_ids
    assert any(name.startswith("team") for member in apart for name in member.threads)
