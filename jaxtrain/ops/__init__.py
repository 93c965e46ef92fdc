"""The choice of each op's implementation on the current chip."""
