"""The endpoints: turn a body into a job for the engine, and the engine's outputs into answers."""
