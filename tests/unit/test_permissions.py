"""What a request may choose of its ensemble."""

from __future__ import annotations

from typing import Any

import pytest

from ensemble_core import factory  # noqa: F401  (registers the fusions)
from ensemble_core.config import Config
from ensemble_core.decoding.modes.base import MODES
from ensemble_core.decoding.requests import Overrides
from ensemble_core.errors import InvalidRequestError
from ensemble_core.fusion.base import FUSIONS
from ensemble_core.permissions import Permissions


def permissions(fusion: Any = "relative", **rules: Any) -> Permissions:
    ensemble = {"members": {"a": 1, "b": 1}, "main": "a", "fusion": fusion}
    return Permissions(
        Config.model_validate(
            {
                "members": {"a": {"model": "./a"}, "b": {"model": "./b"}},
                "ensembles": {"duo": ensemble},
                "server": {"allow_overrides": rules},
            }
        )
    )


def check(rules: Permissions, fusion: str | None = None, **options: Any) -> None:
    rules.check("duo", Overrides(fusion=fusion, fusion_options=options or None))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 11}, r"steps: a request may ask for 10 at most \(server.allow_overrides.most\), got 11"),
        ({"solver": "search", "steps": 100}, "got 100"),
        ({"support": "full"}, "requests may not ask for 'full'"),
    ],
)
def test_costly_options_are_refused_by_default(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        check(permissions(), "relative", **options)
    assert caught.value.param == "ensemble.fusion"


def test_costly_options_of_a_fusion_within_a_fusion_are_refused() -> None:
    for options in ({"steps": 50}, {"support": "full"}):
        with pytest.raises(InvalidRequestError, match=r"base\.options"):
            check(permissions(), "core", base={"name": "relative", "options": options})
    check(permissions(), "core", base={"name": "relative", "options": {"steps": 10}})


def test_what_the_recipe_has_is_allowed() -> None:
    rules = permissions({"name": "relative", "options": {"steps": 50, "support": "full"}})
    check(rules, "relative", steps=50, support="full")
    check(rules)
    with pytest.raises(InvalidRequestError):
        check(rules, "relative", steps=51, support="full")


def test_a_list_of_fusions_binds() -> None:
    rules = permissions(fusions=("union",))
    check(rules, "union")
    check(rules, "relative")
    for fusion, options in (("gac", {}), ("core", {"base": {"name": "projection"}})):
        with pytest.raises(InvalidRequestError, match=r"allowed are \['relative', 'union'\]"):
            check(rules, fusion, **options)


def test_a_list_of_modes_binds() -> None:
    rules = permissions(modes=())
    rules.check("duo", Overrides(mode="lockstep"))  # its own
    check(rules)


def test_what_does_not_exist_is_left_to_the_recipes() -> None:
    check(permissions(), "nonsense")
    check(permissions(), "relative", nonsense=1)
    permissions().check("nobody", Overrides(fusion="relative", fusion_options={"steps": 100}))


def test_limits_may_be_lifted() -> None:
    check(permissions(most={}, refused={}), "relative", steps=100, support="full")


def test_what_is_offered_is_what_is_allowed() -> None:
    """Each strategy with the schema of its options, without what a request may not give."""
    offered = permissions().offered()
    assert offered["fusions"].keys() == set(FUSIONS.names())
    assert offered["modes"].keys() == set(MODES.names())
    options = offered["fusions"]["relative"]["properties"]
    assert options["support"]["enum"] == ["closed"]
    assert options["solver"]["enum"] == ["em", "search"]
    assert next(part for part in options["steps"]["anyOf"] if part["type"] == "integer")["maximum"] == 10
    assert offered["modes"]["lockstep"]["properties"]["positions"]["enum"] == ["all", "shared"]
    fewer = permissions("eva", fusions=["union"], modes=[], most={"top": 5}, refused={}).offered()
    assert fewer["fusions"].keys() == {"eva", "union"}
    assert fewer["modes"].keys() == {"lockstep"}
    assert fewer["fusions"]["eva"]["properties"]["top"]["maximum"] == 5
    everything = permissions(most={}, refused={}).offered()["fusions"]
    assert everything["relative"]["properties"]["support"]["enum"] == ["closed", "full"]
