"""`python -m studies [NAME ...]`: what fusion is worth, in docs/studies.md. `benchmarks/runner.py` has the options.

All but `trained_pair`, `unlike_vocabularies` and `routing` read the development tasks in ../shared/data.
"""

from benchmarks.ledger import ROOT
from benchmarks.runner import Suite, main

WORTH = Suite(
    "studies",
    (
        "fusion_table",
        "relative_sweep",
        "trained_pair",
        "unlike_vocabularies",
        "repetition_penalty",
        "positions",
        "bytes_and_common",
        "gate",
        "whole_answers",
        "routing",
        "votes",
    ),
    ROOT / "docs" / "studies.md",
)

if __name__ == "__main__":
    main(WORTH)
