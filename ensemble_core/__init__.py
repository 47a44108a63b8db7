"""The engine of Unisono: members, alignment of vocabularies, fusion and decoding. It knows no HTTP."""

import os

# Weights are read from end to end at every step, which takes less time in huge pages. torch asks for this once, at
# its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
