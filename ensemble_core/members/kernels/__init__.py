"""What is computed between a model's products: in torch's operations, or as compiled loops."""
