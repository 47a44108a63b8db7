"""A model's body: from the tokens of a packed pass to logits."""
