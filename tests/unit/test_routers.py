"""Features, routers and what is fitted, against plain references."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import fake_config
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge

from ensemble_core.config import Config
from ensemble_core.council_config import RouteConfig
from ensemble_core.councils.artefact import About, fingerprints, load_router, save_router
from ensemble_core.councils.features import NUM_FEATURES, dense, features
from ensemble_core.councils.route import gate
from ensemble_core.councils.routers import Balance, ClusterRouter, LinearRouter, balance_of, ranked
from ensemble_core.errors import ArtefactError
from ensemble_core.fitting.fit_router import Labels, judged
from ensemble_core.fitting.routers import RIDGES, fit_clusters, fit_linear, leads, lloyd, plus_plus, prefer

NAMES = ["river", "stone", "bridge", "harbour", "mountain", "valley", "forest", "meadow"]
TERMS = ["lambda", "import", "yield", "async", "return", "class", "raise", "global"]


def questions(num: int, seed: int = 0) -> tuple[list[str], torch.Tensor]:
    """Texts of two kinds, and how well two models do: each is better at one kind, with noise. (N, 2)"""
    draw = torch.Generator().manual_seed(seed)
    texts, rows = [], []
    for rank in range(num):
        words = (NAMES, TERMS)[rank % 2]
        picked = torch.randint(len(words), (8,), generator=draw).tolist()
        texts.append(" ".join(words[index] for index in picked))
        noise = 0.2 * torch.randn(2, generator=draw)
        rows.append(torch.tensor([0.8, 0.4] if rank % 2 == 0 else [0.3, 0.7]) + noise)
    return texts, torch.stack(rows).to(torch.float64)


@given(st.text(max_size=300))
def test_features_are_a_unit_vector_or_nothing(text: str) -> None:
    indices, values = features(text)
    assert len(indices) == len(values) == len(set(indices.tolist()))
    assert all(0 <= index < NUM_FEATURES for index in indices.tolist())
    if len(values):
        assert float(values.norm()) == pytest.approx(1, abs=1e-5)


def test_features_do_not_see_case_and_space_and_are_the_same_everywhere() -> None:
    assert torch.equal(dense("What  IS\nthis?"), dense("what is this?"))
    indices, values = features("abc")
    assert sorted(indices.tolist()) == sorted(set(indices.tolist()))
    assert indices.tolist() == EXPECTED_ABC
    assert values.tolist() == pytest.approx([1 / math.sqrt(len(EXPECTED_ABC))] * len(EXPECTED_ABC))


EXPECTED_ABC = [3995, 5134, 6325, 11747, 12006]


def test_a_long_text_costs_no_more_than_its_ends() -> None:
    text = "a" * 10 + "b" * 1_000_000 + "c" * 10
    indices, _ = features(text)
    assert len(indices) < 50


def test_the_linear_router_is_a_ridge_regression() -> None:
    texts, quality = questions(60)
    router = fit_linear(texts, quality).router
    points = torch.stack([dense(text) for text in texts]).double().numpy()
    target = leads(quality)
    means = target.mean(0)
    fits = {
        alpha: Ridge(alpha=alpha, fit_intercept=False).fit(points, (target - means).numpy()) for alpha in RIDGES
    }
    mine = torch.stack([router.scores(text, None) for text in texts]).double()
    nearest = min(
        float((torch.from_numpy(fit.predict(points)) + means - mine).abs().max()) for fit in fits.values()
    )
    assert nearest < 1e-5


def test_leads_are_centred_and_clipped_at_their_median() -> None:
    found = leads(torch.tensor([[1.0, 3.0], [1.0, 2.0], [0.0, 8.0], [5.0, 5.0]]))
    assert found.tolist() == [[-1.0, 1.0], [-0.5, 0.5], [-1.0, 1.0], [0.0, 0.0]]
    assert torch.equal(leads(torch.ones(3, 2)), torch.zeros(3, 2, dtype=torch.float64))


def test_the_linear_router_finds_who_is_good_at_what() -> None:
    texts, quality = questions(80)
    router = fit_linear(texts, quality).router
    others, _ = questions(40, seed=1)
    picked = [int(router.scores(text, None).argmax()) for text in others]
    assert picked == [rank % 2 for rank in range(40)]


def test_left_out_predictions_are_those_of_fits_without_the_question() -> None:
    texts, quality = questions(24)
    learnt = fit_linear(texts, quality)
    points = torch.stack([dense(text) for text in texts]).double()
    target = leads(quality)
    centred = target - target.mean(0)
    errors = []
    for alpha in RIDGES:
        rows = []
        for rank in range(24):
            rest = [other for other in range(24) if other != rank]
            kernel = points[rest] @ points[rest].T + alpha * torch.eye(23, dtype=torch.float64)
            rows.append(points[rank] @ points[rest].T @ torch.linalg.solve(kernel, centred[rest]) + target.mean(0))
        errors.append(float((torch.stack(rows) - learnt.left_out.parts.squeeze(1)).abs().max()))
    assert min(errors) < 1e-9


def avengers(
    question: torch.Tensor, centres: torch.Tensor, accuracy: torch.Tensor, near: int, beta: float
) -> list[float]:
    """Avengers' rule, a step at a time."""
    distances = [1 - float(centre @ question) for centre in centres]
    nearest = sorted(range(len(distances)), key=lambda cluster: distances[cluster])[:near]
    weights = [math.exp(-beta * distances[cluster]) for cluster in nearest]
    scores = [0.0] * accuracy.shape[1]
    for cluster, weight in zip(nearest, weights, strict=True):
        row = accuracy[cluster].tolist()
        for model, value in enumerate(row):
            rank = sum(other > value for other in row)
            scores[model] += weight / sum(weights) / (rank + 0.1)
    return scores


def test_clusters_are_those_of_scikit_learn_and_scores_are_avengers_rule() -> None:
    texts, quality = questions(120)
    router = fit_clusters(texts, quality, num_clusters=12, near=3, beta=6.0).router
    points = torch.stack([dense(text) for text in texts]).double()
    first = plus_plus(points, 12, 42)
    reference = KMeans(12, init=first.numpy(), n_init=1, max_iter=1000, tol=0.0, algorithm="lloyd").fit(
        points.numpy()
    )
    centres = torch.from_numpy(reference.cluster_centers_)
    torch.testing.assert_close(router.centres.double(), centres, atol=1e-6, rtol=0)
    labels = torch.from_numpy(reference.labels_).long()
    accuracy = torch.stack([quality[labels == cluster].mean(0) for cluster in range(12)])
    torch.testing.assert_close(router.accuracy.double(), accuracy, atol=1e-6, rtol=0)
    for text in questions(30, seed=3)[0]:
        expected = avengers(dense(text).double(), centres, accuracy, 3, 6.0)
        assert router.scores(text, None).tolist() == pytest.approx(expected, abs=1e-3)


def test_lloyd_never_makes_the_fit_worse_and_ends() -> None:
    points = torch.rand(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = plus_plus(points, 6, 1)
    after = lloyd(points, before)
    assert spread(points, after.centres) <= spread(points, before)
    assert torch.equal(lloyd(points, after.centres).labels, after.labels)


def spread(points: torch.Tensor, centres: torch.Tensor) -> float:
    return float(torch.cdist(points, centres).square().amin(1).sum())


def test_more_clusters_than_different_questions() -> None:
    router = fit_clusters(["same"] * 5, torch.ones(5, 2), num_clusters=4).router
    assert len(router.centres) == 1


def test_ranks_begin_at_zero_and_equal_ones_share_the_better() -> None:
    assert ranked(torch.tensor([0.2, 0.9, 0.9, 0.1])).tolist() == [2, 0, 0, 3]


def test_price_counts_as_avengers_pro_says() -> None:
    balance = balance_of(["a", "b"], 0.7, {"a": 1.0, "b": 4.0})
    assert balance.of(torch.tensor([0.5, 0.9])).tolist() == pytest.approx(
        [0.7 * 0 + 0.3 * 0.75, 0.7 * 1 + 0.3 * 0]
    )
    assert Balance(1.0, balance.prices).of(torch.tensor([0.5, 0.5])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["linear", "clusters"])
def test_a_calibrated_share_holds_on_other_questions(share: float, kind: str) -> None:
    """Continuous noise in the texts, so that scores differ; within 5 points on 400 questions that were not seen."""
    texts, quality = mixtures(400, 0)
    learnt: Any = fit_linear(texts, quality) if kind == "linear" else fit_clusters(texts, quality, 16)
    calibrated = prefer(learnt, 0, share)
    others, _ = mixtures(400, 1)
    picked = [int(calibrated.scores(text, None).argmax()) == 0 for text in others]
    assert sum(picked) / len(picked) == pytest.approx(share, abs=0.05)


def mixtures(num: int, seed: int) -> tuple[list[str], torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    texts, rows = [], []
    for _ in range(num):
        part = float(torch.rand(1, generator=draw))
        kinds = torch.rand(24, generator=draw) < part
        picked = torch.randint(8, (24,), generator=draw).tolist()
        texts.append(
            " ".join((NAMES if kind else TERMS)[index] for kind, index in zip(kinds, picked, strict=True))
        )
        rows.append(torch.tensor([part, 1 - part]) + 0.1 * torch.randn(2, generator=draw))
    return texts, torch.stack(rows).double()


def config(folder: Path, **fields: Any) -> Config:
    smart = {"kind": "route", "models": ["alpha", "beta"], "by": "linear", "artefact": str(folder), **fields}
    return fake_config(("alpha", "beta", "gamma"), ensembles={"smart": smart})


def saved(folder: Path) -> tuple[Config, LinearRouter]:
    texts, quality = questions(20)
    router = fit_linear(texts, quality).router
    settings = config(folder)
    save_router(folder, router, About("linear", fingerprints(settings, ("alpha", "beta")), {"t": "x"}))
    return settings, router


def council(settings: Config) -> RouteConfig:
    found = settings.councils["smart"]
    assert isinstance(found, RouteConfig)
    return found


def test_an_artefact_comes_back_as_it_was(tmp_path: Path) -> None:
    settings, router = saved(tmp_path)
    loaded = load_router("smart", council(settings), settings)
    assert isinstance(loaded, LinearRouter)
    assert torch.equal(loaded.weights, router.weights)
    texts, quality = questions(40)
    clusters = fit_clusters(texts, quality, 4).router
    options = {"near": clusters.near, "beta": clusters.beta}
    about = About("clusters", fingerprints(settings, ("alpha", "beta")), {}, options=options)
    save_router(tmp_path / "c", clusters, about)
    other = config(tmp_path / "c", by="clusters")
    again = load_router("smart", council(other), other)
    assert isinstance(again, ClusterRouter)
    assert again.scores(texts[0], None).tolist() == clusters.scores(texts[0], None).tolist()


def test_an_artefact_of_something_else_is_refused(tmp_path: Path) -> None:
    settings, _ = saved(tmp_path)
    for other, words in (
        (config(tmp_path, by="clusters"), "fitted for by: linear"),
        (config(tmp_path, models=["beta", "alpha"]), "not \\['beta', 'alpha'\\]"),
        (config(tmp_path / "nowhere"), "about.json is missing"),
    ):
        with pytest.raises(ArtefactError, match=words):
            load_router("smart", council(other), other)
    changed = settings.model_copy(
        update={
            "members": settings.members
            | {"beta": settings.members["beta"].model_copy(update={"model": "another"})}
        }
    )
    with pytest.raises(ArtefactError, match="other versions of \\['beta'\\]"):
        load_router("smart", council(changed), changed)
    (tmp_path / "router.safetensors").write_bytes(b"x")
    with pytest.raises(ArtefactError, match=r"is not the one that about\.json describes"):
        load_router("smart", council(settings), settings)
    (tmp_path / "about.json").write_text("[1]")
    with pytest.raises(ArtefactError, match="cannot be read"):
        load_router("smart", council(settings), settings)


def test_a_gate_keeps_those_over_the_threshold() -> None:
    select = {"max": 2, "threshold": 0.2, "temperature": 0.5}
    settings = fake_config(
        ("alpha", "beta", "gamma"),
        ensembles={
            "trio": {"members": {"alpha": 1, "beta": 1, "gamma": 1}, "main": "alpha"},
            "smart": {
                "kind": "route",
                "models": ["alpha", "beta", "gamma"],
                "by": "perplexity",
                "select": select,
                "into": "trio",
            },
        },
    )
    shares = gate(torch.tensor([0.1, 0.6, 0.5]), council(settings))
    assert list(shares) == ["beta", "gamma"]
    assert sum(shares.values()) == pytest.approx(1)
    assert gate(torch.tensor([0.0, 9.0, 0.0]), council(settings)) == {"beta": 1.0}


def test_a_fit_is_judged_against_the_best_model_and_the_best_choice() -> None:
    texts, quality = questions(200)
    router = fit_linear(*questions(100, seed=9)).router
    settings = config(Path("unused"))
    found = judged(council(settings), router, None, Labels(texts, quality, torch.ones_like(quality)))
    values = {each.name: each.value.value for each in found.compared}
    best = max(quality.mean(0).tolist())
    assert values["best choice"] == pytest.approx(float(quality.amax(1).mean()))
    assert values["random"] == pytest.approx(float(quality.mean()))
    assert max(values[name] for name in values if "best model" in name) == pytest.approx(best)
    assert found.is_sure
    assert found.shares == {"alpha": 0.5, "beta": 0.5}
    useless = LinearRouter(torch.zeros(NUM_FEATURES, 2), torch.tensor([0.0, 1.0]))
    assert not judged(council(settings), useless, None, Labels(texts, quality, torch.ones_like(quality))).is_sure
