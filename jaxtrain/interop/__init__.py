"""Imports and exports weights: Hugging Face folders and llm.c files."""


class InteropError(ValueError):
    """Weights do not fit the model, or are damaged; the message lists every fault."""
