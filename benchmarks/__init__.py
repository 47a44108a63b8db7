"""Benchmarks: each is one command, prints a table and one JSON line; `python -m benchmarks` runs them all."""

import os
import sys

if not sys.stderr.isatty():  # as `unisono` does it: progress bars are for people
    os.environ.setdefault("TQDM_DISABLE", "1")
