import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.matrix import Anchors, TransferMatrix, common_anchors

token = st.binary(min_size=1, max_size=3)


def vocabulary(tokens, specials=(), stops=()):
    return Vocabulary(list(tokens), frozenset(specials), frozenset(stops), encode=lambda text: [])


@given(st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=4))
def test_anchors_are_the_sorted_intersection(tokens):
    anchors = common_anchors([vocabulary(own) for own in tokens])
    assert anchors.tokens == tuple(sorted(set.intersection(*map(set, tokens))))
    assert len(anchors) == len(anchors.tokens) + 1


@given(st.lists(token, min_size=1, max_size=12), st.lists(token, min_size=1, max_size=12))
def test_an_anchors_own_token_has_its_bytes(first, second):
    left, right = vocabulary(first), vocabulary(second)
    anchors = common_anchors([left, right])
    for member in (left, right):
        ids = anchors.ids(member)
        assert [member.tokens[i] for i in ids[:-1].tolist()] == list(anchors.tokens)
        assert ids[-1] == -1  # no stop id


def test_specials_and_stops_are_no_anchors():
    left = vocabulary([b"a", b"<s>", b"</s>"], specials=[1, 2], stops=[2])
    right = vocabulary([b"<s>", b"a", b"</s>", b"x"], stops=[2, 0])
    anchors = common_anchors([left, right])
    assert anchors.tokens == (b"a",)
    assert anchors.ids(left).tolist() == [0, 2]
    assert anchors.ids(right).tolist() == [1, 0]  # the lowest stop id


def test_fingerprint_tells_where_one_token_ends():
    assert Anchors((b"ab", b"c")).fingerprint != Anchors((b"a", b"bc")).fingerprint
    assert Anchors((b"ab", b"c")).fingerprint == Anchors((b"ab", b"c")).fingerprint


def test_rows_and_their_mass():
    columns = torch.tensor([[0, 1], [2, 0], [0, 0]], dtype=torch.int32)
    values = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float16)
    matrix = TransferMatrix(columns, values, torch.tensor([5, 6, -1]))
    picked, weights = matrix.rows(torch.tensor([[1], [0]]))
    assert picked.dtype == torch.int64
    assert picked.tolist() == [[[2, 0]], [[0, 1]]]
    assert weights.tolist() == [[[1.0, 0.0]], [[0.25, 0.75]]]
    assert matrix.row_mass.tolist() == [1.0, 1.0, 0.0]
    assert matrix.num_anchors == 3
