"""The registry of fusions: names, options and the path of a wrong one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ensemble_core.errors import ConfigError, UnknownStrategyError
from ensemble_core.fusion.base import FUSIONS, FusionSpace, build_fusion, single
from ensemble_core.fusion.relative import RelativeFusion, RelativeOptions
from ensemble_core.members.candidates import top_candidates
from ensemble_core.transfer.matrix import TransferMatrix

WHERE = "ensembles.duo.fusion"


def test_an_unknown_name_lists_what_there_is() -> None:
    assert "relative" in FUSIONS.names()
    with pytest.raises(UnknownStrategyError) as refusal:
        FUSIONS.parse("relativ", {}, WHERE)
    assert str(refusal.value) == f"{WHERE}.name: unknown fusion 'relativ'; known are {FUSIONS.names()}"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"eta": -1.0}, "eta"),
        ({"steps": 0}, "steps"),
        ({"steps": 101}, "steps"),
        ({"solver": "newton"}, "solver"),
        ({"support": "open"}, "support"),
        ({"beta": 2}, "beta"),
    ],
)
def test_a_wrong_option_carries_its_path_and_value(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        FUSIONS.parse("relative", options, WHERE)
    assert str(refusal.value).startswith(f"{WHERE}.options.{field}: ")
    assert f"(given: {options[field]!r})" in str(refusal.value)


def test_every_wrong_option_is_named() -> None:
    with pytest.raises(ConfigError) as refusal:
        FUSIONS.parse("relative", {"eta": 0, "steps": "many"}, WHERE)
    assert "options.eta" in str(refusal.value)
    assert "options.steps" in str(refusal.value)


@pytest.mark.parametrize("support", ["closed", "full"])
def test_a_fusion_is_built_from_its_options(support: str) -> None:
    matrix = TransferMatrix(torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1), torch.tensor([0]))
    options = FUSIONS.parse("relative", {"solver": "search", "eta": 0.5, "support": support}, WHERE)
    assert options == RelativeOptions(solver="search", eta=0.5, support=support)  # type: ignore[arg-type]
    fusion = build_fusion("relative", options, FusionSpace((), lambda: [matrix, matrix], torch.device("cpu")))
    assert isinstance(fusion, RelativeFusion)
    assert fusion.name == "relative"
    assert fusion.full_vocabulary is (support == "full")


def test_one_member_passes_through_untouched() -> None:
    part = top_candidates(torch.randn(3, 50, generator=torch.Generator().manual_seed(0)), 7)
    fused = single(part)
    assert fused.token_ids is part.token_ids
    assert fused.logprobs is part.logprobs
    assert fused.tail is part.tail
    assert fused.unmapped.tolist() == [[0.0]] * 3
