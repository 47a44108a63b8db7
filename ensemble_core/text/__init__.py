"""Bytes, tokens and text: the one currency between members."""
