"""Nobody computes while a model's modules are made under another default dtype."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch
from tiny_models import Kind
from transformers import AutoModelForCausalLM

from ensemble_core.members.loading.models import guard_default_dtype
from ensemble_core.members.loading.standstill import DEFAULT_DTYPE, Standstill


def test_a_change_waits_for_those_who_compute_and_they_for_it() -> None:
    still, order, inside = Standstill(), [], threading.Event()

    def change() -> None:
        with still.changing():
            order.append("changed")
            time.sleep(0.02)
            order.append("over")

    def compute() -> None:
        with still.computing():
            order.append("computed")

    with still.computing(), still.computing():
        changing = threading.Thread(target=change)
        changing.start()
        while not still._num_changing:
            time.sleep(0.001)
        late = threading.Thread(target=compute)
        late.start()
        time.sleep(0.02)
        assert order == [], "a change waits for all, and whoever comes later waits for the change"
        inside.set()
    changing.join()
    late.join()
    assert order == ["changed", "over", "computed"]


def test_a_model_that_is_loaded_beside_others_never_changes_their_dtype(
    tiny_checkpoints: dict[Kind, Path],
) -> None:
    guard_default_dtype()
    seen: set[torch.dtype] = set()
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            with DEFAULT_DTYPE.computing():
                for _ in range(50):
                    seen.add(torch.zeros(1).dtype)

    computing = threading.Thread(target=compute)
    computing.start()
    try:
        for _ in range(3):
            model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints["llama"], dtype=torch.bfloat16)
            assert model.dtype is torch.bfloat16
    finally:
        stop.set()
        computing.join()
    assert seen == {torch.float32}
    assert torch.get_default_dtype() is torch.float32
