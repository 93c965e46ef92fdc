"""Checkpoints: saving, restoring, verifying, and the two kinds of storage."""
