"""Lockstep decisions: rows are grouped by how they are fused, and each gets what it would get alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from fakes import FakeMember, byte_vocabulary, ensemble, pair_vocabulary, sequence

from ensemble_core.decoding.modes.base import Outcome, Turn
from ensemble_core.decoding.modes.lockstep import Lockstep
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.members.base import Answers, Feed

ALPHA = FakeMember("alpha", byte_vocabulary(), seed=1)
BETA = FakeMember("beta", pair_vocabulary(), seed=2)
GREEDY = SamplingParams(temperature=0.0)
DUO = ensemble([ALPHA, BETA])
TURNED = ensemble([BETA, ALPHA])
CLOSED = ensemble([ALPHA, BETA], support="closed")
ALONE = ensemble([ALPHA])
MEMBERS = {"alpha": ALPHA, "beta": BETA}
NUM_CANDIDATES = 32


def answered(recipes: list[Recipe], prompts: list[str]) -> tuple[list[Turn], dict[str, Answers]]:
    """Prefilled sequences, one per recipe, and each member's answers for all of them from one forward."""
    feeds: dict[str, list[Feed]] = {}
    turns = []
    for seq_id, (recipe, prompt) in enumerate(zip(recipes, prompts, strict=True)):
        each = sequence(seq_id, prompt, [MEMBERS[name] for name in recipe.members], recipe, GREEDY)
        numbers = {}
        for name in recipe.members:
            whole = recipe.fusion is not None and recipe.fusion.full_vocabulary
            top_k = len(MEMBERS[name].vocabulary) if whole else NUM_CANDIDATES
            numbers[name] = len(feeds.setdefault(name, []))
            feeds[name].append(Feed(seq_id, each.tracks[name].prompt_ids, top_k=top_k))
        turns.append(Turn(each, numbers))
    answers = {name: MEMBERS[name].forward(own) for name, own in feeds.items()}
    for name, own in feeds.items():
        for feed in own:
            MEMBERS[name].release(feed.seq_id)
    return turns, answers


def decide(turns: list[Turn], answers: dict[str, Answers]) -> Outcome:
    return Lockstep().decide(turns, answers, NUM_CANDIDATES)


def tokens(outcome: Outcome) -> dict[int, int]:
    """The token of each sequence, -1 if it fails."""
    return {d.sequence.seq_id: d.tokens[0].token_id if d.error is None else -1 for d in outcome.decisions}


def test_rows_of_different_recipes_get_what_they_get_alone() -> None:
    recipes = [DUO, ALONE, TURNED, DUO, CLOSED, ALONE, TURNED]
    prompts = ["a", "ab", "abc", "d\n", "ee", "c", "bad"]
    outcome = decide(*answered(recipes, prompts))
    found = tokens(outcome)
    for seq_id, (recipe, prompt) in enumerate(zip(recipes, prompts, strict=True)):
        single = decide(*answered([recipe], [prompt]))
        assert found[seq_id] == tokens(single)[0]
    assert len(outcome.fusions) == 4  # one for each recipe


def test_weights_are_each_rows_own() -> None:
    def weighted(share: float) -> Recipe:
        return Recipe("m", DUO.members, (share, 1 - share), DUO.fusion, "relative")

    outcome = decide(*answered([weighted(1.0), weighted(0.5), weighted(0.0)], ["ab"] * 3))
    (group,) = outcome.fusions
    assert group.agreed.keys() == {"beta"}
    found = tokens(outcome)
    assert found[0] == int(ALPHA.next_logits(list(b"ab")).argmax())
    # All weight is on the assistant: the byte that begins most of its mass wins.
    probs = BETA.next_logits(BETA.vocabulary.encode("ab")).softmax(dim=0)
    mass = torch.zeros(256)
    for token, p in zip(BETA.vocabulary.tokens[:-1], probs, strict=False):
        mass[token[0]] += p
    assert found[2] == int(mass.argmax())


def test_a_row_that_is_not_finite_counts_nowhere() -> None:
    made, answers = answered([DUO, DUO, DUO], ["a", "b", "c"])
    clean = tokens(decide(made, answers))
    answers["beta"].blocks[0].logprobs[1] = torch.nan
    outcome = decide(made, answers)
    assert tokens(outcome) == {**clean, 1: -1}
    (group,) = outcome.fusions
    assert sum(group.agreed["beta"]) == 2
    assert [len(masses) for masses in group.unmapped.values()] == [2, 2]


def test_agreement_is_of_bytes() -> None:
    made, answers = answered([DUO], ["ab"])
    for name, byte in (("alpha", ord("c")), ("beta", ord("c"))):
        logits = torch.full((1, len(MEMBERS[name].vocabulary)), -20.0)
        logits[0, byte] = 0.0
        answers[name].blocks[0].logprobs.copy_(logits.log_softmax(dim=1))
    (group,) = decide(made, answers).fusions
    assert (group.agreed, group.overruled) == ({"beta": (1, 0)}, 0)
    logits = torch.full((1, len(BETA.vocabulary)), -20.0)
    logits[0, BETA.vocabulary.ids_by_bytes[b"cd"]] = 0.0
    answers["beta"].blocks[0].logprobs.copy_(logits.log_softmax(dim=1))
    (group,) = decide(made, answers).fusions
    assert (group.agreed, group.overruled) == ({"beta": (0, 1)}, 0)


def test_of_equals_that_a_constraint_allows_the_lowest_is_in_reach() -> None:
    made, answers = answered([ALONE], ["ab"])
    whole = MEMBERS["alpha"].forward([Feed(0, list(b"ab"), top_k=len(ALPHA.vocabulary))])
    ALPHA.release(0)
    answers["alpha"] = whole
    whole.blocks[0].logprobs.fill_(-5.5)
    mask = torch.zeros(len(ALPHA.vocabulary), dtype=torch.bool)
    mask[50:250] = True
    outcome = decide([replace(made[0], mask=mask)], answers)
    assert tokens(outcome) == {0: 50}


def test_answers_of_several_widths_are_never_in_one_batch() -> None:
    """A schema beside as many biases as it adds candidates: equal widths in the fusion, other widths of answers."""
    num_biased = NUM_CANDIDATES // 2
    params = SamplingParams(
        temperature=0.0, logit_bias=tuple((token_id, 1.0) for token_id in range(97, 97 + num_biased))
    )
    free = sequence(0, "ab", [ALPHA], ALONE, params)
    bound = sequence(1, "ab", [ALPHA], ALONE, GREEDY)
    size = len(ALPHA.vocabulary)
    ids = free.tracks["alpha"].prompt_ids
    feeds = [Feed(0, ids, also=(free.pinned,), top_k=NUM_CANDIDATES + num_biased), Feed(1, ids, top_k=size)]
    answers = {"alpha": ALPHA.forward(feeds)}
    for seq_id in (0, 1):
        ALPHA.release(seq_id)
    turns = [Turn(free, {"alpha": 0}), Turn(bound, {"alpha": 1}, mask=torch.ones(size, dtype=torch.bool))]
    together = tokens(decide(turns, answers))
    assert together == tokens(decide(turns[:1], answers)) | tokens(decide(turns[1:], answers))
