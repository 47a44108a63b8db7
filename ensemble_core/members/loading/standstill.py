"""While a model's modules are made, nobody computes: transformers then sets torch's default dtype, for all threads.

A tensor that another thread makes meanwhile without naming its dtype would have the model's, and a fusion that should
run in float32 would run in bfloat16. So a model that is loaded beside a running engine waits for the engine's step to
end, and the next step waits until the modules are there: some tens of milliseconds, since they are made without
weights. Reading the weights, which takes long, is not part of it.

Knows one function of transformers by name (`modeling_utils.local_torch_dtype`); a test holds that it is still used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import modeling_utils


class Standstill:
    """Many may compute at the same time; whoever changes what holds for all of them is alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_computing = 0
        self._num_changing = 0  # that wait or are at it; whoever wants to compute lets them go first
        self._alone = False

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within the block nobody changes anything."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_changing)
            self._num_computing += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_computing -= 1
                self._changed.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within the block nobody computes."""
        with self._changed:
            self._num_changing += 1
            self._changed.wait_for(lambda: not self._num_computing and not self._alone)
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._num_changing -= 1
                self._alone = False
                self._changed.notify_all()


DEFAULT_DTYPE = Standstill()  # torch has one default dtype, so there is one of these
_own = modeling_utils.local_torch_dtype


def guard_default_dtype() -> None:
    """From now on transformers waits for `DEFAULT_DTYPE` before it sets the default dtype. Again: nothing happens."""
    modeling_utils.local_torch_dtype = _alone


@contextmanager
def _alone(dtype: torch.dtype, model_class_name: str | None = None) -> Iterator[None]:
    if dtype is torch.get_default_dtype():
        yield
        return
    with DEFAULT_DTYPE.changing(), _own(dtype, model_class_name):
        yield
