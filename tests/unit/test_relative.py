"""Relative fusion against torch's own optimiser, and against dense float64 written from the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ensemble_core.fusion import relative as module
from ensemble_core.fusion.base import Fused, FusionSpace
from ensemble_core.fusion.relative import (
    NUM_REACHED,
    Problem,
    RelativeFusion,
    RelativeOptions,
    solve_em,
    solve_search,
)
from ensemble_core.members.base import Candidates
from ensemble_core.members.candidates import top_candidates
from ensemble_core.transfer.matrix import TransferMatrix

CPU = torch.device("cpu")
SOLVERS = ("em", "search")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense_matrix(size: int, num_anchors: int, seed: int, width: int | None = None) -> TransferMatrix:
    """Random rows that lean on the token's own anchor; the first tokens are the anchors. `width`: entries kept."""
    logits = 2.0 * torch.randn(size, num_anchors, generator=generator(seed))
    logits[:num_anchors] += 4.0 * torch.eye(num_anchors)
    values, columns = logits.softmax(dim=1).topk(width or num_anchors, dim=1)
    columns, order = columns.sort(dim=1)
    values = values.gather(1, order)
    return TransferMatrix(columns.int(), values / values.sum(1, keepdim=True), torch.arange(num_anchors))


def one_hot(size: int) -> TransferMatrix:
    ids = torch.arange(size)
    return TransferMatrix(ids[:, None].int(), torch.ones(size, 1), ids)


def expand(matrix: TransferMatrix) -> Tensor:
    """(V, A) float64."""
    full = torch.zeros(len(matrix.columns), matrix.num_anchors, dtype=torch.float64)
    return full.scatter_add(1, matrix.columns.long(), matrix.values.double())


def logits_of(rows: int, size: int, seed: int, sharpness: float = 3.0) -> Tensor:
    return sharpness * torch.randn(rows, size, generator=generator(seed))


def fusion(matrices: Sequence[TransferMatrix], **options: Any) -> RelativeFusion:
    space = FusionSpace((), lambda: matrices, CPU)
    return RelativeFusion(space, RelativeOptions(**options))


def weights_of(rows: int, members: int, seed: int) -> Tensor:
    return torch.rand(rows, members, generator=generator(seed)).softmax(dim=1)


def dense(fused: Fused, size: int) -> Tensor:
    """(B, V) probabilities; entries of one id are added."""
    whole = torch.zeros(len(fused.token_ids), size)
    return whole.scatter_add(1, fused.token_ids, fused.logprobs.exp())


def problem(matrix: TransferMatrix, prior: Tensor, target: Tensor) -> Problem:
    ids = torch.arange(prior.shape[1]).expand(prior.shape)
    return Problem(prior, *matrix.rows(ids), target, matrix.num_anchors)


def paper_search(z: Tensor, matrix: Tensor, target: Tensor, eta: float, steps: int = 5) -> Tensor:
    """One row by autograd, as the paper does it: logits (V,), R (V, A), r (A,) -> p (V,)."""
    z = z.clone()[None].requires_grad_(True)
    optimiser = torch.optim.AdamW([z], lr=eta, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=10, eta_min=eta / 4)
    loss = torch.nn.KLDivLoss()  # the mean over every entry, as the paper's code has it
    for _ in range(steps):
        optimiser.zero_grad()
        loss((z.softmax(dim=1) @ matrix).log(), target[None]).backward()
        optimiser.step()
        schedule.step()
    return z.detach()[0].softmax(dim=0)


def dense_em(p: Tensor, matrix: Tensor, target: Tensor, steps: int = 3) -> Tensor:
    """One row of Richardson-Lucy: p (V,), R (V, A), r (A,)."""
    for _ in range(steps):
        p = p * (matrix @ (target / (p @ matrix)))
        p = p / p.sum()
    return p


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eta", [0.15, 0.5])
def test_search_is_the_papers(seed: int, eta: float) -> None:
    size, num_anchors = 200 + 70 * seed, 100 + 10 * seed
    matrix = dense_matrix(size, num_anchors, seed)
    full, logits = expand(matrix), logits_of(4, size, seed + 50)
    prior = logits.double().softmax(dim=1)
    target = 0.5 * prior @ full + 0.5 * logits_of(4, num_anchors, seed + 90).double().softmax(dim=1)
    expected = torch.stack([paper_search(z, full, r, eta) for z, r in zip(logits.double(), target, strict=True)])
    assert float((expected - prior).abs().max()) > 1e-3  # it does something
    found = solve_search(problem(matrix, logits.softmax(dim=1), target.float()), 5, eta)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0.0)


@pytest.mark.parametrize("seed", range(25))
def test_em_lowers_the_divergence_at_every_step(seed: int) -> None:
    matrix = dense_matrix(150, 60, seed, width=8)
    prior = logits_of(3, 150, seed).double().softmax(dim=1)
    target = logits_of(3, 150, seed + 1).double().softmax(dim=1) @ expand(matrix)
    given = problem(matrix, prior, target)
    last = torch.full((3,), torch.inf, dtype=torch.float64)
    for steps in range(8):
        p = solve_em(given, steps)
        torch.testing.assert_close(p.sum(dim=1), torch.ones(3, dtype=torch.float64))
        assert bool((p >= 0).all())
        now = (target * (target / given.project(p)).log()).sum(dim=1)
        assert bool((now < last).all())
        last = now


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("solver", SOLVERS)
def test_full_support_is_the_dense_method(solver: str, seed: int) -> None:
    """Three members of different vocabularies, row by row in float64; rows have weights of their own."""
    sizes, rows = (300, 220, 410), 4
    matrices = [dense_matrix(size, 110, seed + i) for i, size in enumerate(sizes)]
    logits = [logits_of(rows, size, seed + 10 * i) for i, size in enumerate(sizes)]
    weights = weights_of(rows, 3, seed)
    fused = fusion(matrices, solver=solver, support="full").fuse(
        [top_candidates(each, each.shape[1]) for each in logits], weights
    )
    full = [expand(matrix) for matrix in matrices]
    for row in range(rows):
        p = [each[row].double().softmax(dim=0) for each in logits]
        r = sum(weights[row, i].double() * (p[i] @ full[i]) for i in range(3))
        assert isinstance(r, Tensor)
        z = logits[0][row].double()
        expected = dense_em(p[0], full[0], r) if solver == "em" else paper_search(z, full[0], r, 0.15)
        assert fused.token_ids[row].tolist() == list(range(300))
        torch.testing.assert_close(fused.logprobs[row].double().exp(), expected, atol=2e-6, rtol=0.0)
    assert fused.tail.tolist() == [-torch.inf] * rows
    assert not fused.unmapped.any()


def peaked(rows: int, seed: int) -> tuple[list[Tensor], list[TransferMatrix]]:
    """Two members that mostly agree, with sparse rows."""
    sizes = (600, 500)
    matrices = [dense_matrix(size, 250, i, width=16) for i, size in enumerate(sizes)]
    shared = 4.0 * torch.randn(rows, 250, generator=generator(seed))
    logits = []
    for i, size in enumerate(sizes):
        own = logits_of(rows, size, seed + i + 1, 2.0)
        own[:, :250] += shared
        logits.append(own)
    return logits, matrices


@pytest.mark.parametrize("solver", SOLVERS)
def test_closed_support_stays_close_to_the_full_one(solver: str) -> None:
    """A random matrix reaches further than a built one; em moves 1.7 % of its mass past the support here."""
    logits, matrices = peaked(300, 7)
    logits = [2.0 * each for each in logits]
    weights = weights_of(300, 2, 3)
    full = fusion(matrices, solver=solver, support="full").fuse(
        [top_candidates(each, each.shape[1]) for each in logits], weights
    )
    closed = fusion(matrices, solver=solver).fuse([top_candidates(each, 128) for each in logits], weights)
    whole, near = dense(full, 600), dense(closed, 600)
    agreement = float((whole.argmax(dim=1) == near.argmax(dim=1)).float().mean())
    variation = float((whole - near).abs().sum(dim=1).mean() / 2)
    assert agreement >= 0.99  # measured: em 0.997, search 1.0
    assert variation < 0.04


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("support", ["closed", "full"])
def test_mass_is_one_and_stands_once(solver: str, support: str) -> None:
    logits, matrices = peaked(30, 1)
    top_k = [600, 500] if support == "full" else [40, 40]
    parts = [top_candidates(each, k) for each, k in zip(logits, top_k, strict=True)]
    fused = fusion(matrices, solver=solver, support=support).fuse(parts, weights_of(30, 2, 1))
    total = fused.logprobs.double().exp().sum(dim=1) + fused.tail.double().exp()
    torch.testing.assert_close(total, torch.ones(30, dtype=torch.float64), atol=1e-5, rtol=0.0)
    for ids, logprobs in zip(fused.token_ids.tolist(), fused.logprobs.tolist(), strict=True):
        heavy = [i for i, logprob in zip(ids, logprobs, strict=True) if logprob > -torch.inf]
        assert len(heavy) == len(set(heavy))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_row_is_fused_as_if_alone(solver: str) -> None:
    logits, matrices = peaked(12, 2)
    parts = [top_candidates(each, 30) for each in logits]
    weights, strategy = weights_of(12, 2, 4), fusion(matrices, solver=solver)
    together = dense(strategy.fuse(parts, weights), 600)
    for row in range(12):
        alone = strategy.fuse([part.rows([row]) for part in parts], weights[row : row + 1])
        torch.testing.assert_close(dense(alone, 600)[0], together[row], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_order_of_assistants_is_free(solver: str) -> None:
    logits, matrices = peaked(6, 3)
    third, thirds = dense_matrix(350, 250, 9, width=16), logits_of(6, 350, 30)
    parts = [top_candidates(each, 30) for each in (*logits, thirds)]
    weights, members = weights_of(6, 3, 5), [*matrices, third]
    swap = [0, 2, 1]
    left = fusion(members, solver=solver).fuse(parts, weights)
    right = fusion([members[i] for i in swap], solver=solver).fuse([parts[i] for i in swap], weights[:, swap])
    torch.testing.assert_close(dense(left, 600), dense(right, 600), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(left.unmapped, right.unmapped[:, swap])


def test_two_identical_members_are_one() -> None:
    logits = logits_of(5, 80, 1)
    part = top_candidates(logits, 80)
    fused = fusion([one_hot(80)] * 2, support="full").fuse([part, part], weights_of(5, 2, 1))
    torch.testing.assert_close(fused.logprobs, part.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_main_with_all_the_weight_is_a_fixed_point_of_em(dtype: torch.dtype) -> None:
    """Also where float16 rows do not quite sum to 1."""
    logits, matrices = peaked(5, 4)
    matrices = [TransferMatrix(m.columns, m.values.to(dtype), m.anchor_ids) for m in matrices]
    parts = [top_candidates(each, each.shape[1]) for each in logits]
    weights = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    fused = fusion(matrices, support="full", steps=6).fuse(parts, weights)
    torch.testing.assert_close(fused.logprobs.exp(), parts[0].logprobs.exp(), atol=1e-6, rtol=1e-4)


def without_rows(matrix: TransferMatrix, ids: list[int]) -> TransferMatrix:
    values = matrix.values.clone()
    values[ids] = 0.0
    return TransferMatrix(matrix.columns, values, matrix.anchor_ids)


@pytest.mark.parametrize("solver", SOLVERS)
def test_tokens_without_a_row_keep_mains_mass(solver: str) -> None:
    logits, (main, other) = peaked(8, 5)
    silent = [599, 3, 300]
    logits[0][:, silent] = torch.tensor([14.0, 12.0, 13.0])
    logits[1][:, 400] = 14.0
    parts = [top_candidates(each, 50) for each in logits]
    strategy = fusion([without_rows(main, silent), without_rows(other, [400])], solver=solver)
    fused = strategy.fuse(parts, weights_of(8, 2, 6))
    own = [each.log_softmax(dim=1).exp() for each in logits]
    found = dense(fused, 600)
    torch.testing.assert_close(found[:, silent], own[0][:, silent], atol=1e-6, rtol=1e-5)
    expected = torch.stack([own[0][:, silent].sum(dim=1), own[1][:, 400]], dim=1)
    torch.testing.assert_close(fused.unmapped, expected, atol=1e-6, rtol=1e-5)
    assert float((found - own[0]).abs().max()) > 1e-3  # the others did move


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("members", ["assistant", "main", "both"])
def test_members_without_any_row_say_nothing(solver: str, members: str) -> None:
    """What is left decides; the mass stays 1 and no number is lost."""
    logits, (main, other) = peaked(6, 6)
    parts = [top_candidates(each, 20) for each in logits]
    if members in ("main", "both"):
        main = without_rows(main, parts[0].token_ids.unique().tolist())
    if members in ("assistant", "both"):
        other = without_rows(other, parts[1].token_ids.unique().tolist())
    fused = fusion([main, other], solver=solver).fuse(parts, weights_of(6, 2, 7))
    total = fused.logprobs.double().exp().sum(dim=1) + fused.tail.double().exp()
    torch.testing.assert_close(total, torch.ones(6, dtype=torch.float64), atol=1e-5, rtol=0.0)
    if members == "both":
        known = fused.logprobs[:, :20]
        torch.testing.assert_close(known, parts[0].logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_forbidden_tokens_and_zero_weights_leave_numbers(solver: str, weights: tuple[float, float]) -> None:
    logits, matrices = peaked(4, 8)
    logits[0][:2, 5:] = -torch.inf
    logits[1][1:3, 3:] = -torch.inf
    for top_k, support in ((16, "closed"), (1000, "full")):
        parts = [top_candidates(each, top_k) for each in logits]
        fused = fusion(matrices, solver=solver, support=support).fuse(parts, torch.tensor([weights] * 4))
        assert not fused.logprobs.isnan().any()
        total = fused.logprobs.double().exp().sum(dim=1) + fused.tail.double().exp()
        torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("broken", [0, 1])
def test_a_broken_row_stays_alone(solver: str, broken: int) -> None:
    logits, matrices = peaked(3, 9)
    clean = [top_candidates(each, 20) for each in logits]
    logits[broken][1, 4] = torch.nan
    parts = [top_candidates(each, 20) for each in logits]
    weights, strategy = weights_of(3, 2, 8), fusion(matrices, solver=solver)
    found, expected = strategy.fuse(parts, weights), strategy.fuse(clean, weights)
    for row in (0, 2):
        torch.testing.assert_close(found.logprobs[row], expected.logprobs[row])
    assert not found.logprobs[1].isfinite().all()
    assert not bool(found.logprobs[1].amax().isfinite())


def test_an_id_asked_for_counts_in_r() -> None:
    """Both members ask for the same unlikely token: it keeps about the mass that the full solve gives it."""
    matrices = [one_hot(400)] * 2
    logits = [logits_of(3, 400, seed) for seed in (1, 2)]
    asked = logits[0].argsort(dim=1)[:, 100].tolist()
    parts = [top_candidates(each, 32, [(a,) for a in asked]) for each in logits]
    weights = torch.full((3, 2), 0.5)
    closed = dense(fusion(matrices).fuse(parts, weights), 400)
    whole = [top_candidates(each, 400) for each in logits]
    full = dense(fusion(matrices, support="full").fuse(whole, weights), 400)
    for row, token in enumerate(asked):
        assert float(closed[row, token]) == pytest.approx(float(full[row, token]), rel=0.3)


def test_asking_for_a_hopeless_id_changes_no_answer() -> None:
    logits, matrices = peaked(50, 11)
    weights, strategy = weights_of(50, 2, 3), fusion(matrices)
    plain = [top_candidates(each, 64) for each in logits]
    hopeless = [(token,) for token in logits[0].argmin(dim=1).tolist()]
    asked = [top_candidates(logits[0], 64, hopeless), plain[1]]
    left, right = (dense(strategy.fuse(parts, weights), 600) for parts in (plain, asked))
    assert float((left - right).abs().sum(dim=1).mean() / 2) < 0.01


def test_a_token_that_only_the_assistant_knows_joins() -> None:
    logits = [torch.full((1, 200), -4.0), torch.full((1, 200), -4.0)]
    logits[0][0, :4] = torch.tensor([3.0, 2.5, 2.0, 1.0])
    logits[1][0, 150] = 9.0
    parts = [top_candidates(each, 8) for each in logits]
    fused = fusion([one_hot(200)] * 2).fuse(parts, torch.tensor([[0.3, 0.7]]))
    assert int(dense(fused, 200).argmax()) == 150


def test_defaults_of_the_solvers() -> None:
    assert RelativeOptions().num_steps == 3
    assert RelativeOptions(solver="search").num_steps == 5
    assert RelativeOptions(solver="search", steps=2).num_steps == 2
    assert isinstance(top_candidates(torch.zeros(1, 3), 2), Candidates)


def test_of_anchors_with_equal_gaps_the_first_join() -> None:
    main = top_candidates(torch.randn(2, 400, generator=torch.Generator().manual_seed(0)), 20)
    gap, anchor_ids = torch.full((2, 300), 0.01), torch.arange(400, 700)
    token_ids, _, _ = module._extend(main, gap, anchor_ids)
    assert token_ids[:, 20:].tolist() == [list(range(400, 400 + NUM_REACHED))] * 2


def candidates_of(rows: int, size: int, num: int, seed: int) -> Candidates:
    return top_candidates(logits_of(rows, size, seed), num)


def in_torch(fused: RelativeFusion) -> RelativeFusion:
    """The same fusion by torch's operations."""
    assert fused._rows is not None
    fused._rows = None
    return fused


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("num", [1, 5, 40, 200])
@pytest.mark.parametrize("members", [2, 3])
def test_the_compiled_loop_is_the_fusion(members: int, num: int, steps: int) -> None:
    """With tokens that have no row, weights of 0, a member that says nothing of anchors, and rows of one token."""
    matrices = [dense_matrix(200 + 40 * i, 90, i, width=8) for i in range(members)]
    for matrix in matrices:
        matrix.values[3::7] = 0.0
    parts = [candidates_of(6, len(matrix.columns), num, 30 + i) for i, matrix in enumerate(matrices)]
    weights = weights_of(6, members, 1)
    weights[1], weights[2] = torch.eye(members)[0], torch.eye(members)[1]
    found = fusion(matrices, steps=steps).fuse(parts, weights)
    expected = in_torch(fusion(matrices, steps=steps)).fuse(parts, weights)
    torch.testing.assert_close(dense(found, 300), dense(expected, 300), atol=2e-5, rtol=0.0)
    torch.testing.assert_close(found.tail.exp(), expected.tail.exp(), atol=2e-5, rtol=0.0)
    torch.testing.assert_close(found.unmapped, expected.unmapped, atol=1e-6, rtol=0.0)
    torch.testing.assert_close(dense(found, 300).sum(dim=1) + found.tail.exp(), torch.ones(6), atol=1e-5, rtol=0.0)


def test_a_row_of_the_compiled_loop_does_not_depend_on_the_others() -> None:
    """Bit for bit: alone, among others, and after a row that is not finite."""
    matrices = [dense_matrix(200, 90, i, width=8) for i in range(2)]
    built = fusion(matrices)
    parts = [candidates_of(5, 200, 40, 30 + i) for i in range(2)]
    weights = weights_of(5, 2, 1)
    together = built.fuse(parts, weights)
    for row in range(5):
        alone = built.fuse([part.rows([row]) for part in parts], weights[row : row + 1])
        assert torch.equal(alone.token_ids[0], together.token_ids[row])
        assert torch.equal(alone.logprobs[0], together.logprobs[row])
    for part in parts:
        part.logprobs[::2], part.tail[::2] = torch.nan, torch.nan
    broken = built.fuse(parts, weights)
    assert torch.equal(broken.logprobs[1::2], together.logprobs[1::2])
    assert torch.equal(broken.tail[1::2], together.tail[1::2])
    assert broken.tail[::2].isnan().all()
