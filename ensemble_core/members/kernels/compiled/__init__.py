"""Loops that numba compiles for this processor, where torch has no operation on CPU that reads memory once."""
