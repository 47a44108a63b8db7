"""Recipes: what a request may override, and what is refused, with the field's name."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import FakeMember, fake_config, space_of

from ensemble_core.config import Config
from ensemble_core.decoding.requests import Overrides
from ensemble_core.errors import (
    ConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    TransferMatrixError,
    UnisonoError,
    quoted,
    shortened,
)
from ensemble_core.fusion.base import FusionSpace
from ensemble_core.recipes import _MAX_FUSIONS, RecipeBook, check_strategies, list_models

MEMBERS = {name: FakeMember(name) for name in ("alpha", "beta", "gamma")}
TRIO = {
    "members": {"beta": 1.0, "alpha": 2.0, "gamma": 1.0},
    "main": "alpha",
    "fusion": {"name": "relative", "options": {"solver": "em", "steps": 2}},
}


def config() -> Config:
    return fake_config(tuple(MEMBERS), ensembles={"trio": TRIO})


def book() -> RecipeBook:
    return RecipeBook(config(), lambda names, _: space_of([MEMBERS[name] for name in names]))


def refused(overrides: Overrides) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        book().resolve("trio", overrides)
    return caught.value


def test_the_configured_recipe_has_main_first() -> None:
    recipe = book().resolve("trio", Overrides())
    assert recipe.members == ("alpha", "beta", "gamma")
    assert recipe.weights == (0.5, 0.25, 0.25)
    assert (recipe.model, recipe.main, recipe.fusion_name, recipe.mode.name) == (
        "trio",
        "alpha",
        "relative",
        "lockstep",
    )


def test_a_member_answers_alone() -> None:
    recipe = book().resolve("beta", Overrides())
    assert (recipe.members, recipe.weights, recipe.fusion) == (("beta",), (1.0,), None)


def test_a_subset_keeps_its_configured_shares() -> None:
    recipe = book().resolve("trio", Overrides(members=("gamma", "alpha")))
    assert recipe.members == ("alpha", "gamma")
    assert recipe.weights == pytest.approx((2 / 3, 1 / 3))


def test_main_alone_needs_no_fusion() -> None:
    recipe = book().resolve("trio", Overrides(members=("alpha",)))
    assert (recipe.members, recipe.fusion, recipe.fusion_name) == (("alpha",), None, "single")


def test_weights_override_those_they_name() -> None:
    recipe = book().resolve("trio", Overrides(weights={"gamma": 5.0}))
    assert recipe.weights == pytest.approx((2 / 8, 1 / 8, 5 / 8))
    zero = book().resolve("trio", Overrides(weights={"alpha": 0.0}))
    assert zero.weights == (0.0, 0.5, 0.5)


def test_mode_may_name_what_there_is() -> None:
    assert book().resolve("trio", Overrides(mode="lockstep")).mode.name == "lockstep"


@pytest.mark.parametrize(
    ("overrides", "param", "says"),
    [
        (Overrides(members=("alpha", "delta")), "ensemble.members", "delta"),
        (Overrides(members=("beta",)), "ensemble.members", "alpha"),
        (Overrides(members=()), "ensemble.members", "alpha"),
        (Overrides(members=("alpha", "alpha")), "ensemble.members", "twice"),
        (Overrides(weights={"delta": 1.0}), "ensemble.weights", "delta"),
        (Overrides(weights={"beta": -0.1}), "ensemble.weights", "-0.1"),
        (Overrides(weights={"beta": float("nan")}), "ensemble.weights", "nan"),
        (Overrides(weights={"beta": float("inf")}), "ensemble.weights", "inf"),
        (Overrides(weights=dict.fromkeys(MEMBERS, 0.0)), "ensemble.weights", "greater than 0"),
        (Overrides(weights=dict.fromkeys(MEMBERS, 1e308)), "ensemble.weights", "finite"),
        (Overrides(members=("alpha",), weights={"beta": 1.0}), "ensemble.weights", "in use"),
        (Overrides(fusion="magic"), "ensemble.fusion", "relative"),
        (Overrides(members=("alpha",), fusion="magic"), "ensemble.fusion", "relative"),
        (Overrides(fusion_options={"steps": 0}), "ensemble.fusion", "steps"),
        (Overrides(fusion_options={"colour": "red"}), "ensemble.fusion", "colour"),
        (Overrides(fusion="relative", fusion_options={"solver": "x"}), "ensemble.fusion", "solver"),
        (Overrides(mode="warp"), "ensemble.mode", "lockstep"),
    ],
)
def test_wrong_overrides_name_their_field(overrides: Overrides, param: str, says: str) -> None:
    error = refused(overrides)
    assert error.param == param
    assert says in str(error)


@pytest.mark.parametrize(
    "overrides", [Overrides(weights={"beta": 1.0}), Overrides(mode="lockstep"), Overrides(members=())]
)
def test_a_member_has_nothing_to_override(overrides: Overrides) -> None:
    with pytest.raises(InvalidRequestError, match="trio") as caught:
        book().resolve("beta", overrides)
    assert caught.value.param == "ensemble"


def test_an_unknown_model_is_told_what_there_is() -> None:
    with pytest.raises(ModelNotFoundError, match="trio, alpha, beta, gamma"):
        book().resolve("nobody", Overrides())


def test_the_same_request_shares_a_fusion() -> None:
    shared = book()
    first = shared.resolve("trio", Overrides())
    assert shared.resolve("trio", Overrides(weights={"beta": 3.0})).fusion is first.fusion
    assert shared.resolve("trio", Overrides(fusion_options={"solver": "em", "steps": 2})).fusion is first.fusion
    assert shared.resolve("trio", Overrides(fusion_options={"steps": 4})).fusion is not first.fusion
    assert shared.resolve("trio", Overrides(members=("alpha", "beta"))).fusion is not first.fusion
    # A fusion named anew has its own defaults, not the configured options.
    assert shared.resolve("trio", Overrides(fusion="relative")).fusion is not first.fusion


def test_what_clients_ask_for_is_not_kept_for_ever() -> None:
    shared = book()
    for step in range(3 * _MAX_FUSIONS):
        shared.resolve("trio", Overrides(fusion_options={"solver": "search", "eta": 0.1 + step / 1000}))
    assert len(shared._built) == _MAX_FUSIONS


def test_configured_fusions_stay_and_of_the_others_the_least_recently_used_go() -> None:
    shared = book()
    shared.warm()
    num_configured = len(shared._built)
    assert num_configured == 3  # of all, and of what is left without beta or gamma once their contexts are full
    configured = shared.resolve("trio", Overrides()).fusion
    favourite = Overrides(fusion_options={"solver": "search", "eta": 0.9})
    used = shared.resolve("trio", favourite).fusion
    for step in range(3 * _MAX_FUSIONS):
        shared.resolve("trio", Overrides(fusion_options={"solver": "search", "eta": 0.1 + step / 1000}))
        assert shared.resolve("trio", favourite).fusion is used
    assert shared.resolve("trio", Overrides()).fusion is configured
    assert len(shared._built) == num_configured + _MAX_FUSIONS


def test_configured_fusions_stay_however_many_there_are() -> None:
    """More ensembles than client fusions are kept for, each with what is left if a member is dropped."""
    ensembles = {
        f"trio{i}": {
            **TRIO,
            "fusion": {"name": "relative", "options": {"solver": "search", "eta": 0.1 + i / 1000}},
            "on_member_failure": "drop",
        }
        for i in range(_MAX_FUSIONS)
    }
    built = []

    def space(names: tuple[str, ...], _: tuple[str, ...]) -> FusionSpace:
        built.append(names)
        return space_of([MEMBERS[name] for name in names])

    shared = RecipeBook(fake_config(tuple(MEMBERS), ensembles=ensembles), space)
    shared.warm()
    assert len(built) == len(shared._built) == 3 * _MAX_FUSIONS
    for name in ensembles:
        for gone in ((), ("beta",), ("gamma",)):
            assert shared.resolve(name, Overrides()).without(gone).fusion is not None
    assert len(built) == 3 * _MAX_FUSIONS


def test_equal_choices_are_fused_in_one_batch() -> None:
    shared = book()
    chosen = [Overrides(fusion_options={"solver": "em", "steps": steps}) for steps in (2, 3, 2)]
    first, second, third = (shared.resolve("trio", each).fusion_key for each in chosen)
    assert first == third != second
    assert first == shared.resolve("trio", Overrides()).fusion_key


def test_threads_that_build_one_fusion_end_with_one_object() -> None:
    barrier = threading.Barrier(4)

    def space(names: tuple[str, ...], _: tuple[str, ...]) -> FusionSpace:
        barrier.wait(10.0)
        return space_of([MEMBERS[name] for name in names])

    shared = RecipeBook(config(), space)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: shared.resolve("trio", Overrides()).fusion, range(4)))
    assert len({id(fusion) for fusion in found}) == 1


def test_missing_matrices_are_found_at_start_or_told_to_the_client() -> None:
    def missing(names: tuple[str, ...], whole: tuple[str, ...]) -> FusionSpace:
        raise TransferMatrixError(f"no matrix for {names} of {whole}")

    without = RecipeBook(config(), missing)
    with pytest.raises(TransferMatrixError, match="no matrix for"):
        without.warm()
    with pytest.raises(InvalidRequestError, match="not prepared") as caught:
        without.resolve("trio", Overrides(fusion="relative"))
    assert caught.value.param == "ensemble.fusion"


@pytest.mark.parametrize(
    ("fusion", "says"), [({"name": "magic"}, "relative"), ({"options": {"steps": -1}}, "steps")]
)
def test_configured_fusions_are_checked_with_their_path(fusion: dict[str, object], says: str) -> None:
    wrong = fake_config(tuple(MEMBERS), ensembles={"trio": {**TRIO, "fusion": fusion}})
    with pytest.raises(ConfigError, match=r"ensembles\.trio\.fusion") as caught:
        check_strategies(wrong)
    assert says in str(caught.value)
    check_strategies(config())


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("solo", "ensembles.trio.mode.name: unknown mode 'solo'; known are ['lockstep', 'sampled', 'verify']"),
        ({"name": "lockstep", "options": {"pace": 3}}, "ensembles.trio.mode.options.pace: Extra inputs are not"),
        (
            {"name": "verify", "options": {"drafter": "nobody"}},
            "ensembles.trio.mode.drafter: 'nobody' drafts for nobody here; choose one of ['main', 'lookup',",
        ),
        (
            {"name": "verify", "options": {"drafter": "beta", "lookup": True}},
            "lookup: the guesses come from the drafter beta; leave lookup out, or choose drafter main",
        ),
    ],
)
def test_configured_modes_are_checked_with_their_path(mode: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_strategies(fake_config(tuple(MEMBERS), ensembles={"trio": {**TRIO, "mode": mode}}))
    assert says in str(caught.value)


def test_models_are_ensembles_then_members() -> None:
    models = list_models(config(), {"alpha": 10, "beta": 20, "gamma": 30})
    assert [(m.name, m.kind, m.max_model_len) for m in models] == [
        ("trio", "ensemble", 10),
        ("alpha", "member", 10),
        ("beta", "member", 20),
        ("gamma", "member", 30),
    ]
    assert models[0].recipe is not None
    assert models[0].recipe["members"] == {"alpha": 0.5, "beta": 0.25, "gamma": 0.25}
    assert models[0].recipe["main"] == "alpha"
    json.dumps(models[0].recipe)
    assert models[1].recipe is None


LONG = "x" * 60_000


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        (LONG, Overrides()),
        ("trio", Overrides(members=(LONG,) * 64)),
        ("trio", Overrides(members=("alpha",) * 10_000)),
        ("trio", Overrides(weights={f"{LONG}{rank}": 1.0 for rank in range(64)})),
        ("trio", Overrides(fusion=LONG)),
        ("trio", Overrides(fusion="relative", fusion_options={f"{LONG}{rank}": LONG for rank in range(64)})),
        ("trio", Overrides(fusion="relative", fusion_options={"solver": LONG})),
        ("trio", Overrides(fusion="contrastive", fusion_options={"amateur": LONG})),
        ("trio", Overrides(mode=LONG)),
        ("trio", Overrides(mode="lockstep", mode_options={LONG: 1})),
    ],
)
def test_no_refusal_repeats_a_long_name_whole(model: str, overrides: Overrides) -> None:
    with pytest.raises(UnisonoError) as caught:
        book().resolve(model, overrides)
    assert len(str(caught.value)) < 2000


def test_quoted_text_is_cut_in_the_middle_and_has_no_control_characters() -> None:
    assert quoted("duet") == "'duet'"
    assert shortened("ensemble.it's") == "ensemble.it's"
    assert quoted(LONG) == "'" + "x" * 37 + "..." + "x" * 38 + "'"
    assert shortened("a\n\x1bb") == "a\\n\\x1bb"
    assert len(quoted([LONG] * 1000)) < 1000
    assert len(quoted({LONG: {LONG: LONG}})) < 1000
    assert len(quoted(10**4000)) < 100
