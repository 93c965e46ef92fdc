"""Scaling ladder: one stable run per size, horizons by branches, and a fit of the loss."""
