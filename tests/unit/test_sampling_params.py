"""Parameters by themselves: every bound is held, and the refusal names the field."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import InvalidRequestError

BOUNDS: list[tuple[str, list[Any], list[Any]]] = [
    ("max_tokens", [16, 2**31 - 1], [0, -1, 2**31, 1.0, True, "3"]),
    ("min_tokens", [0, 16], [-1, 17, 0.5, False]),
    ("stop", [("a",) * 16, ("x" * 1024,)], [("a",) * 17, ("",), ("x" * 1025,), "abc"]),
    ("stop_token_ids", [(0,), (1,) * 64], [(1,) * 65, (-1,), (2**31,), (1.5,), (True,)]),
    ("ignore_eos", [True], [1, None]),
    ("include_stop_str_in_output", [True], [0]),
    ("skip_special_tokens", [False], ["no"]),
    ("echo", [True], [1]),
    ("seed", [0, -(2**63), 2**63 - 1, None], [-(2**63) - 1, 2**63, 0.5, True]),
    ("logprobs", [0, 20, None], [-1, 21, True]),
    ("prompt_logprobs", [0, 20, None], [-1, 21, True]),
    ("thinking_token_budget", [-1, 0, 2**31 - 1, None], [-2, 2**31, 0.5, True]),
    ("repetition_penalty", [0.01, 1, 10.0], [0.0, 0.009, 10.1, math.nan, math.inf, "1", True]),
    ("presence_penalty", [-2, 2.0], [-2.1, 2.1, math.nan]),
    ("frequency_penalty", [-2.0, 2], [-2.1, 2.1, -math.inf]),
    (
        "logit_bias",
        [((5, -100.0), (6, 100)), ((1, 0.0),) * 1024],
        [((5, -100.5),), ((5, 101.0),), ((-1, 1.0),), ((5, math.nan),), ((1, 0.0),) * 1025],
    ),
    ("allowed_token_ids", [(0,), (1,) * 1024], [(1,) * 1025, (-1,), (2**31,), (1.5,), (True,)]),
    ("logprob_token_ids", [(0,), (1,) * 128], [(1,) * 129, (-1,), (2**31,), (1.5,), (True,)]),
    ("bad_words", [("a",) * 128, ("x" * 256,)], [("a",) * 129, ("",), ("x" * 257,), "abc"]),
    ("temperature", [0, 2.0], [-0.1, 2.1, math.nan, True]),
    ("top_k", [0, 1, 2**31 - 1], [-1, 2**31, 1.0]),
    ("top_p", [1e-6, 1], [0.0, -0.1, 1.1, math.nan]),
    ("min_p", [0.0, 1.0], [-0.1, 1.1]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, good, _ in BOUNDS for value in good])
def test_what_is_within_the_bounds_is_kept(name: str, value: object) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, _, bad in BOUNDS for value in bad])
def test_what_is_without_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
    assert name in str(caught.value)


def test_every_field_has_its_bounds_here() -> None:
    fields = set(SamplingParams.__dataclass_fields__) - {"form"}
    assert {name for name, _, _ in BOUNDS} == fields


def test_a_form_is_a_form() -> None:
    with pytest.raises(InvalidRequestError, match="TextForm") as caught:
        SamplingParams(form="{}")  # type: ignore[arg-type]
    assert caught.value.param == "form"


def test_nothing_is_generated_only_where_the_prompt_is_echoed() -> None:
    assert SamplingParams(max_tokens=0, echo=True).max_tokens == 0
    with pytest.raises(InvalidRequestError, match="1 to"):
        SamplingParams(max_tokens=0)
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(max_tokens=0, min_tokens=1, echo=True)
    assert caught.value.param == "min_tokens"


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, False),
        ({"temperature": 0.0, "top_k": 3, "min_p": 0.1, "min_tokens": 4}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"logit_bias": ((3, 1.0),)}, True),
        ({"allowed_token_ids": (3,)}, True),
        ({"bad_words": ("a",)}, True),
    ],
)
def test_who_shapes(options: dict[str, Any], shapes: bool) -> None:
    assert SamplingParams(**options).shapes_logits is shapes
