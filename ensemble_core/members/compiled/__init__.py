"""Loops that numba compiles for this processor, where torch has no operation on CPU that reads memory once.

Only what imports these modules knows whether they are there: without numba (`pip install 'unisono[cpu]'`) the import
fails, and callers stay with torch.
"""
