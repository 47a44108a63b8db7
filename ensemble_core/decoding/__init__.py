"""Requests in flight: parameters, sequences, scheduling, steps, sampling."""
