"""Saves, restores and verifies checkpoints, on either of two kinds of storage."""
