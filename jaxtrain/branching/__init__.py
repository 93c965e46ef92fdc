"""New runs from the checkpoints of others: branches and merged averages."""
