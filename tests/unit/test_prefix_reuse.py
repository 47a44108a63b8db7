"""Prefix reuse over fake members: it saves prefill and changes no answer."""

from __future__ import annotations

import random
from collections import abc

import pytest
from fakes import FakeMember, Records, byte_vocabulary, ensemble, fake_engine, pair_vocabulary, sequence

from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Phase, Sequence
from ensemble_core.engine import Engine
from ensemble_core.stats import PrefixStats

HEAD = "deed bad cab de " * 4
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)


def pair(**options: int) -> list[FakeMember]:
    return [
        FakeMember("alpha", byte_vocabulary(), seed=1, **options),  # type: ignore[arg-type]
        FakeMember("beta", pair_vocabulary(), seed=2, **options),  # type: ignore[arg-type]
    ]


def run(engine: Engine) -> None:
    for _ in range(2000):
        if not engine.has_work:
            return
        engine.step()
        engine.scheduler.check()
    raise AssertionError("the engine does not come to an end")


def done(
    engine: Engine, members: abc.Sequence[FakeMember], prompt: str, params: SamplingParams, seq_id: int
) -> Sequence:
    request = sequence(seq_id, prompt, members, ensemble(members), params)
    engine.add([request])
    run(engine)
    return request


def fed(member: FakeMember, seq_id: int) -> int:
    return sum(len(feed.token_ids) for call in member.calls for feed in call if feed.seq_id == seq_id)


def test_a_shared_prefix_is_fed_once_and_changes_nothing() -> None:
    members, records, plain = pair(), Records(), pair()
    engine, other = fake_engine(members, records.append, prefix_reuse=True), fake_engine(plain)
    for seq_id, tail in enumerate(["abc", "ddd", "a"]):
        found = done(engine, members, HEAD + tail, GREEDY, seq_id)
        expected = done(other, plain, HEAD + tail, GREEDY, seq_id)
        assert (found.shown.text, found.main.completion_ids) == (expected.shown.text, expected.main.completion_ids)
        if seq_id:
            saved = {m.name: fed(old, seq_id) - fed(m, seq_id) for m, old in zip(members, plain, strict=True)}
            assert saved["alpha"] >= len(HEAD)
            assert saved["beta"] >= len(members[1].vocabulary.encode(HEAD)) - 1
    assert {stats.member for stats in records.of(PrefixStats)} == {"alpha", "beta"}
    assert sum(stats.num_tokens for stats in records.of(PrefixStats) if stats.member == "alpha") >= 2 * len(HEAD)


def test_the_last_token_of_a_prompt_is_always_fed() -> None:
    members = pair()
    engine = fake_engine(members, prefix_reuse=True)
    first = done(engine, members, HEAD, GREEDY, 0)
    again = done(engine, members, HEAD, GREEDY, 1)
    assert again.main.completion_ids == first.main.completion_ids
    assert fed(members[0], 1) == 1 + 5  # the last token of the prompt, and five of the six that were decided


def test_a_prompt_goes_on_from_one_that_still_runs() -> None:
    members = pair()
    engine = fake_engine(members, prefix_reuse=True)
    running = sequence(0, HEAD, members, ensemble(members), SamplingParams(max_tokens=50, temperature=0.0))
    engine.add([running])
    engine.step()
    late = sequence(1, HEAD + "abc", members, ensemble(members), GREEDY)
    engine.add([late])
    run(engine)
    assert members[0].reuses == [(1, len(HEAD))]
    assert (
        late.main.completion_ids == done(fake_engine(pair()), pair(), HEAD + "abc", GREEDY, 0).main.completion_ids
    )


@pytest.mark.parametrize("kind", ["fails", "nan"])
def test_what_failed_is_never_reused(kind: str) -> None:
    members = pair()
    engine = fake_engine(members, prefix_reuse=True)
    (members[1].fails_on if kind == "fails" else members[1].nan_on).add(0)
    assert done(engine, members, HEAD, GREEDY, 0).finish_reason == "error"
    assert members[0].kept == members[1].kept == []
    done(engine, members, HEAD, GREEDY, 1)
    assert members[0].reuses == []


def test_a_scored_prompt_is_computed_in_full() -> None:
    from test_engine_surface import Pair

    bench = Pair(prefix_reuse=True)
    plain = bench.add(HEAD, max_tokens=2, temperature=0.0)
    bench.run()
    scored = bench.add(HEAD, max_tokens=2, temperature=0.0, echo=True, logprobs=1)
    bench.run()
    assert plain.main.completion_ids == scored.main.completion_ids
    assert not bench.members["alpha"].reuses
    assert len([entry for output in bench.of(scored) for entry in output.prompt_logprobs]) == len(HEAD)


def test_without_the_switch_nothing_is_kept() -> None:
    members = pair()
    engine = fake_engine(members, prefix_reuse=False)
    for seq_id in range(2):
        done(engine, members, HEAD, GREEDY, seq_id)
    assert members[0].kept == []
    assert members[0].reuses == []


@pytest.mark.parametrize("seed", range(6))
def test_a_random_day_with_and_without_reuse_is_the_same(seed: int) -> None:
    """Prompts that share heads, aborts, small caches: every text is the one of an engine that keeps nothing."""
    rng = random.Random(seed)
    prompts = [HEAD[: rng.randint(1, 64)] + rng.choice(["", "ab", " 中", "e e"]) for _ in range(24)]
    params = [SamplingParams(max_tokens=rng.randint(1, 20), temperature=1.0, seed=i) for i in range(24)]
    aborted = set(rng.sample(range(24), 4))
    texts = []
    for reuse in (False, True):
        members = pair(num_pages=40, max_len=128)
        engine = fake_engine(members, max_running=6, token_budget=20, prefix_reuse=reuse)
        made = [sequence(i, prompts[i], members, ensemble(members), params[i]) for i in range(24)]
        for request in made:
            engine.add([request])
            if rng.random() < 0.7:
                engine.step()
            if request.seq_id in aborted:
                engine.abort([request.seq_id])
        run(engine)
        assert all(member.is_empty for member in members)
        assert all(request.phase is Phase.FINISHED for request in made)
        texts.append([request.shown.text for request in made if request.seq_id not in aborted])
        assert bool(members[0].reuses) == reuse
    assert texts[0] == texts[1]
