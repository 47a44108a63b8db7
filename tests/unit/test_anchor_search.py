"""Matrices derived from one wide search, against the builder itself; and the plain cosines of the uncentred one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.matrix import Anchors, TransferMatrix, common_anchors
from ensemble_core.transfer.rows import RowRecipe, build_matrix
from studies import anchor_search
from studies.anchor_search import Searcher, fewer, refusal

NUM, WIDTH = 90, 12


@pytest.fixture
def vocabulary() -> Vocabulary:
    tokens = [b"token %d" % i for i in range(NUM)] + [b"<s>", b"</s>"]
    return Vocabulary(tokens, frozenset({NUM, NUM + 1}), frozenset({NUM + 1}), encode=lambda text: [])


@pytest.fixture
def anchors(vocabulary: Vocabulary) -> Anchors:
    other = Vocabulary(vocabulary.tokens[:70], frozenset(), frozenset(), encode=lambda text: [])
    return common_anchors([vocabulary, other])


@pytest.fixture
def embeddings() -> Tensor:
    return torch.randn(NUM + 2, WIDTH, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.fixture
def searcher(
    tmp_path: Path, vocabulary: Vocabulary, embeddings: Tensor, monkeypatch: pytest.MonkeyPatch
) -> Searcher:
    monkeypatch.setattr(anchor_search, "WIDEST", 24)
    return Searcher("one", vocabulary, lambda: embeddings, tmp_path / "searches")


def dense(matrix: TransferMatrix) -> Tensor:
    """(V, A)."""
    out = torch.zeros(matrix.columns.shape[0], matrix.num_anchors)
    return out.scatter_add_(1, matrix.columns.long(), matrix.values.float())


@pytest.mark.parametrize(("top_k", "temperature"), [(24, 20.0), (8, 20.0), (8, 5.0), (1, 10.0)])
def test_a_derived_matrix_is_the_builders(
    searcher: Searcher,
    vocabulary: Vocabulary,
    anchors: Anchors,
    embeddings: Tensor,
    top_k: int,
    temperature: float,
) -> None:
    derived = searcher.search("centred", anchors).matrix(top_k, temperature)
    built, _ = build_matrix(
        vocabulary, embeddings, anchors, RowRecipe("centred", top_k, temperature), block_dtype=torch.float32
    )
    torch.testing.assert_close(dense(derived), dense(built), atol=2e-3, rtol=0)
    assert torch.equal(derived.anchor_ids, built.anchor_ids)


def test_the_papers_rows_are_the_builders(
    searcher: Searcher, vocabulary: Vocabulary, anchors: Anchors, embeddings: Tensor
) -> None:
    derived = searcher.search("deepen", anchors).matrix(8)
    built, _ = build_matrix(
        vocabulary, embeddings, anchors, RowRecipe("deepen", 8, 0.0), block_dtype=torch.float32
    )
    torch.testing.assert_close(dense(derived), dense(built), atol=2e-3, rtol=0)


def test_uncentred_rows_are_a_softmax_of_plain_cosines(
    searcher: Searcher, anchors: Anchors, embeddings: Tensor
) -> None:
    matrix = dense(searcher.search("uncentred", anchors).matrix(4, 10.0))
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    best = (unit[3] @ unit[anchors.ids(searcher.vocabulary)[:-1]].T).topk(4)
    expected = torch.zeros(len(anchors)).scatter_(0, best.indices, (10 * best.values).softmax(dim=0))
    torch.testing.assert_close(matrix[3], expected, atol=2e-3, rtol=0)
    assert matrix[NUM + 1, -1] == 1.0  # a stop token is end of text
    assert matrix[NUM].sum() == 0.0  # a control token says nothing


def test_a_search_is_made_once(searcher: Searcher, anchors: Anchors, tmp_path: Path) -> None:
    first = searcher.search("centred", anchors)

    def missing() -> Tensor:
        raise AssertionError("read again")

    again = Searcher("one", searcher.vocabulary, missing, searcher.folder).search("centred", anchors)
    assert torch.equal(first.columns, again.columns)
    assert torch.equal(first.logits, again.logits)
    with pytest.raises(AssertionError, match="read again"):
        Searcher("one", searcher.vocabulary, missing, searcher.folder).search("centred", fewer(anchors, 30))


def test_fewer_anchors_are_a_sorted_part(anchors: Anchors) -> None:
    part = fewer(anchors, 30)
    assert len(part.tokens) == 30
    assert list(part.tokens) == sorted(part.tokens)
    assert set(part.tokens) < set(anchors.tokens)
    assert fewer(anchors, 1000) == anchors


def test_the_builders_refusal_is_told(searcher: Searcher, anchors: Anchors) -> None:
    found = searcher.search("deepen", anchors)
    assert "keeps too little" in refusal("one", found, RowRecipe("deepen", 24, 0.0), 1.01)
    assert refusal("one", found, RowRecipe("deepen", 24, 0.0), 0.0) == ""
