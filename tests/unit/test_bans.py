"""Allowed ids and bad words: what may follow a completion."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import byte_vocabulary, pair_vocabulary

from ensemble_core.decoding.bans import Bans

BYTES, PAIRS = byte_vocabulary(), pair_vocabulary()


def banned(bans: Bans, text: bytes, size: int = len(BYTES)) -> set[int]:
    return set(np.flatnonzero(bans.of(np.arange(size, dtype=np.int32), list(text))).tolist())


@pytest.mark.parametrize(
    ("text", "last"),
    [
        (b"ca", b"t"),
        (b" ca", b"t"),
        (b"cc", b""),
        (b"ca ca", b"t"),
        (b"cat", b""),
        (b"", b""),
        (b"do", b"g"),
        (b"a", b""),
    ],
)
def test_the_token_that_completes_a_word_is_banned(text: bytes, last: bytes) -> None:
    assert banned(Bans((), ("cat", "dog", " dog"), BYTES.encode), text) == set(last)


def test_a_word_of_one_token_is_banned_everywhere() -> None:
    for text in (b"", b"x", b"xx "):
        assert banned(Bans((), ("x",), BYTES.encode), text) == {ord("x")}


def test_words_with_a_common_head_and_a_common_end() -> None:
    bans = Bans((), ("ab", "ac", "xab"), BYTES.encode)
    assert banned(bans, b"a") == {ord("b"), ord("c")}
    assert bans.most >= 3


def test_all_but_the_allowed_ids_are_banned_and_bad_words_among_them() -> None:
    bans = Bans((97, 98, 99), ("ab",), BYTES.encode)
    assert banned(bans, b"") == set(range(len(BYTES))) - {97, 98, 99}
    assert banned(bans, b"a") == set(range(len(BYTES))) - {97, 99}
    assert Bans((97,), (), BYTES.encode).most == 0


def test_a_word_is_banned_in_the_spelling_of_the_vocabulary() -> None:
    ids = PAIRS.encode("word")
    bans = Bans((), ("word",), PAIRS.encode)
    found = bans.of(np.arange(len(PAIRS), dtype=np.int32), ids[:-1])
    assert found[ids[-1]]
