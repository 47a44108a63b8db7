"""Recipes that are whole conversations between models."""
