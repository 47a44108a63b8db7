"""`python -m benchmarks [NAME ...]`: what things cost, in docs/performance.md. See `runner.py` for the options."""

from benchmarks.ledger import ROOT
from benchmarks.runner import Suite, main

SPEED = Suite(
    "benchmarks",
    (
        "member_forward",
        "step_overhead",
        "fusion_time",
        "gate_time",
        "costs",
        "serving",
        "batches",
        "verify",
        "sampled",
        "prefix_reuse",
        "forms",
        "growth",
        "busy",
        "far",
        "against_vllm",
        "build_matrices",
        "start",
    ),
    ROOT / "docs" / "performance.md",
)

if __name__ == "__main__":
    main(SPEED)
