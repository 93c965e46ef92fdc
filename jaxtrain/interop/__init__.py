"""Import and export: Hugging Face folders of Llama, Qwen3 and GPT-2, and llm.c's model files."""


class InteropError(ValueError):
    """Weights that are not what they should be; the message lists every fault found."""
