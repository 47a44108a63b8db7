"""What counts as a result."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ensemble_core.decoding.requests import Overrides
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.measures import completions
from ensemble_core.evaluation.tasks import Item
from ensemble_core.evaluation.variants import Variant
from ensemble_core.llm import Completion
from ensemble_core.stats import Reason


def judged(dropped: dict[str, Reason]) -> Any:
    answer = Completion(" Paris", (1,), "stop", None, 3, dropped=dropped)
    llm = SimpleNamespace(generate=lambda prompts, *_: [answer] * len(prompts))
    bench: Any = SimpleNamespace(llm=lambda: llm)
    task: Any = SimpleNamespace(kind="answer", name="t")
    items = [Item(index=i, line=i + 1, question="?", answers=("Paris",)) for i in range(2)]
    return list(completions(bench, Variant("duet", "duet", Overrides()), task, items, ""))


def test_a_completion_without_a_member_is_no_result() -> None:
    (values,) = judged({})
    assert [each["correct"] for each in values.values()] == [1, 1]
    with pytest.raises(EvaluationError, match=r"duet.*beta.*timeout"):
        judged({"beta": "timeout"})
