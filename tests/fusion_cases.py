"""Small members with different vocabularies, and the dense formulas that fusions are held against, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fakes import byte_vocabulary
from torch import Tensor

from ensemble_core.fusion.base import Fused, FusionSpace
from ensemble_core.members.base import Candidates
from ensemble_core.members.candidates import top_candidates
from ensemble_core.text.vocabulary import Vocabulary

MAIN = byte_vocabulary(("ab", "abc", "cd", " a", " ab", "é", "abcd", "de", " dea"))
FIRST = byte_vocabulary(("ab", "abcde", "cde", " a", " abba", "éé", "bc"))
SECOND = byte_vocabulary(("abc", "bcd", " ab", " d", "abba"))
TRIO = (MAIN, FIRST, SECOND)
_PLACES: dict[tuple[int, str, str], int] = {}


def with_control(vocabulary: Vocabulary, name: bytes) -> Vocabulary:
    """One more control token at the end."""
    token_id = len(vocabulary)
    return Vocabulary(
        [*vocabulary.tokens, name], vocabulary.special_ids | {token_id}, vocabulary.stop_ids, vocabulary.encode
    )


def space(vocabularies: Sequence[Vocabulary], names: str = "abcdefghijkl") -> FusionSpace:
    def nothing() -> list[object]:
        raise AssertionError("needs no matrices")

    return FusionSpace(
        vocabularies,
        nothing,  # type: ignore[arg-type]
        torch.device("cpu"),
        tuple(names[: len(vocabularies)]),
    )


def logits_of(vocabularies: Sequence[Vocabulary], rows: int, seed: int, sharpness: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [sharpness * torch.randn(rows, len(v), generator=generator) for v in vocabularies]


def answers(logits: Sequence[Tensor], top_k: int = 10_000) -> list[Candidates]:
    return [top_candidates(each, top_k) for each in logits]


def weights_of(rows: int, members: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randn(rows, members, generator=generator)).softmax(dim=1)


def slow_place(token_id: int, source: Vocabulary, target: Vocabulary) -> int:
    """Where a token goes, by search over all of the target's; -1 for nowhere. Remembered."""
    key = (token_id, source.fingerprint, target.fingerprint)
    if key not in _PLACES:
        _PLACES[key] = _search(token_id, source, target)
    return _PLACES[key]


def _search(token_id: int, source: Vocabulary, target: Vocabulary) -> int:
    if source.tokens == target.tokens:
        return token_id
    if token_id in source.stop_ids:
        return min(target.stop_ids)
    if token_id in source.special_ids:
        return next((i for i in target.special_ids if target.tokens[i] == source.tokens[token_id]), -1)
    token = source.tokens[token_id]
    prefixes = [
        (len(other), -i)
        for i, other in enumerate(target.tokens)
        if i not in target.special_ids and other and token.startswith(other)
    ]
    return -max(prefixes)[1] if prefixes else -1


def mapped(logits: Sequence[Tensor], vocabularies: Sequence[Vocabulary], row: int) -> Tensor:
    """(M, V_main) float64: p_i M_i of one row; mass without a place is left to main."""
    main = logits[0][row].double().softmax(dim=0)
    views = [main]
    for each, vocabulary in zip(logits[1:], vocabularies[1:], strict=True):
        view = torch.zeros_like(main)
        for token_id, mass in enumerate(each[row].double().softmax(dim=0).tolist()):
            place = slow_place(token_id, vocabulary, vocabularies[0])
            view += mass * main if place < 0 else 0.0
            if place >= 0:
                view[place] += mass
        views.append(view)
    return torch.stack(views)


def named(vocabularies: Sequence[Vocabulary]) -> Tensor:
    """(M, V_main) bool: whether a member has a token that maps to main's."""
    found = torch.zeros(len(vocabularies), len(vocabularies[0]), dtype=torch.bool)
    found[0] = True
    for i, vocabulary in enumerate(vocabularies[1:], start=1):
        for token_id in range(len(vocabulary)):
            place = slow_place(token_id, vocabulary, vocabularies[0])
            if place >= 0:
                found[i, place] = True
    return found


def dense(fused: Fused, size: int) -> Tensor:
    """(B, V) float64 probabilities; entries of one id are added."""
    whole = torch.zeros(len(fused.token_ids), size, dtype=torch.float64)
    return whole.scatter_add(1, fused.token_ids, fused.logprobs.double().exp())


def assert_sound(fused: Fused) -> None:
    """Mass is one, and an id has it once."""
    total = fused.logprobs.double().exp().sum(dim=1) + fused.tail.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0.0)
    assert not fused.logprobs.isnan().any()
    for ids, logprobs in zip(fused.token_ids.tolist(), fused.logprobs.tolist(), strict=True):
        heavy = [i for i, logprob in zip(ids, logprobs, strict=True) if logprob > -torch.inf]
        assert len(heavy) == len(set(heavy))
