"""The parts of the study of unlike vocabularies that have an answer known beforehand."""

from __future__ import annotations

import itertools

import pytest
import torch
from fakes import byte_vocabulary

from studies import linear_map, row_sources, unlike_pairs
from studies.unlike_pairs import DIRECT, RELATIVE, ways
from studies.unlike_vocabularies import FULL, SERVED, greek


def test_a_learnt_map_finds_a_permutation() -> None:
    """The assistant knows the next token, in other names; main knows nothing."""
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    said = torch.arange(8).repeat(20)
    assistant = torch.nn.functional.one_hot(said, 8).float()
    found = linear_map.learn(torch.full((160,), 1 / 8), assistant, order[said], 8, steps=30)
    assert found.table.argmax(dim=1).tolist() == order.tolist()
    assert found.main_weight == pytest.approx(0.0, abs=1e-3)
    assert found.table.sum(dim=1) == pytest.approx(torch.ones(8), abs=1e-4)


def test_each_step_of_learning_raises_the_likelihood() -> None:
    draw = torch.Generator().manual_seed(1)
    own, assistant = torch.rand(200, generator=draw), torch.rand(200, 6, generator=draw)
    assistant /= assistant.sum(dim=1, keepdim=True)
    true = torch.randint(9, (200,), generator=draw)
    fits = [linear_map.learn(own, assistant, true, 9, steps) for steps in range(1, 12)]
    likelihoods = [float(fit.logprobs(own, assistant, true).sum()) for fit in fits]
    assert all(after >= before - 1e-3 for before, after in itertools.pairwise(likelihoods))
    assert likelihoods[-1] > likelihoods[0]


def test_contexts_count_all_tokens_with_which_the_text_goes_on() -> None:
    vocabulary = byte_vocabulary(("ab", "abc"))
    rows, tokens = row_sources._continuations(vocabulary, vocabulary.encode("xabcab"))
    found = [(row, vocabulary.tokens[token]) for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
    assert found == [(0, b"a"), (0, b"ab"), (0, b"abc"), (1, b"a"), (1, b"ab")]


def test_a_log_linear_pool_of_anchors_is_main_alone_or_the_assistant_with_all_weight() -> None:
    draw = torch.Generator().manual_seed(2)
    own, other = (torch.randn(5, 4, generator=draw).double().log_softmax(dim=1) for _ in range(2))
    anchor, within = torch.tensor([0, 1, 2, 3, 0]), torch.rand(5, generator=draw).double()
    nats = within - own[torch.arange(5), anchor]
    torch.testing.assert_close(unlike_pairs._geometric((own, other, anchor, nats), 1.0), nats)
    expected = within - other[torch.arange(5), anchor]
    torch.testing.assert_close(unlike_pairs._geometric((own, other, anchor, nats), 0.0), expected)


def test_ways_have_names_of_their_own_and_the_first_pair_has_all() -> None:
    every, few = ([way.label for way in ways(which)] for which in (True, False))
    assert len(set(every)) == len(every)
    assert set(few) < set(every)
    assert set(SERVED) <= set(few)
    assert {way.kind for way in ways(every=True)} == {DIRECT, RELATIVE}


def test_greek_letters_stand_for_latin_ones_one_for_one() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    assert len(set(greek(letters))) == 26
    assert not set(greek(letters)) & set(letters)
    assert greek("A b, 1!") == "Α β, 1!"


def test_every_pair_is_of_members_that_are_trained() -> None:
    assert {name for pair in FULL.pairs.values() for name in pair.members} == set(FULL.learners)
