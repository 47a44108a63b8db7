"""Strategies that make one distribution out of several."""
