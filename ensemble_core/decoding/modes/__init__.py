"""The ways to take a sequence's next step, one file each."""
