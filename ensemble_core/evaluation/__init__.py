"""Scoring ensembles and members on tasks, and tuning weights."""
