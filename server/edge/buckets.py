"""The edges of the histograms in /metrics, in seconds or in what the name says.

Finest where medians lie: a step of a pair takes 20 to 60 ms on a CPU and 1 to 10 ms on a GPU. An edge that is there
stays, since dashboards and alerts may ask for it.
"""

from __future__ import annotations

# 1, 2.5, 5 in each decade: parts of a step from 0.1 ms, whole requests from 10 ms.
PART = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
REQUEST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
_FINE = (
    1e-3, 1.5e-3, 2e-3, 2.5e-3, 3e-3, 4e-3, 5e-3, 6e-3, 8e-3, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045,
    0.05, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
STEP = _FINE  # steps, forwards, gaps between tokens
FIRST = (*_FINE, 25.0, 50.0, 100.0, 250.0)  # the first token, queue included
BATCH = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
SHARE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ROUND = (1.0, 2.0, 3.0, 4.0, 5.0, 8.0)
MASS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
