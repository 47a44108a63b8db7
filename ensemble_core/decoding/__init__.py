"""Requests in flight: parameters, sequences, scheduling, the step, sampling."""
