"""Compiles the forms of requests beside the engine: one at a time, in a thread of low priority, tried out before.

Invariants: whatever a form costs, the event loop and the engine's thread only wait for their share of the cores; what
waits is bounded. What was found, a grammar or a refusal, is kept by the `Grammars` of its vocabulary. Does not know
requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.guidance import Grammars
from ensemble_core.errors import QueueFullError

_MOST_WAITING = 32
_PRIORITY = 10
_LONGEST_SECONDS = 60.0  # until a process that does not answer counts as broken; it bounds its children itself
_ROOT = Path(__file__).parents[2]


class Workshop:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "grammars", _step_back)
        self._trial = _Trial()
        self._num_waiting = 0

    async def prepare(self, grammars: Grammars, form: TextForm) -> None:
        """Find out what becomes of a form, so that `grammars.compile` knows it. Raises QueueFullError."""
        if grammars.knows(form):
            return
        if self._num_waiting >= _MOST_WAITING:
            raise QueueFullError(f"{form.field}: {_MOST_WAITING} other forms wait to be compiled; try again later")
        self._num_waiting += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._make, grammars, form)
        finally:
            self._num_waiting -= 1

    def keep(self, grammars: Iterable[Grammars]) -> None:
        """Let the process forget all other vocabularies; one that is needed again is told anew."""
        with contextlib.suppress(RuntimeError):  # closed
            self._thread.submit(self._trial.keep, {each.key for each in grammars})

    def close(self) -> None:
        """Stop the thread and the process."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._trial.close()

    def _make(self, grammars: Grammars, form: TextForm) -> None:
        if not grammars.knows(form):  # two requests may have waited for the same
            found = self._trial.ask(grammars, form)
            grammars.learn(form, found.get("grammar"), found.get("refusal", ""))


class _Trial:
    """The process of `trial`, started with the first form and again after it has died. Of one thread alone."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._known: set[int] = set()

    def ask(self, grammars: Grammars, form: TextForm) -> dict[str, str]:
        """`grammar` or `refusal`."""
        asked = {"kind": form.kind, "source": form.source, "layout": form.layout, "most": form.most}
        try:
            process = self._started()
            if grammars.key not in self._known:
                self._say(process, grammars.outline() | {"key": grammars.key})
                self._known.add(grammars.key)
            self._say(process, {"key": grammars.key, "form": asked})
            return dict(json.loads(self._answer(process)))
        except (OSError, ValueError):
            self.close()
            return {"refusal": "it could not be tried out"}

    def keep(self, keys: set[int]) -> None:
        """Forget all other vocabularies."""
        try:
            for key in self._known - keys:
                self._say(self._started(), {"forget": key})
        except OSError:
            self.close()
        self._known &= keys

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        self._known.clear()
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
            process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ensemble_core.decoding.trial"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is the server's
            )
        return self._process

    @staticmethod
    def _say(process: subprocess.Popen[bytes], asked: dict[str, Any]) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        process.stdin.flush()

    @staticmethod
    def _answer(process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        alarm = threading.Timer(_LONGEST_SECONDS, process.kill)
        alarm.start()
        try:
            return process.stdout.readline()
        finally:
            alarm.cancel()


def _step_back() -> None:
    """Give this thread a low priority, where threads have priorities of their own (Linux)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _PRIORITY)
