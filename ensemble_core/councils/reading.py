"""Reads what answers vote for, in the order of their calls. The one place where reading may take another process.

Invariant: reading ends. An answer whose comparison does not end in time stands for itself, as its words. Does not
know what is done with votes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from anyio import BrokenWorkerProcess, CapacityLimiter, fail_after
from anyio.to_process import run_sync

from ensemble_core.councils.answers import AnswerForm, answer_in
from ensemble_core.councils.mathematics import MathAnswer, compared

logger = logging.getLogger(__name__)

NUM_PROCESSES = 2  # that read mathematics at the same time; about 100 MB each
_HARD_LIMIT = 10.0  # seconds for one text; the first includes the start of a process


@dataclass(slots=True)
class Reader:
    """Reads the answers of one round. limiter: shared by all that read. deadline: by time.perf_counter()."""

    form: AnswerForm
    limiter: CapacityLimiter
    deadline: float
    _texts: list[str] = field(default_factory=list)  # one for each mathematical answer so far
    _shown: list[str] = field(default_factory=list)

    async def vote(self, text: str) -> str | None:
        """The answer of a text, in the form in which answers are compared; None: it has none."""
        if self.form != "math":
            return answer_in(text, self.form)
        try:
            found = await self._compared(text)
        except (TimeoutError, BrokenWorkerProcess, MemoryError) as error:
            logger.warning(
                "a mathematical answer could not be compared (%s); it stands for itself", type(error).__name__
            )
            return answer_in(text, "exact")
        return None if found is None else self._named(text, found)

    async def _compared(self, text: str) -> MathAnswer | None:
        async with self.limiter:
            left = max(min(_HARD_LIMIT, self.deadline - time.perf_counter()), 0.0)
            with fail_after(left):
                return await run_sync(
                    compared, text, tuple(self._texts), cancellable=True, limiter=CapacityLimiter(1)
                )

    def _named(self, text: str, found: MathAnswer) -> str:
        if found.rank is not None:
            return self._shown[found.rank]
        self._texts.append(text)
        taken = found.shown in self._shown  # other answers may read the same, as x and "x"
        self._shown.append(f"{found.shown} ({len(self._shown)})" if taken else found.shown)
        return self._shown[-1]
