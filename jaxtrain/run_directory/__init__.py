"""Reads a run directory's config and summary, and locks it so that only one run writes to it."""
