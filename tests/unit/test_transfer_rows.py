"""The builder against the formulas, written out densely in float64."""

import dataclasses
import io
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_core.errors import TransferMatrixError
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.matrix import TransferMatrix, common_anchors
from ensemble_core.transfer.rows import QUANTILES, RowRecipe, build_matrix, require_retained

NUM_SHARED, NUM_OWN, WIDTH = 60, 30, 16
# id -> role, after the ordinary tokens
SPECIAL, STOP, OTHER_STOP, NAMELESS = range(NUM_SHARED + NUM_OWN, NUM_SHARED + NUM_OWN + 4)
EXACT = {"block_dtype": torch.float32, "value_dtype": torch.float32, "progress": False}
LOOSE = {"atol": 1e-5, "rtol": 1e-4}
CENTRED, DEEPEN = RowRecipe("centred", 8, 20.0), RowRecipe("deepen", 8, 20.0)


def vocabulary(prefix, seed):
    """60 shared tokens and 30 of its own in random order, then a special, two stops, and an id without bytes."""
    ordinary = [b"shared %d" % i for i in range(NUM_SHARED)] + [prefix + b"%d" % i for i in range(NUM_OWN)]
    order = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens = [ordinary[i] for i in order] + [b"<s>", b"</s>", b"<eot>", b""]
    specials, stops = frozenset({SPECIAL, STOP, NAMELESS}), frozenset({STOP, OTHER_STOP})
    return Vocabulary(tokens, specials, stops, encode=lambda text: [])


def embeddings(seed, size=NUM_SHARED + NUM_OWN + 4):
    """Rows that lean one way, as tied embeddings do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, WIDTH, generator=generator) + 0.5


@pytest.fixture(scope="module")
def member():
    return vocabulary(b"own ", 1)


@pytest.fixture(scope="module")
def anchors(member):
    return common_anchors([member, vocabulary(b"other ", 2)])


def dense(vocabulary, embeddings, anchors, recipe):
    """(V, A) float64: the relative representation by the formulas, nothing pruned."""
    table = embeddings.double()
    ids = [vocabulary.tokens.index(token) for token in anchors.tokens]
    result = torch.zeros(len(vocabulary), len(anchors), dtype=torch.float64)
    mean = table[ids].mean(0) if recipe.name == "centred" else 0.0
    unit = (table - mean) / (table - mean).norm(dim=1, keepdim=True)
    similarity = unit @ unit[ids].T  # (V, A - 1)
    for row, token in enumerate(vocabulary.tokens):
        if row in vocabulary.stop_ids:
            result[row, -1] = 1.0
        elif token and row not in vocabulary.special_ids:
            cosines = similarity[row]
            sharpness = recipe.temperature if recipe.name == "centred" else 100 / cosines.pow(2).sum().sqrt()
            result[row, :-1] = (sharpness * cosines).softmax(0)
    return result


def pruned(full, top_k):
    """The k best of each row, renormalised, and what share of the row they held."""
    best = full.topk(top_k, dim=1)
    kept = torch.zeros_like(full).scatter(1, best.indices, best.values)
    share = kept.sum(1)
    return kept / share.clamp_min(1e-30)[:, None], share


def expand(matrix: TransferMatrix):
    full = torch.zeros(len(matrix.columns), matrix.num_anchors, dtype=torch.float64)
    return full.scatter_add(1, matrix.columns.long(), matrix.values.double())


@pytest.mark.parametrize("recipe", [CENTRED, DEEPEN], ids=lambda r: r.name)
@pytest.mark.parametrize("top_k", [1, 8, NUM_SHARED - 1])
def test_equals_the_formulas(member, anchors, recipe, top_k):
    recipe = dataclasses.replace(recipe, top_k=top_k)
    matrix, quality = build_matrix(member, embeddings(3), anchors, recipe, **EXACT)
    expected, share = pruned(dense(member, embeddings(3), anchors, recipe), top_k)
    torch.testing.assert_close(expand(matrix), expected, atol=2e-6, rtol=1e-4)
    ids = anchors.ids(member)[:-1]
    quantiles = torch.tensor(QUANTILES, dtype=torch.float64)
    ordinary = share[: NUM_SHARED + NUM_OWN]
    torch.testing.assert_close(torch.tensor(quality.retained).double(), ordinary.quantile(quantiles), **LOOSE)
    expected_anchors = share[ids].quantile(quantiles)
    torch.testing.assert_close(torch.tensor(quality.retained_anchors).double(), expected_anchors, **LOOSE)


@pytest.mark.parametrize("recipe", [CENTRED, DEEPEN], ids=lambda r: r.name)
@pytest.mark.parametrize("top_k", [NUM_SHARED, 10_000])
def test_enough_anchors_lose_nothing(member, anchors, recipe, top_k):
    recipe = dataclasses.replace(recipe, top_k=top_k)
    matrix, quality = build_matrix(member, embeddings(3), anchors, recipe, **EXACT)
    expected = dense(member, embeddings(3), anchors, recipe)
    torch.testing.assert_close(expand(matrix), expected, atol=1e-7, rtol=1e-4)
    assert quality.retained == pytest.approx([1.0] * len(QUANTILES), abs=1e-6)


@pytest.mark.parametrize("recipe", [CENTRED, DEEPEN], ids=lambda r: r.name)
def test_coarse_blocks_cost_no_more_than_rounding(member, anchors, recipe):
    """Kept entries are scored in float32 and stored as float16 (2^-11); the retained mass is bfloat16 (2^-8)."""
    table = embeddings(3).bfloat16()
    matrix, quality = build_matrix(member, table, anchors, recipe, progress=False)
    expected, share = pruned(dense(member, table, anchors, recipe), recipe.top_k)
    assert matrix.values.dtype == torch.float16
    torch.testing.assert_close(expand(matrix), expected, atol=1e-6, rtol=2**-10)
    ordinary = share[: NUM_SHARED + NUM_OWN]
    # A logit of up to 20 is off by up to 20 * 2^-9, and so is its mass, relatively.
    assert quality.median == pytest.approx(ordinary.median().item(), rel=20 * 2**-9)


@pytest.mark.parametrize("recipe", [CENTRED, DEEPEN], ids=lambda r: r.name)
def test_blocks_do_not_show(member, anchors, recipe):
    whole, quality = build_matrix(member, embeddings(3), anchors, recipe, block_rows=10_000, **EXACT)
    for size in (1, 7):
        parts, same = build_matrix(member, embeddings(3), anchors, recipe, block_rows=size, **EXACT)
        torch.testing.assert_close(expand(parts), expand(whole), atol=1e-6, rtol=1e-5)
        assert same.retained == pytest.approx(quality.retained, abs=1e-6)


def test_gathered_scores_equal_the_dense_product():
    """Many anchors and few kept: the kept are scored from gathered embeddings, not by one dense product."""
    tokens = [b"%d" % i for i in range(400)]
    member = Vocabulary(tokens, frozenset(), frozenset(), encode=lambda text: [])
    anchors, table = common_anchors([member]), embeddings(5, 400)
    matrix, _ = build_matrix(member, table, anchors, CENTRED, **EXACT)
    expected, _ = pruned(dense(member, table, anchors, CENTRED), CENTRED.top_k)
    torch.testing.assert_close(expand(matrix), expected, atol=2e-6, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    top_k=st.integers(1, 70),
    temperature=st.floats(0.01, 500.0),
    name=st.sampled_from(["centred", "deepen"]),
)
def test_every_row_keeps_its_rule(seed, top_k, temperature, name):
    member = vocabulary(b"own ", seed % 1000)
    anchors = common_anchors([member, vocabulary(b"other ", 2)])
    recipe = RowRecipe(name, top_k, temperature)
    matrix, quality = build_matrix(member, embeddings(seed), anchors, recipe, progress=False)
    rows = expand(matrix)
    sums = rows.sum(1)
    assert sums[SPECIAL] == sums[NAMELESS] == 0.0
    for stop in (STOP, OTHER_STOP):
        assert rows[stop].nonzero().tolist() == [[len(anchors) - 1]]
        assert rows[stop, -1] == 1.0
    assert rows[: NUM_SHARED + NUM_OWN, -1].max() == 0.0
    assert sums[: NUM_SHARED + NUM_OWN].sub(1).abs().max() < 2**-10
    own = anchors.ids(member)[:-1]
    assert rows[own, :-1].argmax(1).tolist() == list(range(NUM_SHARED))  # an anchor is nearest to itself
    assert all(0.0 < share <= 1.0 for share in quality.retained)
    assert list(quality.retained) == sorted(quality.retained)


def test_columns_ascend_and_padding_is_last(member, anchors):
    matrix, _ = build_matrix(member, embeddings(3), anchors, RowRecipe("centred", 20, 300.0), progress=False)
    used = matrix.values > 0
    assert not used.all(), "the sharp rows must have entries that round to nothing"
    for columns, mask in zip(matrix.columns.tolist(), used.tolist(), strict=True):
        width = sum(mask)
        assert mask == [True] * width + [False] * (len(mask) - width)
        assert columns[:width] == sorted(set(columns[:width]))
        assert set(columns[width:]) <= {0}


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_shows_on_a_terminal_only(member, anchors, monkeypatch, terminal):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    build_matrix(member, embeddings(3), anchors, CENTRED, label="tiny")
    assert ("tiny: 100%" in screen.getvalue()) is terminal
    assert bool(screen.getvalue()) is terminal
    build_matrix(member, embeddings(3), anchors, CENTRED, progress=False)
    assert screen.getvalue().count("100%") <= terminal


def test_rows_past_the_vocabulary_are_not_read(member, anchors):
    table = embeddings(3)
    longer = torch.cat([table, torch.full((2, WIDTH), 7.0)])
    short, _ = build_matrix(member, table, anchors, CENTRED, **EXACT)
    same, _ = build_matrix(member, longer, anchors, CENTRED, **EXACT)
    assert torch.equal(short.columns, same.columns)
    assert torch.equal(short.values, same.values)


def test_refuses_embeddings_that_do_not_fit(member, anchors):
    with pytest.raises(TransferMatrixError, match=r"one row for each of 94 tokens, found shape \(93, 16\)"):
        build_matrix(member, embeddings(3)[:-1], anchors, CENTRED, **EXACT)
    broken = embeddings(3)
    broken[4, 4] = float("nan")
    with pytest.raises(TransferMatrixError, match="NaN"):
        build_matrix(member, broken, anchors, CENTRED, **EXACT)


def test_refuses_members_without_a_shared_token(member):
    none = common_anchors([member, Vocabulary([b"x"], frozenset(), frozenset(), encode=lambda text: [])])
    with pytest.raises(TransferMatrixError, match="share no token"):
        build_matrix(member, embeddings(3), none, CENTRED, **EXACT)


def test_too_little_retained_mass_is_refused_with_the_numbers(member, anchors):
    flat = RowRecipe("centred", 2, 0.1)
    _, quality = build_matrix(member, embeddings(3), anchors, flat, **EXACT)
    with pytest.raises(TransferMatrixError) as caught:
        require_retained("tiny", quality, flat, 0.2)
    message = str(caught.value)
    for part in (
        "'tiny'",
        "centred",
        "top_k 2",
        f"{quality.median_anchors:.4f}",
        "0.2",
        "raise matrices.temperature",
        "--force",
    ):
        assert part in message
    with pytest.raises(TransferMatrixError, match=r"set matrices\.recipe to centred, raise matrices\.top_k"):
        require_retained("tiny", quality, RowRecipe("deepen", 2, 20.0), 0.2)
    require_retained("tiny", quality, flat, quality.median_anchors)  # the bound itself is enough
    _, sharp = build_matrix(member, embeddings(3), anchors, CENTRED, **EXACT)
    require_retained("tiny", sharp, CENTRED, 0.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recipe", [CENTRED, DEEPEN], ids=lambda r: r.name)
def test_devices_agree(member, anchors, recipe):
    here, quality = build_matrix(member, embeddings(3), anchors, recipe, **EXACT)
    there, same = build_matrix(member, embeddings(3), anchors, recipe, device="cuda", **EXACT)
    torch.testing.assert_close(expand(there), expand(here), atol=1e-5, rtol=1e-3)
    assert same.retained == pytest.approx(quality.retained, abs=1e-3)
