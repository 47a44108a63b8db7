"""The wire form of feeds and answers: decoding restores every bit, and damaged messages are refused."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import replace

import pytest
import torch
from fakes import FakeMember
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from ensemble_core.errors import WireError
from ensemble_core.members.base import Answers, Candidates, Feed, Span
from ensemble_core.members.remote.codec import decode_answers, decode_feeds, encode_answers, encode_feeds

IDS = st.integers(0, 2**31 - 1)
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@st.composite
def feeds(draw: st.DrawFn) -> Feed:
    token_ids = draw(st.lists(IDS, min_size=1, max_size=6))
    wanted = draw(st.integers(0, len(token_ids)))
    position = st.lists(IDS, max_size=3).map(tuple)
    also = draw(st.one_of(st.just(()), st.tuples(*[position] * wanted)))
    following = draw(st.one_of(st.just(()), st.tuples(*[st.integers(-1, 2**31)] * len(token_ids))))
    keep = draw(st.one_of(st.none(), st.integers(0, 2**40)))
    return Feed(
        draw(st.integers(-(2**40), 2**40)),
        token_ids,
        wanted,
        also,
        following,
        draw(st.integers(1, 2**20)),
        keep,
        draw(st.sampled_from(("", "é", "0" * 64))),
    )


@st.composite
def blocks(draw: st.DrawFn) -> Candidates:
    rows, width = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    logprobs = torch.tensor([[draw(FLOATS) for _ in range(width)] for _ in range(rows)]).view(rows, width)
    token_ids = torch.tensor([[draw(IDS) for _ in range(width)] for _ in range(rows)], dtype=torch.long)
    whole = torch.arange(width).expand(rows, width)
    in_order = draw(st.booleans())
    return Candidates(whole if in_order else token_ids.view(rows, width), logprobs, torch.zeros(rows))


@st.composite
def all_answers(draw: st.DrawFn) -> Answers:
    made = tuple(draw(st.lists(blocks(), max_size=3)))
    spans = [Span(0, 0, 0)] if not made else []
    for number, block in enumerate(made):
        start = draw(st.integers(0, len(block)))
        spans.append(Span(number, start, draw(st.integers(start, len(block)))))
    likelihoods = draw(st.one_of(st.just(()), st.tuples(*[st.floats(-1e9, 0)] * len(spans))))
    return Answers(made, tuple(spans) if made else (), likelihoods if made else ())


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.numpy().tobytes() == right.numpy().tobytes()
    )


@given(st.lists(feeds(), max_size=4))
def test_feeds_come_out_as_they_went_in(sent: list[Feed]) -> None:
    assert decode_feeds(encode_feeds(sent)) == sent


@given(all_answers())
def test_answers_come_out_as_they_went_in(sent: Answers) -> None:
    found = decode_answers(encode_answers(sent))
    assert (found.spans, found.likelihoods, found.clock) == (sent.spans, sent.likelihoods, None)
    assert len(found.blocks) == len(sent.blocks)
    for mine, theirs in zip(found.blocks, sent.blocks, strict=True):
        assert same(mine.token_ids, theirs.token_ids)
        assert same(mine.logprobs, theirs.logprobs)
        assert same(mine.tail, theirs.tail)


def test_the_clock_tells_what_the_forward_took() -> None:
    answers = decode_answers(encode_answers(Answers((), (), clock=lambda: 0.25)))
    assert answers.clock is not None
    assert answers.clock() == 0.25


def test_a_member_behind_the_wire_answers_the_same() -> None:
    member, other = FakeMember(), FakeMember()
    size = len(member.vocabulary)
    fed = [Feed(1, list(b"abc"), 2, ((5,), ()), top_k=8), Feed(2, list(b"de"), top_k=size, following=(101, -1))]
    direct = member.forward(fed)
    wired = decode_answers(encode_answers(other.forward(decode_feeds(encode_feeds(fed)))))
    assert wired.likelihoods == direct.likelihoods
    for i in range(2):
        assert same(wired.of(i).token_ids, direct.of(i).token_ids)
        assert same(wired.of(i).logprobs, direct.of(i).logprobs)


def test_whole_vocabularies_do_not_send_their_ids() -> None:
    whole = Candidates(torch.arange(5000).expand(2, 5000), torch.zeros(2, 5000), torch.zeros(2))
    assert len(encode_answers(Answers((whole,), (Span(0, 0, 2),)))) < 2 * 5000 * 4 + 1000


GOOD = Feed(1, [5, 6], 1, ((7,),), (6, -1), 4, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"wanted": 3}, "3 positions are wanted of 2 tokens"),
        ({"also": ((), ())}, "also has 2 entries for 1 positions"),
        ({"following": (1,)}, "following has 1 ids for 2 tokens"),
        ({"token_ids": [], "wanted": 0, "also": (), "following": ()}, "at least one"),
        ({"token_ids": [5, -6]}, "token_ids must be ids"),
        ({"top_k": 0}, "top_k must be 1 or more"),
        ({"keep": -2}, "keep 0 or more"),
    ],
)
def test_a_feed_that_contradicts_itself_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(WireError, match=says):
        decode_feeds(encode_feeds([replace(GOOD, **change)]))  # type: ignore[arg-type]


def test_another_kind_or_version_is_refused() -> None:
    with pytest.raises(WireError, match="kind 2 is expected"):
        decode_answers(encode_feeds([GOOD]))
    arrays = load(encode_feeds([GOOD]))
    with pytest.raises(WireError, match="version 3 is understood, got 9; update the other side"):
        decode_feeds(save(arrays | {"head": torch.tensor([1, 9])}))
    for name in arrays:
        with pytest.raises(WireError):
            decode_feeds(save({other: each for other, each in arrays.items() if other != name}))
        with pytest.raises(WireError):
            decode_feeds(save(arrays | {name: arrays[name].float()}))


def test_spans_outside_the_blocks_are_refused() -> None:
    block = Candidates(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3), torch.zeros(2))
    for span in (Span(0, 0, 3), Span(0, 2, 1), Span(1, 0, 1), Span(-1, 0, 0), Span(0, -1, 1)):
        with pytest.raises(WireError, match="outside the blocks"):
            decode_answers(encode_answers(Answers((block,), (span,))))


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_message_is_a_wire_error_or_still_sound(data: st.DataObject) -> None:
    """A message that is cut or has any byte changed raises WireError and nothing else."""
    message = bytearray(data.draw(st.sampled_from([encode_feeds([GOOD, GOOD]), _answers()])))
    at = data.draw(st.integers(0, len(message) - 1))
    if data.draw(st.booleans()):
        message[at] ^= data.draw(st.integers(1, 255))
    else:
        del message[at:]
    for decode in (decode_feeds, decode_answers):
        with contextlib.suppress(WireError):
            decode(bytes(message))


def _answers() -> bytes:
    block = Candidates(torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3), torch.zeros(2))
    return encode_answers(Answers((block,), (Span(0, 0, 1), Span(0, 1, 2)), (-1.0, 0.0), lambda: 1.0))


def test_nothing_is_pickled() -> None:
    """The first bytes give the length of a JSON header, as in safetensors."""
    message = encode_feeds([GOOD])
    (length,) = struct.unpack("<Q", message[:8])
    assert json.loads(message[8 : 8 + length])["seq_id"]["dtype"] == "I64"
