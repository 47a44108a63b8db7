"""Resident language models behind one small protocol."""
