"""Where a member's work is queued: at once on the CPU, on a CUDA stream of its own on a GPU.

Everything that a member does goes through its lane: forwards, and what changes its cache. So members of one GPU
overlap, and nobody waits for a member but the stream that reads its answers. How long a forward took is asked of the
device when the step is over. Does not know feeds, caches or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ensemble_core.members.base import Answers


class Lane:
    """The CPU: nothing is queued."""

    @contextmanager
    def work(self) -> Iterator[None]:
        """Within the block, what is done is queued here."""
        yield

    def forward(self, compute: Callable[[], Answers]) -> Answers:
        """An answer that the caller may read."""
        return compute()


class CudaLane(Lane):
    """One member's stream on its device."""

    def __init__(self, device: torch.device) -> None:
        """What the device's current stream has queued (weights on their way) comes first."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def work(self) -> Iterator[None]:
        """See `Lane.work`."""
        with torch.cuda.stream(self._stream):
            yield

    def forward(self, compute: Callable[[], Answers]) -> Answers:
        """The caller's stream reads the answer after it is there; the host does not wait."""
        begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        reader = torch.cuda.current_stream(self._device)
        with self.work():
            begun.record()
            answers = compute()
            done.record()
        reader.wait_stream(self._stream)
        for block in answers.blocks:
            for tensor in (block.token_ids, block.logprobs, block.tail):
                tensor.record_stream(reader)

        def seconds() -> float:
            done.synchronize()
            return float(begun.elapsed_time(done)) / 1e3

        return replace(answers, clock=seconds)


def lane_on(device: torch.device) -> Lane:
    """The lane of a member on `device`."""
    return CudaLane(device) if device.type == "cuda" else Lane()
