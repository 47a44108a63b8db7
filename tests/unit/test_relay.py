"""Verify with an assistant as drafter: it changes what steps cost, never a text."""

from __future__ import annotations

import hashlib
import sys
from collections import abc
from itertools import takewhile
from typing import Any

import pytest
import torch
from fakes import (
    FakeMember,
    Records,
    byte_vocabulary,
    fake_engine,
    pair_vocabulary,
    preempted,
    run,
    sequence,
    tokens,
)
from rule import OPTIONS, PROMPTS, K, Reference, engine_tokens, losing, recipe_of, trio
from test_verify import REQUESTS, AnyBeat, whole

from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.fusion.base import FUSIONS
from ensemble_core.stats import DraftStats

_LETTERS = [*"abcde \n", "é", "中", "😀"]


class Narrator(FakeMember):
    """Writes a tale that all narrators know, and now and then something else."""

    def next_logits(self, ids: abc.Sequence[int]) -> torch.Tensor:
        logits = super().next_logits(ids) * 0.5
        text = b"".join(self.vocabulary.tokens[token_id] for token_id in ids)
        if hashlib.sha256(bytes([self._seed]) + text).digest()[0] < 25:
            return logits  # a whim
        follows = _tale(text)
        for token_id, token in enumerate(self.vocabulary.tokens):
            if follows.startswith(token) and token_id not in self.vocabulary.special_ids:
                logits[token_id] += 8.0 + 2 * len(token)
        return logits


def _tale(text: bytes) -> bytes:
    """What follows a text: the rest of its last character, then letters."""
    cut = len(text) - next((n for n in range(4) if _is_whole(text[: len(text) - n])), 0)
    found = b""
    while len(found) < 12:
        begin = text[:cut] + found
        found += _LETTERS[hashlib.sha256(begin[-6:]).digest()[0] % len(_LETTERS)].encode()
    rest = text[cut:]
    return found[len(rest) :] if found.startswith(rest) else b""


def _is_whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def narrators() -> list[FakeMember]:
    """Three vocabularies, and mostly one mind."""
    return [
        Narrator("alpha", byte_vocabulary(["ab", "e ", "中"]), seed=1, max_len=512),
        Narrator("beta", pair_vocabulary(), seed=2, max_len=512),
        Narrator("gamma", byte_vocabulary(["abc", "ca", "中", "de", "ed "]), seed=3, max_len=512),
    ]


@pytest.mark.parametrize("drafter", ["beta", "gamma", "lookup"])
@pytest.mark.parametrize(("size", "temperature"), [(1, 0.0), (4, 0.0), ("auto", 0.0), (4, 1.0)])
@pytest.mark.parametrize("members", [trio, narrators])
def test_equals_the_rule(members: Any, drafter: str, size: int | str, temperature: float) -> None:
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=5)
    own = members()
    recipe = recipe_of(own, "projection", draft=size, drafter=drafter)
    found = engine_tokens(own, recipe, PROMPTS, params)
    for prompt, text in zip(PROMPTS, found, strict=True):
        assert text == Reference(own, recipe, prompt, params).run(consensus=True), prompt


@pytest.mark.parametrize("fusion", sorted(set(FUSIONS.names()) - {"projection"}))
def test_equals_the_rule_for_every_fusion(fusion: str) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.0, seed=5)
    members = narrators()[: 3 if fusion in OPTIONS | {"robust": {}} else 2]
    recipe = recipe_of(members, fusion, draft=3, drafter="beta")
    found = engine_tokens(members, recipe, PROMPTS, params)
    for prompt, text in zip(PROMPTS, found, strict=True):
        assert text == Reference(members, recipe, prompt, params).run(consensus=True), prompt


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_no_beat_changes_a_text(seed: int, temperature: float) -> None:
    params = SamplingParams(max_tokens=30 + seed, temperature=temperature, seed=seed, ignore_eos=True)
    members = (trio if seed % 4 == 3 else narrators)()[: 2 + seed % 2]
    recipe = recipe_of(members, "projection", drafter=members[1 + seed // 2 % (len(members) - 1)].name)
    prompts = [*PROMPTS, "abcab" * 3, "é中é中é"]
    engine = fake_engine(members, num_candidates=K, max_running=5)
    engine.scheduler.rhythm = AnyBeat(seed)
    engine.add([sequence(i, prompt, members, recipe, params) for i, prompt in enumerate(prompts)])
    outputs = run(engine)
    assert all(member.is_empty for member in members)
    for i, prompt in enumerate(prompts):
        assert outputs[i][-1].error is None
        assert tokens(outputs[i]) == Reference(members, recipe, prompt, params).run(consensus=True), prompt


@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS)
def test_each_request_gets_what_it_gets_with_main_as_drafter(fields: dict[str, Any]) -> None:
    params = SamplingParams(**({"max_tokens": 30, "temperature": 0.0, "seed": 11} | fields))
    others = SamplingParams(max_tokens=15, temperature=0.9, seed=2)
    told = []
    for drafter in ("main", "gamma"):
        members = narrators()
        recipe = recipe_of(members, "projection", drafter=drafter)
        engine = fake_engine(members, num_candidates=len(members[1].vocabulary))
        engine.add([sequence(i, prompt, members, recipe, params) for i, prompt in enumerate(PROMPTS)])
        engine.add([sequence(100 + i, prompt, members, recipe, others) for i, prompt in enumerate(PROMPTS[:2])])
        outputs = run(engine)
        told.append([whole(outputs[i]) for i in range(len(PROMPTS))])
        assert all(member.is_empty for member in members)
    assert told[0] == told[1]


def test_a_preempted_text_goes_on_as_it_would_have() -> None:
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=4)
    members = narrators()
    recipe = recipe_of(members, "projection", draft=3, drafter="beta")
    expected = engine_tokens(members, recipe, PROMPTS[:3], params)
    small = narrators()
    for member in small:
        member.num_pages, member.max_len = 7, 100
    asked = [sequence(i, prompt, small, recipe, params) for i, prompt in enumerate(PROMPTS[:3])]
    assert preempted(small, asked, K) == expected


@pytest.mark.parametrize("steps", range(1, 14, 3))
def test_an_abort_at_any_step_leaves_nothing(steps: int) -> None:
    members = narrators()
    engine = fake_engine(members)
    params = SamplingParams(max_tokens=50, temperature=0.0)
    recipe = recipe_of(members, draft=4, drafter="beta")
    engine.add([sequence(i, "abc", members, recipe, params) for i in range(2)])
    for _ in range(steps):
        engine.step()
    engine.abort([0])
    outputs = run(engine)
    assert outputs[1][-1].num_completion_tokens == 50
    assert all(member.is_empty for member in members)


@pytest.mark.parametrize("fault", ["fails_on", "nan_on"])
@pytest.mark.parametrize("lost", ["beta", "gamma"])
@pytest.mark.parametrize("when", [4, 6, 7])
def test_a_text_goes_on_without_a_member_that_fails(fault: str, lost: str, when: int) -> None:
    """Its drafter or another; then main drafts itself."""
    members = narrators()
    recipe = recipe_of(members, "projection", draft=3, drafter="beta")
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    outputs = losing(members, recipe, params, lost, fault, when)
    assert len(tokens(outputs[0])) == len(tokens(outputs[1])) == 30
    assert set(outputs[0][-1].dropped) == {lost}


def test_a_drafter_near_the_end_of_its_room_leaves_drafting_to_main() -> None:
    members = narrators()
    members[1].max_len = 24
    recipe = recipe_of(members, "projection", draft=8, drafter="beta")
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    alone = [replace_length(narrators(), 24), members]
    lengths = [
        len(engine_tokens(own, recipe if own is members else recipe_of(own, "projection"), ["abc"], params)[0])
        for own in alone
    ]
    assert lengths[0] == lengths[1] < 60


def replace_length(members: list[FakeMember], max_len: int) -> list[FakeMember]:
    members[1].max_len = max_len
    return members


def test_main_is_fed_a_whole_draft_at_once_and_the_drafter_is_not_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two members that agree, main answers once for a draft, and the drafter hardly reads anything twice."""
    monkeypatch.setattr(sys.modules[__name__], "_LETTERS", [*"abcde \n"])
    members = narrators()[:2]
    records = Records()
    engine = fake_engine(members, records.append, num_candidates=K)
    params = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True)
    recipe = recipe_of(members, "projection", draft=4, drafter="beta")
    engine.add([sequence(0, "abc", members, recipe, params)])
    outputs = run(engine)[0]
    told = records.of(DraftStats)
    confirmed, guessed = sum(each.confirmed for each in told), sum(each.guessed for each in told)
    assert 0.6 * guessed < confirmed < guessed
    assert len(members[0].calls) < 0.5 * len(tokens(outputs))
    held, again = list[int](), 0
    for (feed,) in members[1].calls:
        old = held[feed.keep or 0 :]
        again += len(list(takewhile(lambda pair: pair[0] == pair[1], zip(old, feed.token_ids, strict=False))))
        held[feed.keep or 0 :] = feed.token_ids
    assert again <= 0.05 * len(held)
