"""Whether a model, its tokenizer and its text were made for each other."""

from jaxtrain.config.shell_commands import current_command, shell_command
from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.tokenizer import Tokenizer

FEW_ENTRIES = 1_024  # a model may have so many unused, whatever their share
GPT2_ENTRIES = 50_257


def check_source(cfg: DataConfig, vocab_size: int) -> None:
    """Refuses to train a model of words on the text that only stands in for a corpus.

    Raises:
        ValueError: neither data.shards nor data.text is set, and data.tokenizer is not bytes.
    """
    if not (cfg.shards or cfg.text or cfg.tokenizer == "bytes"):
        raise ValueError(
            f"data.shards or data.text must be set for model.V={vocab_size} and "
            f"data.tokenizer={cfg.tokenizer}; got neither, and Python's standard library is a "
            "corpus for models of bytes only. Set --data.text. "
            f"{_two_commands(cfg.tokenizer, 'PATH')}"
        )


def check_vocabulary(cfg: DataConfig, tokenizer: Tokenizer, vocab_size: int, encoded: bool) -> None:
    """Refuses to encode text with a tokenizer that the model was not made for.

    Args:
        encoded: an earlier start has encoded the text; its run may be read and resumed as it is.

    Raises:
        ValueError: the model has fewer entries than the tokenizer, or far more.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"model.V must be at least the tokenizer's {tokenizer.vocab_size}; got "
            f"model.V={vocab_size}, data.tokenizer={cfg.tokenizer}. Set --model.V."
        )
    if not encoded and _leaves_unused(vocab_size, tokenizer.vocab_size):
        fitting = "tokenizer.json" if _leaves_unused(vocab_size, GPT2_ENTRIES) else "gpt2"
        raise ValueError(
            f"the tokenizer must fit the model's vocabulary; got model.V={vocab_size} and "
            f"data.tokenizer={cfg.tokenizer} of {tokenizer.vocab_size} entries. Set "
            f"--data.tokenizer={fitting}, or --model.V to about "
            f"{tokenizer.vocab_size}. {_two_commands(fitting, cfg.text or 'PATH')}"
        )


def _leaves_unused(vocab_size, entries) -> bool:
    """Whether the model has far more entries than the tokenizer, beyond any padding."""
    return vocab_size < entries or vocab_size - entries > max(vocab_size // 4, FEW_ENTRIES)


def _two_commands(tokenizer, text) -> str:
    make = shell_command("encode", f"--input={text}", "--out=shards", f"--tokenizer={tokenizer}")
    use = current_command("--data.shards=shards")
    return f"Or make token shards and train on them:\n  {make}\n  {use}"
