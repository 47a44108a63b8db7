"""Both sides of the comparison with vLLM: the same work, asked of each engine in the same way."""
