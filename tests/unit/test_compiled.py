"""Compiled loops against torch: attention over spans, what a token may depend on, surveys, the likeliest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ensemble_core.members.kernels.base import Spans
from ensemble_core.members.kernels.compiled.attention import attend_spans
from ensemble_core.members.kernels.compiled.logits import survey
from ensemble_core.members.kernels.compiled.ranking import likeliest
from ensemble_core.members.kernels.plain import PLAIN
from ensemble_core.members.ranking import peaks

SLOTS = 700  # more than two blocks of keys


def inputs(
    heads: int, kv_heads: int, size: int, spans: list[tuple[int, int]], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(heads * size)
    shapes = [(len(spans), heads, size), (SLOTS, kv_heads, size), (SLOTS, kv_heads, size)]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def attend(parts: tuple[Tensor, ...], spans: list[tuple[int, int]], scaling: float | None = None) -> Tensor:
    begin, end = (torch.tensor(edge) for edge in zip(*spans, strict=True))
    return attend_spans(*parts, Spans(begin, end, int((end - begin).sum())), scaling)


def plain(parts: tuple[Tensor, ...], spans: list[tuple[int, int]], scaling: float) -> Tensor:
    query, keys, values = (part.double() for part in parts)
    fold = query.shape[1] // keys.shape[1]
    rows = []
    for (begin, end), heads in zip(spans, query, strict=True):
        seen = slice(begin, end)
        rows.append(
            torch.stack(
                [
                    (keys[seen, h // fold] @ q * scaling).softmax(0) @ values[seen, h // fold]
                    for h, q in enumerate(heads)
                ]
            )
        )
    return torch.stack(rows)


SPANS = [(0, 1), (5, 261), (5, 262), (0, 255), (3, 700), (690, 700), (17, 33)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(1, 1, 3), (4, 2, 8), (3, 1, 16), (8, 2, 16), (5, 1, 24), (6, 1, 8), (7, 1, 8), (9, 3, 64)],
)
def test_it_is_softmax_attention(heads: int, kv_heads: int, size: int, dtype: torch.dtype, bound: float) -> None:
    """Of any number of heads and any size, over spans of one slot and of several blocks."""
    parts = inputs(heads, kv_heads, size, SPANS, dtype)
    found = attend(parts, SPANS, 0.4)
    assert found.dtype is dtype
    assert found.shape == parts[0].shape
    torch.testing.assert_close(found.double(), plain(parts, SPANS, 0.4), atol=bound, rtol=bound)
    torch.testing.assert_close(
        attend(parts, SPANS).double(), plain(parts, SPANS, size**-0.5), atol=bound, rtol=bound
    )


def test_scores_that_are_far_apart_stay_finite() -> None:
    parts = inputs(4, 2, 8, SPANS, torch.float32)
    torch.testing.assert_close(
        attend(parts, SPANS, 300.0).double(), plain(parts, SPANS, 300.0), atol=1e-4, rtol=1e-4
    )


def test_a_token_does_not_depend_on_the_others() -> None:
    """Bit by bit: alone, among others, in another order."""
    parts = inputs(9, 3, 64, SPANS, torch.bfloat16)
    together = attend(parts, SPANS)
    for i, span in enumerate(SPANS):
        assert torch.equal(attend((parts[0][i : i + 1], *parts[1:]), [span])[0], together[i])
    assert torch.equal(attend((parts[0].flip(0), *parts[1:]), SPANS[::-1]).flip(0), together)


def test_nothing_outside_a_span_is_read_and_nothing_inside_is_hidden() -> None:
    query, keys, values = inputs(4, 2, 8, [(100, 400)], torch.float32)
    expected = attend((query, keys, values), [(100, 400)])
    for pool in (keys, values):
        pool[:100], pool[400:] = torch.nan, torch.inf
    assert torch.equal(attend((query, keys, values), [(100, 400)]), expected)
    for pool in (keys, values):
        for number in (torch.nan, torch.inf):
            kept = pool[250].clone()
            pool[250] = number
            assert not attend((query, keys, values), [(100, 400)]).isfinite().all(), number
            pool[250] = kept


def test_a_query_that_is_a_view_is_taken() -> None:
    parts = inputs(6, 2, 8, SPANS, torch.float32)
    wide = torch.cat((parts[0], parts[0]), dim=1)
    assert torch.equal(attend((wide[:, :6], *parts[1:]), SPANS), attend(parts, SPANS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 300, 1024, 2047, 32_768, 33_791, 70_001])
def test_a_survey_is_that_of_torch(vocabulary: int, dtype: torch.dtype) -> None:
    """The same peaks; the normaliser of a row is the same bits in any batch."""
    logits = (5.0 * torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(1))).to(dtype)
    logits[2, 1::2] = -torch.inf
    logits[3, -1] = 60.0
    normaliser, tops = survey(logits)
    assert torch.equal(tops, peaks(logits).float())
    torch.testing.assert_close(normaliser.double(), logits.double().logsumexp(dim=1), atol=2e-6, rtol=1e-6)
    for row in range(5):
        assert torch.equal(survey(logits[row : row + 1])[0], normaliser[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [49_152, 50_077, 262_144])
@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0, 30.0])
def test_the_likeliest_are_those_of_torch(vocabulary: int, dtype: torch.dtype, spread: float) -> None:
    """In the same order: with ties, signed zeros, numbers that are not finite, and rows of one number."""
    logits = (spread * torch.randn(7, vocabulary, generator=torch.Generator().manual_seed(1))).to(dtype)
    logits[1, ::3] = -torch.inf
    logits[2, 5] = torch.nan
    logits[3] = torch.nan
    logits[4, 77] = torch.inf
    logits[5], logits[5, 1::2] = 0.0, -0.0
    logits[6], logits[6, -3:] = -torch.inf, torch.tensor([1.0, 2.0, 2.0]).to(dtype)
    found = survey(logits)
    for num in (1, 7, 256, 700):
        assert torch.equal(likeliest(logits, num, found), PLAIN.likeliest(logits, num, found)), num
    alone = likeliest(logits[:1], 256, survey(logits[:1]))
    assert torch.equal(alone, likeliest(logits, 256, found)[:1])
