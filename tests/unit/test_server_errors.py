from __future__ import annotations

import json

import pytest

from ensemble_core import errors as tree
from server.edge.errors import ApiError, from_validation, to_api_error


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (tree.InvalidRequestError("n is wrong", "n"), 400, "n", None),
        (tree.ModelNotFoundError("no x"), 404, "model", "model_not_found"),
        (tree.QueueFullError("full"), 429, None, "queue_full"),
        (tree.NotReadyError("loading"), 503, None, "not_ready"),
        (tree.MemberError("a", "broke"), 500, None, "request_failed"),
        (tree.UnisonoError("other"), 500, None, "request_failed"),
        (RuntimeError("secret"), 500, None, "internal_error"),
    ],
)
def test_the_tree_maps_to_statuses(error: Exception, status: int, param: str | None, code: str | None) -> None:
    refusal = to_api_error(error)
    assert (refusal.status, refusal.param, refusal.code) == (status, param, code)
    assert ("Retry-After" in refusal.headers) == (status in (429, 503))
    assert refusal.reason is not None


def test_a_bug_keeps_its_words_to_itself() -> None:
    assert "secret" not in to_api_error(RuntimeError("secret")).json()


def test_every_error_of_the_tree_is_mapped() -> None:
    for each in tree.UnisonoError.__subclasses__():
        args = {tree.MemberError: ("a", "b"), tree.ConstraintError: ("a", "b", "c")}
        error = each(*args.get(each, ("b",)))
        assert 400 <= to_api_error(error).status < 600


def test_the_body_has_openais_shape_and_survives_lone_surrogates() -> None:
    body = ApiError(400, "given \ud800 é", param="prompt").json()
    assert json.loads(body.encode("ascii")) == {
        "error": {
            "message": "given \ud800 é",
            "type": "invalid_request_error",
            "param": "prompt",
            "code": None,
        }
    }


def test_validation_names_each_field_and_quotes_little() -> None:
    wrong = {"type": "string_type", "msg": "must be a string", "input": "x" * 10_000}
    refusal = from_validation([wrong | {"loc": ("body", f"f{rank}", "g")} for rank in range(9)])
    assert refusal.param == "f0.g"
    assert "f0.g: must be a string (given: 'xxx" in refusal.message
    assert "f4.g" in refusal.message
    assert "f5.g" not in refusal.message
    assert len(refusal.message) < 1000
