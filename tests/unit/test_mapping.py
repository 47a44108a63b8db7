"""The direct map against a search over all tokens, and the closed support against sets."""

from __future__ import annotations

import torch
from fakes import byte_vocabulary
from fusion_cases import FIRST, MAIN, SECOND, TRIO, slow_place, with_control

from ensemble_core.fusion.mapping import token_map
from ensemble_core.fusion.support import closed_support
from ensemble_core.text.vocabulary import Vocabulary


def test_a_map_is_the_longest_prefix_by_search() -> None:
    for source in TRIO:
        for target in TRIO:
            expected = [slow_place(i, source, target) for i in range(len(source))]
            assert token_map(source, target).tolist() == expected


def test_a_token_without_its_like_goes_to_its_first_token() -> None:
    places = token_map(FIRST, MAIN)
    goes = {token: MAIN.tokens[places[i]] for i, token in enumerate(FIRST.tokens)}
    assert goes[b"abcde"] == b"abcd"
    assert goes[b" abba"] == b" ab"
    assert goes["éé".encode()] == "é".encode()
    assert goes[b"bc"] == b"b"
    assert goes[b"<eos>"] == b"<eos>"


def test_every_stop_id_ends_the_text_and_control_tokens_need_their_name() -> None:
    chat = with_control(with_control(FIRST, b"<turn>"), b"<only here>")
    stops = Vocabulary(chat.tokens, chat.special_ids, chat.stop_ids | {len(chat) - 2}, chat.encode)
    main = with_control(MAIN, b"<turn>")
    assert token_map(stops, MAIN).tolist()[-3:] == [len(MAIN) - 1, len(MAIN) - 1, -1]
    assert token_map(chat, main).tolist()[-3:] == [len(MAIN) - 1, len(MAIN), -1]
    endless = byte_vocabulary(eos=False)
    assert token_map(FIRST, endless).tolist()[-1] == -1


def test_equal_vocabularies_map_one_to_one() -> None:
    """Also where two ids have the same bytes."""
    doubled = Vocabulary([*MAIN.tokens, b"a", b""], MAIN.special_ids, MAIN.stop_ids, MAIN.encode)
    assert token_map(doubled, doubled).tolist() == list(range(len(doubled)))
    assert token_map(doubled, SECOND).tolist()[-2:] == [ord("a"), -1]


def test_a_map_is_worked_out_once() -> None:
    assert token_map(FIRST, MAIN) is token_map(FIRST, MAIN)


def test_the_support_is_the_union_row_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(low, 30, (20, width), generator=generator) for low, width in ((0, 9), (-4, 12), (-4, 5))]
    ids = [each.clamp_min(-1) for each in ids]
    token_ids, present, places = closed_support(ids, 1000)
    assert token_ids.shape == (20, 26)
    for row in range(20):
        given = [each[row].tolist() for each in ids]
        expected = sorted({i for each in given for i in each if i >= 0})
        assert token_ids[row][present[row]].tolist() == expected
        assert token_ids[row][~present[row]].tolist() == [expected[0]] * (26 - len(expected))
        for own, place in zip(given, places, strict=True):
            assert all(token_ids[row, p] == i for i, p in zip(own, place[row].tolist(), strict=True) if i >= 0)
