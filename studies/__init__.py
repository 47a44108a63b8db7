"""Studies: what fusion is worth. Each is one command, prints a table and one JSON line."""
