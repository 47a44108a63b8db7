"""Members behind inference servers that people run already: one file a dialect."""
