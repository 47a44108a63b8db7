"""A prompt's log-probabilities: shared places against a slow reference on bytes, and offsets in characters."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fakes import FakeMember, byte_vocabulary, ensemble, pair_vocabulary, space_of
from hypothesis import example, given
from hypothesis import strategies as st

from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import TokenLogprob
from ensemble_core.decoding.scoring import PromptScores, _paired
from ensemble_core.fusion.projection import ProjectionFusion, ProjectionOptions
from ensemble_core.members.base import Candidates, Feed, ask
from ensemble_core.text.alignment import Track, rests
from ensemble_core.text.vocabulary import Vocabulary

K = 300  # more than either vocabulary has
ALPHA = FakeMember("alpha", byte_vocabulary(), seed=1)
BETA = FakeMember("beta", pair_vocabulary(), seed=2)
TEXTS = ["abc de", "deed 中文 bad", "cab cab\n\nbe 😀", "aé", "a"]


def answer(member: FakeMember, ids: list[int]) -> Candidates:
    """At every position of a prompt."""
    try:
        return ask(member, [Feed(0, ids, len(ids))], K)
    finally:
        member.release(0)


def scored(
    recipe: Recipe, members: list[FakeMember], prompts: list[list[int]], text: str, num_top: int = 3
) -> tuple[TokenLogprob, ...]:
    scores = PromptScores(num_top)
    tracks = {m.name: Track(m.vocabulary, ids) for m, ids in zip(members, prompts, strict=True)}
    for member, ids in zip(members, prompts, strict=True):
        scores.add(member.name, answer(member, ids))
    scores.finish(recipe, tracks, text)
    return scores.described


def text_before(vocabulary: Vocabulary, ids: list[int]) -> bytes:
    return b"".join(vocabulary.text_bytes(token_id) for token_id in ids)


def reference(recipe: Recipe, members: list[FakeMember], prompts: list[list[int]]) -> list[float]:
    """Position by position: the assistants' prompts cut where their bytes are main's, fused; else main alone."""
    main, *others = members
    found = []
    for end in range(1, len(prompts[0])):
        text = text_before(main.vocabulary, prompts[0][:end])
        parts = [answer(main, prompts[0][:end]).rows([end - 1])]
        for other, ids in zip(others, prompts[1:], strict=True):
            cuts = [n for n in range(1, len(ids) + 1) if text_before(other.vocabulary, ids[:n]) == text]
            parts += [answer(other, ids[:n]).rows([n - 1]) for n in cuts[-1:]]
        if len(parts) == len(members) and recipe.fusion is not None:
            fused = recipe.fusion.fuse(parts, torch.tensor([recipe.weights]))
            hits = fused.logprobs[0][fused.token_ids[0] == prompts[0][end]]
            found.append(max(hits.amax().item(), -9999.0))
        else:
            found.append(parts[0].logprobs[0, prompts[0][end]].item())
    return found


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("turned", [False, True])
def test_shared_places_are_those_of_the_bytes(text: str, turned: bool) -> None:
    members = [BETA, ALPHA] if turned else [ALPHA, BETA]
    recipe = ensemble(members, support="closed")
    prompts = [member.vocabulary.encode(text) for member in members]
    found = scored(recipe, members, prompts, text)
    assert [entry.token_id for entry in found] == prompts[0]
    assert (found[0].logprob, found[0].top) == (None, ())
    expected = reference(recipe, members, prompts)
    assert [entry.logprob for entry in found[1:]] == pytest.approx(expected, abs=1e-5)
    lonely = [answer(members[0], prompts[0]).logprobs[i, prompts[0][i + 1]].item() for i in range(len(found) - 1)]
    if len(text) > 2:
        assert expected != pytest.approx(lonely, abs=1e-3), "the assistant is never heard"


def test_where_an_assistant_has_no_boundary_main_is_alone() -> None:
    members, text = [ALPHA, BETA], "abab"  # the assistant has b"ab" b"ab": one place is shared
    recipe = ensemble(members, support="closed")
    prompts = [member.vocabulary.encode(text) for member in members]
    assert len(prompts[1]) == 2
    found = scored(recipe, members, prompts, text)
    alone = [answer(ALPHA, prompts[0]).logprobs[i, prompts[0][i + 1]].item() for i in range(3)]
    assert [found[1].logprob, found[3].logprob] == [alone[0], alone[2]]
    assert found[2].logprob != pytest.approx(alone[1], abs=1e-6)


def test_a_control_token_that_another_member_reads_as_text_leaves_main_alone() -> None:
    members = [ALPHA, BETA]
    (end,) = ALPHA.vocabulary.stop_ids
    prompts = [[*b"ab", end, *b"cd"], BETA.vocabulary.encode("ab<eos>cd")]
    found = scored(ensemble(members, support="closed"), members, prompts, "ab<eos>cd")
    own = answer(ALPHA, prompts[0])
    assert [e.logprob for e in found[1:]] == [own.logprobs[i, prompts[0][i + 1]].item() for i in range(4)]
    assert [e.text_offset for e in found] == [0, 1, 2, 7, 8]


def test_a_space_that_a_tokenizer_puts_in_front_moves_nothing() -> None:
    members, text = [ALPHA, BETA], "abc de"
    recipe = ensemble(members, support="closed")
    plain = [member.vocabulary.encode(text) for member in members]
    led = [BETA.vocabulary.encode(" " + text), ALPHA.vocabulary.encode(text)]
    turned = scored(ensemble([BETA, ALPHA], support="closed"), [BETA, ALPHA], led, text)
    assert turned[1].text_offset == len(BETA.vocabulary.tokens[led[0][0]]) - 1
    assert turned[0].text_offset == 0
    with_lead = scored(recipe, members, [plain[0], [ord(" "), *plain[1]]], text)
    lonely = scored(ensemble([ALPHA]), [ALPHA], plain[:1], text)
    assert [e.logprob for e in with_lead] != [e.logprob for e in lonely]


def test_offsets_count_whole_characters() -> None:
    text = "aé中😀b"
    found = scored(ensemble([ALPHA]), [ALPHA], [list(text.encode())], text)
    assert [e.text_offset for e in found] == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4]


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_the_best_have_the_token_among_them(num_top: int) -> None:
    text = "deed bad"
    found = scored(ensemble([ALPHA]), [ALPHA], [list(text.encode())], text, num_top)
    own = answer(ALPHA, list(text.encode())).logprobs
    for row, entry in enumerate(found[1:]):
        best = own[row].max().item()
        assert len(entry.top) == num_top + (num_top > 0 and entry.token_id not in own[row].topk(num_top).indices)
        if num_top:
            assert {i: p for i, _, p in entry.top}[entry.token_id] == entry.logprob
            assert max(p for _, _, p in entry.top) == best
            assert (entry.logprob == best) == (int(own[row].argmax()) == entry.token_id)


def test_pieces_of_a_prompt_are_the_whole() -> None:
    ids = list(b"deed bad cab")
    whole = scored(ensemble([ALPHA]), [ALPHA], [ids], "deed bad cab")
    scores, answers = PromptScores(3), answer(ALPHA, ids)
    for a, b in ((0, 1), (1, 7), (7, len(ids))):
        scores.add("alpha", answers.rows(range(a, b)))
    scores.finish(ensemble([ALPHA]), {"alpha": Track(ALPHA.vocabulary, ids)}, "deed bad cab")
    assert scores.described == whole


@pytest.mark.parametrize("seed", range(8))
def test_scores_that_are_taken_bit_by_bit_are_the_whole(seed: int) -> None:
    """Members run ahead of each other; no call fuses more than it may, and nothing is left over or kept."""
    rng, text = random.Random(seed), "deed 中文 bad cab de ab" * 3
    members = [ALPHA, BETA] if seed % 2 else [BETA, ALPHA]
    recipe = ensemble(members, support="closed")
    tracks = {m.name: Track(m.vocabulary, m.vocabulary.encode(text)) for m in members}
    whole = scored(recipe, members, [track.prompt_ids for track in tracks.values()], text)
    answers = {m.name: answer(m, tracks[m.name].prompt_ids) for m in members}
    scores, told, fused = PromptScores(3), dict.fromkeys(answers, 0), 0
    while any(told[name] < len(each) for name, each in answers.items()):
        name = rng.choice([name for name, each in answers.items() if told[name] < len(each)])
        end = min(len(answers[name]), told[name] + rng.randint(1, 20))
        scores.add(name, answers[name].rows(range(told[name], end)))
        told[name], limit = end, rng.choice([0, 1, 7])
        done = scores.advance(recipe, tracks, limit)
        assert done <= limit
        assert done == limit or scores.num_ready == 0
        fused += done
    fused += scores.finish(recipe, tracks, text)
    assert fused == len(tracks[recipe.main].prompt_ids) - 1
    assert [e.logprob for e in scores.described[1:]] == pytest.approx([e.logprob for e in whole[1:]], abs=1e-5)
    assert [e.token_id for e in scores.described] == [e.token_id for e in whole]


def test_long_prompts_are_fused_in_blocks() -> None:
    text = "cab de " * 30
    members = [ALPHA, BETA]
    recipe = ensemble(members, support="closed")
    prompts = [member.vocabulary.encode(text) for member in members]
    found = scored(recipe, members, prompts, text)
    expected = reference(recipe, members, prompts)
    assert [entry.logprob for entry in found[1:]] == pytest.approx(expected, abs=1e-5)


def with_controls(names: Sequence[bytes], seed: int) -> FakeMember:
    """A member with bytes and some control tokens."""
    plain = byte_vocabulary()
    ids = range(len(plain), len(plain) + len(names))
    tokens, specials = [*plain.tokens, *names], plain.special_ids | frozenset(ids)
    return FakeMember("m", Vocabulary(tokens, specials, plain.stop_ids, plain.encode), seed=seed)


def projected(members: list[FakeMember]) -> Recipe:
    """Fused in main's vocabulary, where control tokens of one name meet; relative fusion leaves them to main."""
    names, fusion = tuple(m.name for m in members), ProjectionFusion(space_of(members), ProjectionOptions())
    return Recipe("p", names, (1 / len(names),) * len(names), fusion, "projection")


@given(st.lists(st.sampled_from([97, 98, 32, 257, 258, 256]), min_size=2, max_size=12))
@example([*b"abcab", 257, *b"dea"])
def test_two_identical_members_are_one_whatever_control_tokens_there_are(ids: list[int]) -> None:
    one, two = with_controls((b"<sep>", b"<end>"), seed=1), with_controls((b"<sep>", b"<end>"), seed=1)
    one.name, two.name = "one", "two"
    said = "".join(chr(i) for i in ids if i < 256)
    alone = scored(ensemble([one]), [one], [ids], said)
    for recipe in (ensemble([one, two], support="closed"), projected([one, two])):
        both = scored(recipe, [one, two], [ids, ids], said)
        for mine, theirs in zip(alone[1:], both[1:], strict=True):
            assert mine.logprob is not None
            assert theirs.logprob == pytest.approx(mine.logprob, abs=1e-4)


def test_a_control_token_that_an_assistant_lacks_is_mains_alone() -> None:
    """`<sep>` after b: only main knows it; what follows it is shared again."""
    one, two = with_controls((b"<sep>",), seed=1), with_controls((), seed=2)
    one.name, two.name = "one", "two"
    recipe = projected([one, two])
    ids, theirs = [97, 98, 257, 97], [97, 98, 97]
    found = scored(recipe, [one, two], [ids, theirs], "aba")
    assert found[2].logprob == pytest.approx(
        answer(one, ids).logprobs[1, _place(one, ids, 1, 257)].item(), abs=1e-5
    )
    parts = [answer(one, ids).rows([2]), answer(two, theirs).rows([1])]
    fused = recipe.fusion.fuse(parts, torch.tensor([recipe.weights]))  # type: ignore[union-attr]
    assert found[3].logprob == pytest.approx(fused.logprobs[0][fused.token_ids[0] == 97].amax().item(), abs=1e-5)


def _place(member: FakeMember, ids: list[int], row: int, token_id: int) -> int:
    return answer(member, ids).token_ids[row].tolist().index(token_id)


def slow_pairs(main: Track, other: Track) -> dict[int, int]:
    """Main's row -> the other's, found by walking: each control token takes the next of its name at its place."""
    ours, theirs = rests(main), rests(other)
    pairs: dict[int, int] = {}
    for row, rest in enumerate(ours):
        there = [r for r, place in enumerate(theirs) if place == rest]
        if row + 1 == len(ours) or ours[row + 1] != rest:
            pairs |= {row: there[-1]} if there else {}
            continue
        name = main.vocabulary.tokens[main.prompt_ids[row + 1]]
        used = max((pairs[r] for r in pairs if ours[r] == rest), default=-1)
        free = [r for r in there[:-1] if r > used and other.vocabulary.tokens[other.prompt_ids[r + 1]] == name]
        pairs |= {row: free[0]} if free else {}
    return pairs


CONTROLS = st.lists(st.sampled_from([97, 98, 256, 257, 258, 259]), min_size=1, max_size=12)


@given(CONTROLS, CONTROLS)
def test_control_tokens_are_paired_by_name_in_order(ids: list[int], theirs: list[int]) -> None:
    one, two = with_controls((b"<x>", b"<y>", b"<z>"), 1), with_controls((b"<y>", b"<x>", b"<w>"), 2)
    main, other = Track(one.vocabulary, ids), Track(two.vocabulary, theirs)
    found = _paired(main, other)
    assert found == slow_pairs(main, other)
    rows = [partner for _, partner in sorted(found.items())]
    assert rows == sorted(rows)


class CountedTokens(list[bytes]):
    """Counts how often a token is looked up."""

    num_lookups = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_lookups += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("partner", [257, 258])
def test_a_run_of_control_tokens_is_paired_in_time_linear_in_its_length(partner: int) -> None:
    plain = with_controls((b"<x>", b"<y>"), 1).vocabulary

    def lookups(num: int) -> int:
        tokens = CountedTokens(plain.tokens)
        vocabulary = Vocabulary(tokens, plain.special_ids, plain.stop_ids, plain.encode)
        _paired(Track(vocabulary, [97] + [257] * num), Track(vocabulary, [97] + [partner] * num))
        return tokens.num_lookups

    assert 0 < lookups(400) <= 2.1 * lookups(200)
