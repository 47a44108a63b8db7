"""The endpoints: which job a body asks for, and how its answers are worded."""
