"""Finished items on disk, a line each, so that an evaluation that was cut off goes on where it was.

A folder of results holds `run.json`, what the results were made from, and `items.jsonl`. Invariant: items of one
folder come from one state of configuration and tasks; another state is refused by the name of what differs. A last
line that was cut off is dropped. Knows JSON; does not know what the items mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensemble_core.errors import EvaluationError

Values = Mapping[str, Any]
Key = tuple[str, str, str]  # model, task, measure


class Journal:
    """Items by model, task and measure; index of the record -> values. folder None: kept in memory alone.

    made_from: name -> what may not change between runs. Raises EvaluationError where the folder's differs, or where
    it has results and `resume` is not set.
    """

    def __init__(self, folder: Path | None, made_from: Mapping[str, Any], resume: bool) -> None:
        self._items: dict[Key, dict[int, Values]] = {}
        self._path = None if folder is None else folder / "items.jsonl"
        if folder is not None:
            _require_same(folder, made_from, resume)
            self._read()

    def items(self, key: Key) -> Mapping[int, Values]:
        """What is there."""
        return self._items.get(key, {})

    def add(self, key: Key, items: Mapping[int, Values]) -> None:
        """Keep finished items."""
        self._items.setdefault(key, {}).update(items)
        if self._path is None:
            return
        model, task, measure = key
        with self._path.open("a", encoding="utf-8") as file:
            for index, values in items.items():
                line = {"model": model, "task": task, "measure": measure, "item": index, "values": values}
                file.write(json.dumps(line) + "\n")

    def _read(self) -> None:
        assert self._path is not None
        if not self._path.exists():
            return
        whole = self._path.read_text(encoding="utf-8").rpartition("\n")
        if whole[2]:
            self._path.write_text(whole[0] + whole[1], encoding="utf-8")
        for line in whole[0].splitlines():
            entry = json.loads(line)
            key = (entry["model"], entry["task"], entry["measure"])
            self._items.setdefault(key, {})[entry["item"]] = entry["values"]


def _require_same(folder: Path, made_from: Mapping[str, Any], resume: bool) -> None:
    path = folder / "run.json"
    made_from = json.loads(json.dumps(made_from, default=str))
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if before and not resume:
            raise EvaluationError(f"{folder} has results already; pass --resume to go on, or another --out")
        changed = [name for name in before if name in made_from and before[name] != made_from[name]]
        if changed:
            raise EvaluationError(
                f"{folder}: the results there were made from other {', '.join(changed)}; choose another --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**before, **made_from}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"--out {folder}: cannot be used ({error.strerror})") from error
