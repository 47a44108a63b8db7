"""Weights change in the file; nothing else does."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.yaml_weights import replaced, write_weights

TEXT = """\
# A comment at the top.
members: {a: {model: ./a}, b: {model: ./b}}   # odd   spacing

ensembles:
    duo:      # four spaces
        members: {b: 0.5, "a": .5}  # weights
        main: a
    block:
        members:
            a: 1        # the better one
            b: 1
        main: b

server: {api_keys: ['x # y']}   # quotes
"""


def test_only_the_numbers_change() -> None:
    changed = replaced(TEXT, "duo", {"a": 0.734, "b": 0.266})
    assert changed == TEXT.replace('{b: 0.5, "a": .5}', '{b: 0.266, "a": 0.734}')
    changed = replaced(changed, "block", {"b": 0.2, "a": 0.8})
    assert changed.replace("a: 0.8        #", "a: 1        #").replace("b: 0.2\n", "b: 1\n") == TEXT.replace(
        '{b: 0.5, "a": .5}', '{b: 0.266, "a": 0.734}'
    )


def test_the_demo_configuration_keeps_every_other_line() -> None:
    text = (Path(__file__).parents[2] / "configs" / "demo.yaml").read_text(encoding="utf-8")
    changed = replaced(text, "duet", {"gemma3": 0.611, "smollm2": 0.389})
    pairs = zip(text.splitlines(), changed.splitlines(), strict=True)
    ((_, line),) = [(before, after) for before, after in pairs if before != after]
    assert line.startswith("    members: {gemma3: 0.611, smollm2: 0.389}  # ")


def test_the_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(TEXT, encoding="utf-8")
    path.chmod(0o640)
    write_weights(path, "duo", {"a": 1.0, "b": 0.0})
    assert '{b: 0, "a": 1}' in path.read_text(encoding="utf-8")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("ensemble", "weights", "what"),
    [("trio", {"a": 1.0}, "ensembles.trio"), ("duo", {"c": 1.0}, r"ensembles\.duo\.members\.c")],
)
def test_what_is_not_in_the_file_is_refused(ensemble: str, weights: dict[str, float], what: str) -> None:
    with pytest.raises(EvaluationError, match=what):
        replaced(TEXT, ensemble, weights)


def test_shared_weights_are_not_touched() -> None:
    text = "ensembles:\n  one: {members: &w {a: 1, b: 2}, main: a}\n  two: {members: *w, main: b}\n"
    with pytest.raises(EvaluationError, match="alias"):
        replaced(text, "two", {"a": 3.0})
    with pytest.raises(EvaluationError, match=r"ensembles\.one\.members"):
        replaced(text, "one", {"a": 3.0})
