"""Penalties, biases, bans and masks against a slow reference; rows that ask for nothing stay bit for bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from fakes import FakeMember, ensemble, sequence
from torch import Tensor

from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence as Request
from ensemble_core.decoding.shaping import shape
from ensemble_core.fusion.base import Fused

MEMBER = FakeMember()
RECIPE = ensemble([MEMBER])
(EOS,) = MEMBER.vocabulary.stop_ids
NEVER = -float("inf")


def request(prompt: str = "ab", generated: str = "", **options: Any) -> Request:
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


def reference(token_id: int, logprob: float, made: Request, mask: Tensor | None) -> float:
    """One token: repetition, presence and frequency, bias, and only then what is forbidden."""
    params = made.request.params
    generated = made.main.completion_ids
    if token_id in generated or token_id in made.main.prompt_ids:
        logprob *= params.repetition_penalty
    if token_id in generated:
        logprob -= params.presence_penalty
    logprob -= params.frequency_penalty * generated.count(token_id)
    logprob += dict(params.logit_bias).get(token_id, 0.0)
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
        ({"repetition_penalty": 2.0}, own * 2),
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
