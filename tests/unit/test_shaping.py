"""Penalties, biases, bans and masks against a slow reference; rows that ask for nothing stay bit for bit."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import FakeMember, ensemble, sequence
from torch import Tensor

from ensemble_core.decoding.sampler import sample
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Choice, Sequence
from ensemble_core.decoding.shaping import TYPICAL_NORMALISER, penalise_repeats, shape
from ensemble_core.fusion.base import Fused

MEMBER = FakeMember()
RECIPE = ensemble([MEMBER])
(EOS,) = MEMBER.vocabulary.stop_ids
NEVER = -float("inf")


def request(prompt: str = "ab", generated: str = "", **options: Any) -> Sequence:
    made = sequence(0, prompt, [MEMBER], RECIPE, SamplingParams(**{"max_tokens": 50} | options))
    for byte in generated.encode():
        made.main.append(byte)
    return made


def fused(num_rows: int, size: int = 40, seed: int = 0) -> Fused:
    """Supports in an order of their own, every one with the end of text."""
    generator = torch.Generator().manual_seed(seed)
    others = torch.tensor([token_id for token_id in range(EOS) if token_id != ord("a")])
    ids = torch.stack([others[torch.randperm(EOS - 1, generator=generator)[:size]] for _ in range(num_rows)])
    ids[:, 7], ids[:, 8] = EOS, ord("a")
    logprobs = torch.randn(num_rows, size, generator=generator).mul(3).log_softmax(dim=1)
    return Fused(ids, logprobs, torch.full((num_rows,), NEVER), torch.zeros(num_rows, 1))


def reference(token_id: int, logprob: float, made: Sequence, mask: Tensor | None) -> float:
    """One token: repetition, presence and frequency, bias, and only then what is forbidden."""
    params = made.request.params
    generated = made.main.completion_ids
    if token_id in generated or token_id in made.main.prompt_ids:
        logit = max(logprob + TYPICAL_NORMALISER, 1.0)
        logprob += logit / params.repetition_penalty - logit
    if token_id in generated:
        logprob -= params.presence_penalty
    logprob -= params.frequency_penalty * generated.count(token_id)
    logprob += dict(params.logit_bias).get(token_id, 0.0)
    text = bytes([*generated, token_id]) if token_id < 256 else b""
    if any(text.endswith(word.encode()) for word in params.bad_words):
        return NEVER
    if params.allowed_token_ids and token_id not in params.allowed_token_ids:
        return NEVER
    early = len(generated) < params.min_tokens
    if early and (token_id == EOS or token_id in params.stop_token_ids):
        return NEVER
    return logprob if mask is None or mask[token_id] else NEVER


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_those_of_the_reference(seed: int) -> None:
    rng, before = random.Random(seed), fused(6, seed=seed)
    rows, masks = [], []
    for i in range(6):
        ids = before.token_ids[i].tolist()
        biases = {token_id: rng.uniform(-100, 100) for token_id in rng.sample(ids, rng.randrange(4))}
        rows.append(
            request(
                "ab",
                "".join(rng.choices("abcde", k=rng.randrange(9))),
                repetition_penalty=rng.choice([1.0, 0.5, 1.7]),
                presence_penalty=rng.choice([0.0, 1.5]),
                frequency_penalty=rng.choice([0.0, -0.7]),
                logit_bias=tuple(biases.items()),
                bad_words=rng.choice([(), ("a",), ("ab", "ba", "cd"), ("e",)]),
                allowed_token_ids=rng.choice([(), (EOS, *range(97, 107))]),
                min_tokens=rng.choice([0, 4]),
                stop_token_ids=rng.choice([(), (ids[3],)]),
            )
        )
        mask = torch.rand(len(MEMBER.vocabulary), generator=torch.Generator().manual_seed(i)) < 0.5
        masks.append(rng.choice([None, mask]))
    after = shape(before, rows, masks)
    assert after.token_ids is before.token_ids
    for i, made in enumerate(rows):
        pairs = zip(before.token_ids[i].tolist(), before.logprobs[i].tolist(), strict=True)
        expected = torch.tensor([reference(token_id, logprob, made, masks[i]) for token_id, logprob in pairs])
        torch.testing.assert_close(after.logprobs[i], expected, atol=1e-5, rtol=1e-5)


def test_who_asks_for_nothing_is_left_bit_for_bit() -> None:
    before = fused(3)
    plain = [request(generated="aab"), request(temperature=0.3, top_p=0.5), request(min_tokens=2, generated="ab")]
    assert shape(before, plain, [None] * 3) is before
    mixed = [plain[0], request(logit_bias=((EOS, 5.0),)), plain[1]]
    kept = before.logprobs.clone()
    after = shape(before, mixed, [None] * 3)
    assert torch.equal(after.logprobs[[0, 2]], kept[[0, 2]])
    assert torch.equal(before.logprobs, kept), "the fused distribution is reported afterwards"
    assert not torch.equal(after.logprobs[1], kept[1])


def test_penalties_count_generated_tokens_and_repetition_the_prompt_too() -> None:
    before = fused(1)
    own = before.logprobs[0, 8].item()
    for options, expected in (
        ({"presence_penalty": 1.0, "frequency_penalty": 0.5}, own),
        ({"repetition_penalty": 2.0}, (own + TYPICAL_NORMALISER) / 2 - TYPICAL_NORMALISER),
    ):
        after = shape(before, [request(prompt="a", generated="b", **options)], [None])
        assert after.logprobs[0, 8].item() == pytest.approx(expected)


@pytest.mark.parametrize("bias", [100.0, -100.0])
def test_a_full_bias_forces_and_bans(bias: float) -> None:
    before = fused(1)
    place = int(before.logprobs.argmin() if bias > 0 else before.logprobs.argmax())
    token_id = int(before.token_ids[0, place])
    after = shape(before, [request(logit_bias=((token_id, bias),))], [None]).logprobs[0]
    assert (int(after.argmax()) if bias > 0 else int(after.argmin())) == place


def test_what_fusion_rounded_to_nothing_can_still_be_forced_or_be_all_that_is_allowed() -> None:
    before = fused(2)
    before.logprobs[:, 3] = NEVER
    ids = before.token_ids[:, 3].tolist()
    mask = torch.zeros(len(MEMBER.vocabulary), dtype=torch.bool)
    mask[ids[1]] = True
    after = shape(before, [request(logit_bias=((ids[0], 100.0),)), request()], [None, mask]).logprobs
    assert after.argmax(dim=1).tolist() == [3, 3]
    assert after[1].isfinite().sum() == 1


def test_a_constraint_at_its_end_is_stronger_than_min_tokens() -> None:
    before = fused(2)
    only_end = torch.zeros(len(MEMBER.vocabulary), dtype=torch.bool)
    only_end[EOS] = True
    more = only_end.clone()
    more[ord("a")] = True
    after = shape(before, [request(min_tokens=5)] * 2, [only_end, more]).logprobs
    assert after.argmax(dim=1).tolist() == [7, 8]
    assert after[1, 7] == NEVER


def test_a_penalty_moves_a_token_that_is_nearly_certain() -> None:
    others = [token_id for token_id in range(200) if token_id != ord("a")][:39]
    ids = torch.tensor([[ord("a"), *others]])
    probs = torch.tensor([[0.97, *[0.03 / 39] * 39]])
    before = Fused(ids, probs.log(), torch.tensor([NEVER]), torch.zeros(1, 1))
    left = []
    for penalty in (1.0, 1.1, 1.3, 2.0):
        after = shape(before, [request("b", "a", repetition_penalty=penalty, min_tokens=2)], [None])
        left.append(after.logprobs.softmax(dim=1)[0, 0].item())
    assert left[0] == pytest.approx(0.97)
    assert left == sorted(left, reverse=True)
    assert left[1] < 0.9
    assert left[3] < 0.01


@pytest.mark.parametrize("penalty", [0.01, 0.5, 0.99, 1.0, 1.01, 1.2, 2.0, 10.0])
def test_a_repetition_penalty_has_one_direction_and_keeps_the_order(penalty: float) -> None:
    before = torch.tensor([0.0, -1e-30, -0.5, -0.5, -3.0, -22.5, -23.0, -24.0, -60.0, -103.0, NEVER])
    after = penalise_repeats(before, torch.tensor(penalty))
    assert (after[:-1] - after[1:] >= 0).all()
    assert after[2] == after[3]
    assert after[-1] == NEVER
    moved = after[:-1] - before[:-1]
    expected = {True: moved < 0, False: moved > 0}[penalty > 1] if penalty != 1 else moved == 0
    assert expected.all()


def test_counts_follow_the_text_and_what_is_taken_back() -> None:
    before = fused(1)
    made = request(prompt="b", presence_penalty=1.0, frequency_penalty=0.5)
    own = before.logprobs[0, 8].item()
    for times in (0, 1, 2, 3):
        after = shape(before, [made], [None]).logprobs[0, 8].item()
        assert after == pytest.approx(own - 0.5 * times - (times > 0))
        made.decide([Choice(ord("a"))])
    for token_id in (made.main.completion_ids.pop(), made.main.completion_ids.pop()):
        made.counts.remove(token_id)
    assert shape(before, [made], [None]).logprobs[0, 8].item() == pytest.approx(own - 2.0)


def test_a_row_is_shaped_alone_as_in_any_crowd() -> None:
    before = fused(6, seed=3)
    mask = torch.rand(len(MEMBER.vocabulary), generator=torch.Generator().manual_seed(0)) < 0.5
    masks = [None, mask, None, None, mask, None]

    def rows() -> list[Sequence]:
        options: list[dict[str, Any]] = [
            {"repetition_penalty": 1.3, "generated": "abcabc"},
            {},
            {"min_tokens": 3},
            {},
            {"logit_bias": ((ord("b"), 7.3), (EOS, -2.1)), "repetition_penalty": 0.7},
            {"presence_penalty": 0.3, "frequency_penalty": -0.7, "generated": "aab"},
        ]
        return [request(**each) for each in options]

    together = shape(before, rows(), masks).logprobs
    for i, made in enumerate(rows()):
        part = Fused(*(getattr(before, name)[i : i + 1] for name in ("token_ids", "logprobs", "tail", "unmapped")))
        assert torch.equal(shape(part, [made], [masks[i]]).logprobs[0], together[i])


def test_an_id_that_stands_twice_is_lifted_once() -> None:
    before = fused(2)
    before.logprobs[1, 3] = NEVER  # nothing stands for this id; its padding stays padding
    again = before.token_ids[:, 3:4].expand(2, 5)
    wide = replace(
        before,
        token_ids=torch.cat([before.token_ids, again], dim=1),
        logprobs=torch.cat([before.logprobs, torch.full((2, 5), NEVER)], dim=1),
    )
    rows = [request(logit_bias=((int(before.token_ids[i, 3]), 100.0),)) for i in range(2)]
    narrow, padded = shape(before, rows, [None] * 2).logprobs, shape(wide, rows, [None] * 2).logprobs
    assert torch.equal(padded[:, :40], narrow)
    assert padded[:, 40:].isneginf().all()


def test_min_tokens_gives_way_where_nothing_but_the_end_can_come() -> None:
    stops = (ord("a"), ord("b"))
    ids = torch.tensor([[EOS, *stops]])
    before = Fused(ids, torch.tensor([[-0.1, -3.0, -4.0]]), torch.tensor([-4.0]), torch.zeros(1, 1))
    after = shape(before, [request(min_tokens=9, stop_token_ids=stops)], [None])
    assert torch.equal(after.logprobs, before.logprobs)
    others = shape(before, [request(min_tokens=9)], [None])
    assert others.logprobs.isneginf().tolist() == [[True, False, False]]
    rounded = replace(before, logprobs=torch.tensor([[0.0, NEVER, NEVER]]))
    assert sample(shape(rounded, [request(min_tokens=9)], [None]), [request(temperature=0.0)]) == [ord("a")]


VALID: dict[str, dict[str, Any]] = {
    "every bias at -100": {"logit_bias": tuple((token_id, -100.0) for token_id in range(EOS + 1))},
    "every bias at 100": {"logit_bias": tuple((token_id, 100.0) for token_id in range(EOS + 1))},
    "the only bias is on what may not come": {"logit_bias": ((EOS, 100.0),), "min_tokens": 50},
    "penalties at their highest": {"repetition_penalty": 10.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    "penalties at their lowest": {"repetition_penalty": 0.01, "presence_penalty": -2.0, "frequency_penalty": -2.0},
    "every id is a bad word": {"bad_words": tuple(map(chr, range(128)))},
    "an id that main did not name is allowed": {"allowed_token_ids": (EOS, ord("a"))},
    "everything may end the text": {"min_tokens": 50, "stop_token_ids": tuple(range(64))},
    "hardly any temperature": {"temperature": 5e-324},
    "reach without bounds": {"top_k": 2**31 - 1, "top_p": 5e-324, "min_p": 1.0},
}


@pytest.mark.parametrize("name", VALID)
def test_no_valid_request_raises_or_harms_its_neighbours(name: str) -> None:
    before = fused(5)
    before.logprobs[1] = torch.nan
    before.logprobs[2, 4] = torch.nan
    before.logprobs[3, 1:] = NEVER
    nothing = torch.zeros(len(MEMBER.vocabulary), dtype=torch.bool)
    rows = [request(generated="aaab", **{"seed": 1} | VALID[name]) for _ in range(4)]
    neighbours = [request(seed=1), request(seed=1)]
    order, masks = [*rows, neighbours[0]], [None, None, None, None, None]
    tokens = sample(shape(before, order, masks), order)
    assert tokens[1:3] == [-1, -1]
    assert min(tokens[0], tokens[3]) >= 0
    alone = Fused(before.token_ids[4:], before.logprobs[4:], before.tail[4:], before.unmapped[4:])
    assert sample(shape(alone, [neighbours[1]], [None]), [neighbours[1]]) == [tokens[4]]
    closed = shape(before, order, [nothing, None, None, nothing, None])
    assert [sample(closed, order)[i] for i in (0, 3)] == [-1, -1], "a constraint that allows nothing"
    assert math.isfinite(float(closed.logprobs[4].amax()))
