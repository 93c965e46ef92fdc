"""Looks at this machine and says whether it can train: `jaxtrain doctor`."""
