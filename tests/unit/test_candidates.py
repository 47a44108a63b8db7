"""Candidates against torch's own log-softmax and sort."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble_core.members import candidates as module
from ensemble_core.members.base import Candidates
from ensemble_core.members.candidates import Whole, likeliest, narrow
from ensemble_core.members.kernels import plain
from ensemble_core.members.kernels.base import Kernels, Survey
from ensemble_core.members.kernels.choice import choose
from ensemble_core.members.kernels.plain import PlainKernels

CLOSE = {"atol": 2e-6, "rtol": 1e-6}


def random_logits(num_rows: int, vocabulary: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4.0 * torch.randn(num_rows, vocabulary, generator=generator)).to(dtype)


def reference(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.double(), dim=1)


def check_tail(found: Candidates, whole: Tensor) -> None:
    """The tail holds the mass of every id that is not among the candidates."""
    outside = whole.exp().scatter(1, found.token_ids, 0.0).sum(dim=1)
    torch.testing.assert_close(found.tail.double().exp(), outside, atol=2e-6, rtol=1e-5)


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds with numba and without."""
    if request.param == "torch":
        monkeypatch.setitem(globals(), "kernels", lambda logits: PlainKernels())


def kernels(logits: Tensor) -> Kernels:
    """Those under test: compiled ones where they serve, unless `way` puts plain ones here."""
    return choose([logits.device], logits.dtype)


def survey(logits: Tensor) -> Survey:
    return kernels(logits).survey(logits)


def top_candidates(logits: Tensor, top_k: int, also: Sequence[tuple[int, ...]] = ()) -> Candidates:
    return module.top_candidates(logits, top_k, also, kernels(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "top_k"), [(7, 1), (300, 5), (300, 299), (1000, 256)])
def test_best_ids_with_exact_logprobs(dtype: torch.dtype, vocabulary: int, top_k: int) -> None:
    logits = random_logits(5, vocabulary, dtype=dtype)
    found, whole = top_candidates(logits, top_k), reference(logits)
    expected = whole.sort(dim=1, descending=True).values[:, :top_k]
    assert found.token_ids.shape == found.logprobs.shape == (5, top_k)
    assert found.logprobs.dtype == found.tail.dtype == torch.float32
    torch.testing.assert_close(found.logprobs.double(), expected, **CLOSE)
    torch.testing.assert_close(found.logprobs.double(), whole.gather(1, found.token_ids), **CLOSE)
    assert all(len(set(row)) == top_k for row in found.token_ids.tolist())
    check_tail(found, whole)


@pytest.mark.parametrize("extra", [-1, 0, 1, 17])
def test_a_vocabulary_of_several_chunks(extra: int) -> None:
    logits = random_logits(3, 2 * plain._CHUNK + extra, seed=extra + 1)
    expected = torch.logsumexp(logits.double(), dim=1)
    torch.testing.assert_close(survey(logits).normaliser.double(), expected, atol=2e-6, rtol=1e-6)


def test_a_last_chunk_that_outweighs_all_others() -> None:
    logits = random_logits(2, plain._CHUNK + 1)
    logits[:, -1] = 80.0
    found = top_candidates(logits, 4)
    assert found.token_ids[:, 0].tolist() == [plain._CHUNK] * 2
    assert found.logprobs[:, 0].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("top_k", [300, 301, 10_000])
def test_whole_distributions_come_in_the_order_of_ids(top_k: int) -> None:
    logits = random_logits(4, 300)
    found = top_candidates(logits, top_k)
    assert torch.equal(found.token_ids, torch.arange(300).expand(4, 300))
    torch.testing.assert_close(found.logprobs.double(), reference(logits), **CLOSE)
    assert found.tail.tolist() == [-torch.inf] * 4


def test_also_forces_ids_in_and_keeps_the_number() -> None:
    logits = random_logits(3, 400, seed=5)
    order, whole = logits.argsort(dim=1, descending=True), reference(logits)
    least, second, best = int(order[0, -1]), int(order[1, 9]), int(order[1, 0])
    found = top_candidates(logits, 8, [(least, least), (best, second), ()])
    assert found.token_ids.shape == (3, 8)
    assert found.token_ids[0].tolist() == [*order[0, :7].tolist(), least]
    assert found.token_ids[1].tolist() == [*order[1, :7].tolist(), second]
    assert found.token_ids[2].tolist() == order[2, :8].tolist()
    torch.testing.assert_close(found.logprobs.double(), whole.gather(1, found.token_ids), **CLOSE)
    check_tail(found, whole)


def test_also_never_pushes_out_an_id_that_was_asked_for() -> None:
    logits = random_logits(1, 50, seed=6)
    order = logits.argsort(dim=1, descending=True)[0].tolist()
    asked = (order[3], order[40], order[2], order[45])
    found = top_candidates(logits, 4, [asked])
    assert sorted(found.token_ids[0].tolist()) == sorted(asked)


def test_a_row_that_is_not_finite_harms_no_other() -> None:
    logits = random_logits(4, 500, seed=7)
    clean = top_candidates(logits, 10)
    logits[1, 77] = torch.nan
    logits[3, 5] = torch.inf
    found = top_candidates(logits, 10, [(), (3,), (), (499,)])
    for row in (0, 2):
        assert torch.equal(found.logprobs[row], clean.logprobs[row])
        assert torch.equal(found.tail[row], clean.tail[row])
    for row in (1, 3):
        assert not found.logprobs[row].isfinite().any()
        assert bool(found.tail[row].isnan())
    whole = top_candidates(logits, 500)
    assert whole.logprobs[1].isnan().all()
    assert torch.equal(whole.logprobs[0], top_candidates(logits[:1], 500).logprobs[0])


def test_forbidden_ids_have_no_mass() -> None:
    logits = random_logits(2, 20)
    logits[:, 4:] = -torch.inf
    found = top_candidates(logits, 6)
    assert found.logprobs[:, 4:].tolist() == [[-torch.inf] * 2] * 2
    torch.testing.assert_close(found.logprobs.exp().sum(dim=1), torch.ones(2))
    assert (found.tail.exp() < 1e-6).all()


def test_no_rows() -> None:
    found = top_candidates(torch.empty(0, 30), 5)
    assert found.token_ids.shape == found.logprobs.shape == (0, 5)
    assert found.tail.shape == (0,)


def test_best_cuts_to_the_likeliest_and_moves_the_rest_to_the_tail() -> None:
    logits = random_logits(3, 200, seed=8)
    whole = top_candidates(logits, 200)
    expected, found = top_candidates(logits, 9), whole.best(9)
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.logprobs, expected.logprobs)
    check_tail(found, reference(logits))
    assert whole.best(200) is whole
    assert expected.best(9) is expected


def test_best_keeps_a_broken_row_apart() -> None:
    logits = random_logits(2, 40)
    logits[0, 0] = torch.nan
    found = top_candidates(logits, 40).best(5)
    assert found.logprobs[0].isnan().all()
    assert bool(found.tail[0].isnan())
    assert torch.equal(found.token_ids[1], top_candidates(logits, 5).token_ids[1])


@pytest.mark.parametrize("indices", [[2, 0], [1], [0, 1, 2], [0, 0, 2, 1], []])
def test_rows_are_picked_in_order(indices: list[int]) -> None:
    found = top_candidates(random_logits(3, 60), 4)
    picked = found.rows(indices)
    assert len(picked) == len(indices)
    for place, index in enumerate(indices):
        assert torch.equal(picked.token_ids[place], found.token_ids[index])
        assert torch.equal(picked.logprobs[place], found.logprobs[index])
        assert torch.equal(picked.tail[place], found.tail[index])


@pytest.mark.parametrize("wide", [40, 500])
def test_narrow_is_what_a_narrow_question_would_have_got(wide: int) -> None:
    logits = random_logits(4, 400, seed=9)
    order = logits.argsort(dim=1, descending=True)
    keep = [(int(order[0, 30]), int(order[0, 2])), (), (int(order[2, 38]),), (int(order[3, 9]),)]
    found, expected = narrow(top_candidates(logits, wide), 10, keep), top_candidates(logits, 10, keep)
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs)
    check_tail(found, reference(logits))


def test_narrow_to_all_there_is_changes_nothing() -> None:
    found = top_candidates(random_logits(2, 60), 8)
    assert narrow(found, 8, [(int(found.token_ids[0, 3]),), ()]) is found
    assert torch.equal(narrow(found, 3, [(), ()]).logprobs, found.best(3).logprobs)


def test_narrow_keeps_a_broken_row_apart() -> None:
    logits = random_logits(2, 60)
    logits[0, 3] = torch.nan
    found = narrow(top_candidates(logits, 60), 5, [(7,), (9,)])
    assert found.logprobs[0].isnan().all()
    assert torch.equal(found.token_ids[1], top_candidates(logits[1:], 5, [(9,)]).token_ids[0])


@pytest.mark.parametrize(("num_rows", "vocabulary"), [(1, 20_000), (5, 4096 + 7), (3, 262_144), (2, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_are_those_of_a_full_search(num_rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Also where many are equal, and where they lie side by side."""
    logits = torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary)).to(dtype)
    logits[0, 5:70] = 9.0
    logits[-1, -40:] += 5.0
    columns = likeliest(logits, 60, survey(logits))
    assert torch.equal(logits.gather(1, columns), logits.topk(60, dim=1).values)
    assert all(len(set(row)) == 60 for row in columns.tolist())


SHARED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LEVELS = st.sampled_from([-3.0, -1.0, -0.5, -0.0, 0.0, 0.5, 2.0, 30.0])


@st.composite
def tied_logits(draw: st.DrawFn) -> Tensor:
    """A few short rows in bfloat16 with few different numbers."""
    num_rows, vocabulary = draw(st.integers(1, 4)), draw(st.integers(2, 40))
    numbers = draw(st.lists(LEVELS, min_size=num_rows * vocabulary, max_size=num_rows * vocabulary))
    return torch.tensor(numbers, dtype=torch.bfloat16).view(num_rows, vocabulary)


def ordered_ids(logits: Tensor, row: int) -> list[int]:
    """All ids of a row: likelier first, of equals the lowest."""
    numbers = logits[row].tolist()
    return sorted(range(len(numbers)), key=lambda token_id: (-numbers[token_id], token_id))


def expected_ids(logits: Tensor, row: int, num: int, asked: Sequence[int]) -> list[int]:
    """What a row of `num` candidates holds, in order."""
    order = ordered_ids(logits, row)
    rest = [token_id for token_id in order if token_id not in asked]
    return sorted([*set(asked), *rest][:num], key=order.index)


def crowded(num_rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Logits in bfloat16 as models have them: hundreds of equals around the 256th likeliest."""
    return random_logits(num_rows, vocabulary, seed, torch.bfloat16).round()


def assert_same(found: Candidates, expected: Candidates) -> None:
    """Bit by bit."""
    for ours, theirs in (
        (found.token_ids, expected.token_ids),
        (found.logprobs, expected.logprobs),
        (found.tail, expected.tail),
    ):
        assert torch.equal(ours, theirs)


@SHARED
@given(tied_logits(), st.data())
def test_a_row_is_the_first_of_one_order_with_what_is_asked_for(logits: Tensor, data: st.DataObject) -> None:
    num_rows, vocabulary = logits.shape
    asked = data.draw(st.lists(st.lists(st.integers(0, vocabulary - 1)), min_size=num_rows, max_size=num_rows))
    also = [tuple(ids) for ids in asked]
    top_k = data.draw(st.integers(1, vocabulary))
    width = max(top_k, *(len(set(ids)) for ids in also))
    found, whole = top_candidates(logits, top_k, also), top_candidates(logits, vocabulary)
    assert found.token_ids.shape == (num_rows, min(width, vocabulary))
    again = narrow(whole, top_k, also)
    for row in range(num_rows):
        expected = expected_ids(logits, row, width, also[row])
        if width < vocabulary:
            assert found.token_ids[row].tolist() == expected
        assert sorted(again.token_ids[row].tolist()) == sorted(expected)
        assert torch.equal(found.logprobs[row], whole.logprobs[row, found.token_ids[row]])
    if width < vocabulary:
        assert_same(again, found)


@SHARED
@given(tied_logits(), st.data())
def test_fewer_are_the_first_of_more_and_rows_do_not_touch(logits: Tensor, data: st.DataObject) -> None:
    num_rows, vocabulary = logits.shape
    top_k = data.draw(st.integers(1, vocabulary - 1))
    more = data.draw(st.integers(top_k, vocabulary))
    few, many = top_candidates(logits, top_k), top_candidates(logits, more)
    assert_same(many.best(top_k), few)
    if more < vocabulary:
        assert torch.equal(many.token_ids[:, :top_k], few.token_ids)
        assert torch.equal(many.logprobs[:, :top_k], few.logprobs)
    for row in range(num_rows):
        assert_same(top_candidates(logits[row : row + 1], top_k), few.rows([row]))


@pytest.mark.parametrize("vocabulary", [1024, 5000, 20_000, 49_152, 70_001])
@pytest.mark.parametrize("top_k", [1, 60, 256])
def test_equals_in_many_stripes(vocabulary: int, top_k: int) -> None:
    logits = crowded(4, vocabulary, seed=vocabulary)
    logits[1] = 0.25
    logits[2, 7::5] = 20.0
    logits[3, -30:] = 20.0
    found = top_candidates(logits, top_k)
    for row in range(4):
        assert found.token_ids[row].tolist() == ordered_ids(logits, row)[:top_k]
        assert_same(top_candidates(logits[row : row + 1], top_k), found.rows([row]))
    assert_same(top_candidates(logits, vocabulary).best(top_k), found)


def test_the_largest_vocabulary_with_equals_and_ids_that_are_asked_for() -> None:
    logits = crowded(3, 262_144, seed=3)
    order = [ordered_ids(logits, row) for row in range(3)]
    also = [(), (order[1][255], order[1][256], order[1][-1]), tuple(order[2][9:300:29])]
    found = top_candidates(logits, 256, also)
    for row in range(3):
        assert found.token_ids[row].tolist() == expected_ids(logits, row, 256, also[row])
    check_tail(found, reference(logits))
    assert_same(narrow(top_candidates(logits, 400, also), 256, also), found)
    assert_same(narrow(top_candidates(logits, 262_144), 256, also), found)


def test_a_row_does_not_depend_on_a_neighbour_with_a_bias() -> None:
    """A neighbour's bias widens the answer of a whole forward; what is cut from it is what was there alone."""
    logits = crowded(2, 49_152)
    alone = top_candidates(logits[:1], 256)
    beside = top_candidates(logits, 256 + 3, [(), (5, 6, 49_000)]).rows([0]).best(256)
    assert_same(beside, alone)
    assert_same(top_candidates(logits, 49_152).rows([0]).best(256), alone)


def test_more_ids_are_asked_for_than_candidates() -> None:
    """257 biased ids at K = 64: the answer is as wide as what is asked for, and the other rows are whole."""
    logits = crowded(3, 20_000, seed=4)
    biased = tuple(range(500, 757))
    for also in ([(), biased, (3, 4)], [(), biased + biased, (4, 3)]):
        found = top_candidates(logits, 64, also)
        assert found.token_ids.shape == (3, 257)
        assert sorted(found.token_ids[1].tolist()) == list(biased)
        assert found.token_ids[0].tolist() == ordered_ids(logits, 0)[:257]
        assert found.token_ids[2].tolist() == expected_ids(logits, 2, 257, (3, 4))
        check_tail(found, reference(logits))
        assert_same(narrow(top_candidates(logits, 64 + 257, also), 64, also), found)
        assert narrow(found, 64, also) is found
    assert len(top_candidates(logits[:, :300], 64, [tuple(range(300)), (), ()]).token_ids[0]) == 300


def test_zeros_of_both_signs_are_equals() -> None:
    logits = torch.full((1, 30), -5.0)
    logits[0, [20, 3, 11, 7]] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    assert top_candidates(logits, 3).token_ids.tolist() == [[3, 7, 11]]


def test_logits_that_no_log_probability_tells_apart_are_equals() -> None:
    """Whole distributions hold log-probabilities alone, and must be cut to the same ids."""
    logits = torch.zeros(1, 400)
    logits[0, 50:] -= 1e-9 * torch.arange(350, 0, -1)
    logits[0, 300] = 2.0
    found = top_candidates(logits, 5)
    assert found.token_ids.tolist() == [[300, 0, 1, 2, 3]]
    assert_same(top_candidates(logits, 400).best(5), found)
    logits[0, :50] = -1e-9
    assert top_candidates(logits, 5).token_ids.tolist() == [[300, 0, 1, 2, 3]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_among_equals_harms_no_other(bad: float) -> None:
    logits = crowded(3, 20_000, seed=5)
    clean = top_candidates(logits, 64, [(), (9,), (8, 7)])
    logits[1] = bad
    found = top_candidates(logits, 64, [(), (9,), (8, 7)])
    assert_same(found.rows([0, 2]), clean.rows([0, 2]))
    assert not found.logprobs[1].isfinite().any()
    assert 9 in found.token_ids[1].tolist()
    assert len(set(found.token_ids[1].tolist())) == 64
    assert not found.best(5).logprobs[1].isfinite().any()
    assert_same(narrow(found, 30, [(), (9,), (8,)]).rows([0, 2]), narrow(clean.rows([0, 2]), 30, [(), (8,)]))


def test_best_of_candidates_that_are_in_no_order() -> None:
    """As another server may send them."""
    logprobs = torch.tensor([[-2.0, -1.0, -2.0, -1.0, -3.0]])
    token_ids = torch.tensor([[8, 9, 2, 4, 1]])
    given = Candidates(token_ids, logprobs, torch.tensor([-2.0]))
    assert given.best(3).token_ids.tolist() == [[4, 9, 2]]
    assert narrow(given, 3, [(8, 1)]).token_ids.tolist() == [[4, 8, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [5120, 20_011])
def test_a_whole_vocabulary_says_the_same_before_and_after_all_of_it_is_read(
    vocabulary: int, dtype: torch.dtype
) -> None:
    logits = random_logits(3, vocabulary, dtype=dtype)
    logits[1, 7] = torch.nan
    whole = top_candidates(logits, vocabulary)
    assert isinstance(whole, Whole)
    plain = whole.computed()
    assert type(plain) is Candidates
    places = torch.tensor([5, 2, vocabulary - 1])
    for lazy, read in ((whole, plain), (whole.rows([2, 0]), plain.rows([2, 0]))):
        assert len(lazy) == len(read)
        same(lazy, read)
        fine = torch.tensor([i for i in range(len(read)) if not read.logprobs[i].isnan().any()])
        assert torch.equal(lazy.first(50)[fine], read.first(50)[fine])
        same(lazy.at(places.expand(len(read), 3)), read.at(places.expand(len(read), 3)))
        assert torch.equal(lazy.numbers(0, places), read.numbers(0, places))
    same(whole.rows([0, 2]).best(40), plain.rows([0, 2]).best(40))
    assert whole.rows([1]).best(5).logprobs.isnan().all()


def same(found: Candidates, wanted: Candidates) -> None:
    """Bit for bit."""
    assert torch.equal(found.token_ids, wanted.token_ids)
    for a, b in ((found.logprobs, wanted.logprobs), (found.tail, wanted.tail)):
        torch.testing.assert_close(a, b, atol=0.0, rtol=0.0, equal_nan=True)
