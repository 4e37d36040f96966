"""Checkpoints: the file, the folder that holds them, and the state in them by name."""
