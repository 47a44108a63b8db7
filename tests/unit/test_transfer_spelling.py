"""Rows by spelling, and what relative fusion makes of them."""

from __future__ import annotations

import pytest
import torch
from fakes import byte_vocabulary
from fusion_cases import FIRST, MAIN, answers, logits_of, space, weights_of, with_control
from torch import Tensor

from ensemble_core.errors import TransferMatrixError
from ensemble_core.fusion.base import FUSIONS, Fused, Fusion, FusionSpace, build_fusion
from ensemble_core.fusion.projection import ProjectionFusion, ProjectionOptions
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.matrix import Anchors, TransferMatrix, common_anchors
from ensemble_core.transfer.spelling import spelling_matrix

PAIR = (MAIN, FIRST)
LETTERS = byte_vocabulary(())


def matrices(*vocabularies: Vocabulary) -> list[TransferMatrix]:
    anchors = common_anchors(vocabularies)
    return [spelling_matrix(vocabulary, anchors, torch.float32)[0] for vocabulary in vocabularies]


def relative(*vocabularies: Vocabulary, **options: object) -> Fusion:
    found = FusionSpace(vocabularies, lambda: matrices(*vocabularies), torch.device("cpu"), ("a", "b"))
    return build_fusion("relative", FUSIONS.parse("relative", dict(options), "fusion"), found)


def dense(fused: Fused, size: int) -> Tensor:
    """(B, V) probabilities."""
    p = torch.zeros(len(fused.token_ids), size, dtype=torch.float64)
    return p.scatter_add(1, fused.token_ids, fused.logprobs.double().exp())


def test_a_token_stands_at_the_longest_anchor_that_it_begins_with() -> None:
    anchors = common_anchors(PAIR)
    for vocabulary in PAIR:
        matrix, _ = spelling_matrix(vocabulary, anchors)
        for token_id, token in enumerate(vocabulary.tokens):
            if token_id in vocabulary.special_ids:
                continue
            column, value = int(matrix.columns[token_id, 0]), float(matrix.values[token_id, 0])
            beginnings = [each for each in anchors.tokens if token.startswith(each)]
            assert value == 1.0
            assert anchors.tokens[column] == max(beginnings, key=len)


def test_an_anchor_is_its_own_row_and_stop_ids_meet_at_the_end() -> None:
    anchors = common_anchors(PAIR)
    for vocabulary in PAIR:
        matrix, quality = spelling_matrix(vocabulary, anchors)
        own = matrix.anchor_ids[:-1]
        assert matrix.columns[own, 0].tolist() == list(range(len(anchors.tokens)))
        assert {int(matrix.columns[stop, 0]) for stop in vocabulary.stop_ids} == {len(anchors) - 1}
        assert quality.median_anchors == 1.0


def test_what_begins_with_no_anchor_and_control_tokens_have_empty_rows() -> None:
    vocabulary = with_control(MAIN, b"<mark>")
    matrix, quality = spelling_matrix(vocabulary, Anchors((b"a", b"ab")))
    has_row = [bool(mass) for mass in matrix.row_mass]
    assert has_row[vocabulary.ids_by_bytes[b"abc"]]
    assert not has_row[vocabulary.ids_by_bytes[b"cd"]]
    assert not has_row[-1]
    assert quality.retained[0] == 0.0
    with pytest.raises(TransferMatrixError, match="share no tokens"):
        spelling_matrix(MAIN, Anchors(()))


def test_main_shares_out_what_an_anchor_gets_in_its_own_proportions() -> None:
    """p(v) = p_main(v) r(c(v)) / q(c(v)), written out; one step of EM is the last."""
    logits, weights = logits_of((MAIN, LETTERS), 5, seed=1), weights_of(5, 2, seed=2)
    p_main, p_letters = (each.double().softmax(dim=1) for each in logits)
    rows = [each.columns[:, 0].long() for each in matrices(MAIN, LETTERS)]
    size = len(common_anchors((MAIN, LETTERS)))
    main, letters = (
        torch.zeros(5, size, dtype=torch.float64).index_add(1, own, p)
        for own, p in zip(rows, (p_main, p_letters), strict=True)
    )
    wanted = weights[:, :1] * main + weights[:, 1:] * letters
    expected = p_main * (wanted / main)[:, rows[0]]
    for steps in (1, 4):
        for support in ("closed", "full"):
            fusion = relative(MAIN, LETTERS, steps=steps, support=support)
            found = dense(fusion.fuse(answers(logits), weights), len(MAIN))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_letter_reaches_every_word_that_begins_with_it_where_the_direct_map_reaches_the_letter_alone() -> None:
    main = torch.full((1, len(MAIN)), -20.0)
    main[0, [MAIN.ids_by_bytes[token] for token in (b"abc", b" dea")]] = 0.0
    letters = torch.full((1, len(LETTERS)), -20.0)
    letters[0, LETTERS.ids_by_bytes[b"a"]] = 0.0
    both, weights = answers([main, letters]), torch.tensor([[0.5, 0.5]])
    word = MAIN.ids_by_bytes[b"abc"]
    direct = ProjectionFusion(space((MAIN, LETTERS)), ProjectionOptions())
    assert dense(direct.fuse(both, weights), len(MAIN))[0, word] == pytest.approx(0.25, abs=1e-3)
    assert dense(relative(MAIN, LETTERS).fuse(both, weights), len(MAIN))[0, word] == pytest.approx(0.75, abs=1e-3)


def test_equal_vocabularies_are_the_linear_pool() -> None:
    pair = (MAIN, MAIN)
    logits, weights = logits_of(pair, 4, seed=3), weights_of(4, 2, seed=4)
    direct = ProjectionFusion(space(pair), ProjectionOptions()).fuse(answers(logits), weights)
    found = relative(*pair).fuse(answers(logits), weights)
    torch.testing.assert_close(dense(found, len(MAIN)), dense(direct, len(MAIN)), atol=1e-5, rtol=1e-4)
