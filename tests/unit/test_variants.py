"""Models and variants as they are asked for."""

from __future__ import annotations

import pytest

from ensemble_core.decoding.requests import Overrides
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.variants import parse_variant


def test_a_name_alone_overrides_nothing() -> None:
    found = parse_variant("duet")
    assert (found.label, found.model, found.overrides) == ("duet", "duet", Overrides())


def test_keys_are_paths_into_the_overrides_of_a_request() -> None:
    spec = "duet?fusion=relative&weights.a=0.7&weights.b=1&options.steps=6&options.inner.on=true&members=[a, b]"
    found = parse_variant(spec)
    assert (found.label, found.model) == (spec, "duet")
    assert found.overrides == Overrides(
        members=("a", "b"),
        weights={"a": 0.7, "b": 1.0},
        fusion="relative",
        fusion_options={"steps": 6, "inner": {"on": True}},
    )


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("duet?colour=red", "colour=red"),
        ("duet?fusion", "key=value"),
        ("duet?weights.a=heavy", "weights.a"),
        ("duet?weights=3", "weights"),
        ("duet?options.a=1&options.a.b=2", "options.a"),
        ("duet?options.a=[", "options.a"),
    ],
)
def test_what_is_not_understood_is_named(spec: str, what: str) -> None:
    with pytest.raises(EvaluationError, match=what):
        parse_variant(spec)
