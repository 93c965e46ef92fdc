"""Checks whether this machine can train: `jaxtrain doctor`."""
