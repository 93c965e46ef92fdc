"""Weights of other frameworks, in and out: Hugging Face folders of GPT-2 and Llama, llm.c files."""


class InteropError(ValueError):
    """Weights that are not what they should be; the message lists every fault found."""
