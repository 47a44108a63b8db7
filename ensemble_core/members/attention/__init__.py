"""Attention of a packed pass over a member's cache: over rows, or over pages."""
