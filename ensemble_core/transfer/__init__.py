"""Sparse transfer matrices: the relative representation of a member."""
