"""Where a fusion is certain of main's token no assistant can change it: brute force over matrices and answers."""

from __future__ import annotations

import pytest
import torch
from fusion_cases import MAIN, TRIO, space
from test_relative import dense_matrix, fusion, problem
from torch import Tensor

from ensemble_core.fusion.base import Certifying, Fused
from ensemble_core.fusion.projection import ProjectionFusion, ProjectionOptions
from ensemble_core.fusion.relative import search_reach, solve_search
from ensemble_core.members.candidates import top_candidates

ROWS = 400


def led(rows: int, size: int, seed: int, most: float) -> Tensor:
    """Logits whose likeliest token leads by anything from 0 to `most`."""
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    second = logits.topk(2, dim=1).values[:, 1]
    leads = torch.linspace(0, most, rows)
    return logits.scatter(1, logits.argmax(dim=1, keepdim=True), (second + leads).unsqueeze(1))


def chosen(fused: Fused) -> Tensor:
    """Each row's likeliest id."""
    return fused.token_ids.gather(1, fused.logprobs.argmax(dim=1, keepdim=True)).squeeze(1)


@pytest.mark.parametrize(("steps", "eta"), [(1, 0.15), (3, 2.0), (5, 0.15), (5, 0.5), (9, 0.02)])
@pytest.mark.parametrize("support", ["closed", "full"])
def test_the_search_never_moves_a_certified_token(support: str, steps: int, eta: float) -> None:
    size, num_certified = 24, 0
    for seed in range(6):
        matrices = [dense_matrix(size, 10, seed), dense_matrix(size, 10, seed + 50)]
        method = fusion(matrices, solver="search", steps=steps, eta=eta, support=support)
        assert isinstance(method, Certifying)
        logits = [
            led(ROWS, size, seed, 3 * search_reach(steps, eta)[1] + 1.0),
            40.0 * led(ROWS, size, seed + 9, 1.0),
        ]
        parts = [top_candidates(each, size if support == "full" else 12) for each in logits]
        weights = torch.tensor([0.02, 0.98]).expand(ROWS, 2)  # the assistant pulls as hard as it can
        certified = method.certified(parts[0], weights)
        assert torch.equal(chosen(method.fuse(parts, weights))[certified], logits[0].argmax(dim=1)[certified])
        assert not certified.all()
        num_certified += int(certified.sum())
    assert num_certified > ROWS


@pytest.mark.parametrize(("steps", "eta"), [(1, 0.15), (5, 0.15), (5, 1.0), (12, 0.3)])
def test_the_search_moves_logits_to_its_reach_and_no_further(steps: int, eta: float) -> None:
    kept, reach = search_reach(steps, eta)
    generator = torch.Generator().manual_seed(3)
    furthest = 0.0
    for seed in range(40):
        prior = torch.randn(1, 8, generator=generator).softmax(dim=1)
        target = (9 * torch.randn(1, 5, generator=generator)).softmax(dim=1)
        p = solve_search(problem(dense_matrix(8, 5, seed), prior, target), steps, eta)
        moved = p.log() - kept * prior.log()
        furthest = max(furthest, float(moved.max() - moved.min()))
    assert 1.6 * reach < furthest <= 2 * reach + 1e-4


def test_a_linear_pool_never_moves_a_certified_token() -> None:
    """Assistants that are sure of another token, at random or always the one that comes second."""
    method = ProjectionFusion(space(TRIO), ProjectionOptions())
    num_certified = 0
    for seed, own in enumerate((0.51, 0.6, 0.8, 0.95, 1.0)):
        logits = [led(ROWS, len(MAIN), seed, 9.0), *(30.0 * led(ROWS, len(v), seed + 7, 1.0) for v in TRIO[1:])]
        second = logits[0].topk(2, dim=1).indices[:, 1]
        for vocabulary, part in zip(TRIO[1:], logits[1:], strict=True):
            same = [vocabulary.encode(MAIN.tokens[i].decode(errors="replace"))[:1] or [0] for i in second.tolist()]
            part[: ROWS // 2].scatter_(1, torch.tensor(same)[: ROWS // 2], 99.0)
        weights = torch.tensor([own, (1 - own) / 2, (1 - own) / 2]).expand(ROWS, 3)
        parts = [top_candidates(each, 40) for each in logits]
        certified = method.certified(parts[0], weights)
        assert torch.equal(chosen(method.fuse(parts, weights))[certified], logits[0].argmax(dim=1)[certified])
        num_certified += int(certified.sum())
    assert num_certified > ROWS


def test_nothing_is_certain_where_no_bound_is_known() -> None:
    sure = top_candidates(led(4, 24, 1, 90.0) * 10, 24)
    half = torch.tensor([0.5, 0.5]).expand(4, 2)
    matrices = [dense_matrix(24, 10, 1), dense_matrix(24, 10, 2)]
    assert not fusion(matrices, solver="em").certified(sure, half).any()
    geometric = ProjectionFusion(space(TRIO), ProjectionOptions(pool="log-linear"))
    assert not geometric.certified(sure, torch.tensor([0.9, 0.05, 0.05]).expand(4, 3)).any()
    assert not ProjectionFusion(space(TRIO), ProjectionOptions()).certified(sure, half).any()
