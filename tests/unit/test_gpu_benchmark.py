"""The arithmetic of the GPU benchmark, on tiny shapes and the CPU; and what it does without a device."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import GpuPlan, Shape, build, measure, read_bytes, row, words

TINY = (
    Shape("small", 300, hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48),
    Shape("large", 700, hidden=64, layers=1, heads=4, kv_heads=1, intermediate=64),
)
PLAN = GpuPlan(torch.device("cpu"), torch.float32, TINY, (1, 3), length=64, steps=4, copied=2**20)


def test_what_a_step_reads() -> None:
    """By hand: every matrix and norm once, the table of embeddings not."""
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    assert read_bytes(build(TINY[0], PLAN)) == 4 * (2 * layer + 32 + 300 * 32)


def test_rows_are_ratios_of_what_they_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda plan: 1e9)
    rows, bandwidth = measure(PLAN)
    assert bandwidth == 1e9
    weights = sum(read_bytes(build(shape, PLAN)) for shape in TINY)
    token = 4 * (2 * 2 * 2 * 8 + 2 * 1 * 1 * 16)
    for found, batch in zip(rows, PLAN.batches, strict=True):
        assert (found["B"], found["L"]) == (batch, 64)
        assert found["floor ms"] == pytest.approx((weights + batch * 64 * token) / 1e9 * 1e3)
        assert 0 < float(str(found["forwards ms"])) < float(str(found["step ms"]))
        assert float(str(found["transformers ms"])) > 0


def test_a_row() -> None:
    assert row(8, 256, step=0.02, forwards=0.015, floor=0.01, own=0.08) == {
        "B": 8,
        "L": 256,
        "step ms": 20.0,
        "forwards ms": 15.0,
        "floor ms": 10.0,
        "step / floor": 2.0,
        "transformers ms": 80.0,
        "step / transformers": 0.25,
    }


def test_texts_of_the_smaller_vocabulary_are_spelt_by_both() -> None:
    small, large = words(300), words(700)
    ids = [5, 299, 17, 1]
    text = b"".join(small.tokens[i] for i in ids).decode()
    assert small.encode(text) == large.encode(text) == ids


def test_bandwidth_counts_what_is_read_and_written() -> None:
    assert 1e7 < gpu.copy_bandwidth(PLAN) < 1e12


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so_and_ends_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    gpu.main()
    assert capsys.readouterr().out == gpu.NO_DEVICE + "\n"
