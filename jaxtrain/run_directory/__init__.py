"""The run directory: reads its config and summary, and locks it for a single writer."""
