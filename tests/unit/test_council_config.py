"""Councils in the YAML: the example names every field, and a wrong one is refused by its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.council_config import (
    CostConfig,
    CouncilLimits,
    DiscussConfig,
    GraphConfig,
    NodeConfig,
    RouteConfig,
    SelectConfig,
    VoteConfig,
)
from ensemble_core.councils.book import CouncilBook, check_councils
from ensemble_core.councils.graph import layers
from ensemble_core.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "configs" / "councils.yaml"
SECTIONS = (
    RouteConfig,
    SelectConfig,
    CostConfig,
    VoteConfig,
    DiscussConfig,
    GraphConfig,
    NodeConfig,
    CouncilLimits,
)


def loaded(folder: Path, council: dict[str, Any], name: str = "c", **others: dict[str, Any]) -> Config:
    ab = {"members": {"a": 1, "b": 1}, "main": "b"}
    raw = {
        "members": {"a": {"model": "x"}, "b": {"model": "y"}},
        "ensembles": {"ab": ab, name: council, **others},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load_config(path)


def test_the_example_names_every_field_and_every_kind() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    for section in SECTIONS:
        for field in section.model_fields:
            assert f"{field}:" in text, f"{field} is not in councils.yaml"
    councils = load_config(EXAMPLE).councils
    assert {council.kind for council in councils.values()} == {"route", "vote", "discuss", "graph"}
    check_councils(load_config(EXAMPLE))


ROUTE: dict[str, Any] = {"kind": "route", "models": ["a", "b"], "by": "perplexity"}
XY = {"x": "a", "y": "b"}


@pytest.mark.parametrize(
    ("council", "words"),
    [
        ({"kind": "rout", "models": ["a"]}, "c.kind: 'rout'; kinds are fuse, route, vote, discuss, graph"),
        (ROUTE | {"by": "best"}, "c.by: Input should be 'linear', 'clusters', 'perplexity' or 'fixed'"),
        (ROUTE | {"models": ["a", "a"]}, "c.models: each model once, got ['a', 'a']"),
        (ROUTE | {"models": ["ghost"]}, "c: ['ghost'] are neither members nor ensembles"),
        (ROUTE | {"by": "linear"}, "c: by: linear needs an artefact"),
        (ROUTE | {"artefact": "x"}, "c: artefact only acts with by: linear or clusters, not perplexity"),
        (ROUTE | {"select": {"max": 2}}, "c: select.max over 1 and into go together"),
        (ROUTE | {"select": {"max": 2}, "into": "a"}, "c.into: 'a' is not a token-level ensemble"),
        (
            ROUTE | {"models": ["ab"], "select": {"max": 2}, "into": "ab"},
            "c.models: ['ab'] are not members of 'ab'",
        ),
        (ROUTE | {"margin": 0.1}, "c: margin only acts with fallback"),
        (ROUTE | {"cost": {"alpha": 0.5, "prices": {"a": 1}}}, "c: cost.prices: ['b'] have no price"),
        (ROUTE | {"cost": {"alpha": 2, "prices": {}}}, "c.cost.alpha: Input should be less than or equal to 1"),
        (
            {"kind": "vote", "models": {"a": 0}},
            "c.models.a: Input should be greater than or equal to 1 (given: 0)",
        ),
        ({"kind": "vote", "models": {"a": 2}, "by": "judge"}, "c: by: judge and judge: MODEL go together"),
        (
            {"kind": "vote", "models": {"a": 2}, "by": "judge", "judge": "b", "tie": "first"},
            "c: ['tie'] only act with by: majority",
        ),
        ({"kind": "vote", "models": {"a": 2}, "anser": "x"}, "c.anser: Extra inputs are not permitted"),
        ({"kind": "discuss", "models": ["a"]}, "c.models: Tuple should have at least 2 items"),
        ({"kind": "graph", "nodes": XY, "edges": [["x", "y"], ["y", "x"]]}, "c: edges: ['x', 'y'] wait for each"),
        (
            {"kind": "graph", "nodes": XY},
            "c: edges: the answer must come from one node, but nobody reads ['x', 'y']",
        ),
        ({"kind": "graph", "nodes": XY, "edges": [["x", "z"]]}, "c: edges: ['z'] are not nodes"),
        ({"kind": "vote", "models": ["a"], "limits": {"max_calls": 0}}, "c.limits.max_calls: Input should be"),
    ],
)
def test_a_wrong_field_is_refused_by_its_path(tmp_path: Path, council: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, council)
    assert f"ensembles.{words}" in str(caught.value)


def test_names_and_circles(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ensembles\.a: a member has this name already"):
        loaded(tmp_path, {"kind": "vote", "models": ["b"]}, name="a")
    with pytest.raises(ConfigError, match="ensembles: c -> d -> c call each other in a circle"):
        loaded(tmp_path, {"kind": "vote", "models": ["d"]}, d={"kind": "vote", "models": ["c", "a"]})
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"members": {"a": {"model": "x"}}, "ensembles": {}, "councils": {}}))
    with pytest.raises(ConfigError, match="councils: write them under ensembles"):
        load_config(path)


@pytest.mark.parametrize(
    ("council", "words"),
    [
        ({"kind": "vote", "models": {"a": 17}}, "limits.max_calls: this council needs up to 17 calls, and 16"),
        (
            {"kind": "vote", "models": {"a": 9}, "limits": {"max_tokens": 8}},
            "limits.max_tokens: 9 calls share 8 tokens",
        ),
        (ROUTE | {"models": ["d"]}, "models: ['d'] are councils, which cannot say how likely a prompt is"),
        ({"kind": "vote", "models": ["a"], "by": "judge", "judge": "d"}, "judge: ['d'] are councils"),
    ],
)
def test_what_a_council_cannot_do_is_found_at_start(tmp_path: Path, council: dict[str, Any], words: str) -> None:
    config = loaded(tmp_path, council, d={"kind": "vote", "models": ["a"]})
    with pytest.raises(ConfigError) as caught:
        CouncilBook(config)
    assert f"ensembles.c.{words}" in str(caught.value)


def test_mathematical_answers_want_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = loaded(tmp_path, {"kind": "vote", "models": ["a"], "answer": "math"})
    CouncilBook(config)
    monkeypatch.setattr("ensemble_core.councils.book.is_installed", lambda: False)
    with pytest.raises(
        ConfigError, match=r"ensembles.c.answer: math needs a package; run pip install 'unisono\[math\]'"
    ):
        CouncilBook(config)


def test_paths_are_relative_to_the_file_and_a_list_of_models_means_one_of_each(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        ROUTE | {"by": "linear", "artefact": "../routers/c"},
        poll={"kind": "vote", "models": ["a", "ab"]},
    )
    route, poll = config.councils["c"], config.councils["poll"]
    assert isinstance(route, RouteConfig)
    assert route.artefact == (tmp_path / "../routers/c").resolve()
    assert isinstance(poll, VoteConfig)
    assert poll.models == {"a": 1, "ab": 1}


def test_layers_of_a_graph() -> None:
    nodes = {name: NodeConfig(model="a") for name in "abcd"}
    graph = GraphConfig(kind="graph", nodes=nodes, edges=(("a", "b"), ("a", "d"), ("c", "d"), ("b", "d")))
    assert layers(graph) == [("a", "c"), ("b",), ("d",)]
    assert graph.before("d") == ("a", "b", "c")
