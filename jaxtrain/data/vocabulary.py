"""Checks that a model's vocabulary, its tokenizer and its text fit together."""

from jaxtrain.config.shell_commands import current_command, shell_command
from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.tokenizer import Tokenizer

MAX_UNUSED_ENTRIES = 1_024  # allowed in a model's vocabulary; a quarter of it if that is more
GPT2_ENTRIES = 50_257


def check_source(cfg: DataConfig, vocab_size: int) -> None:
    """Checks that a config names its data: the default text only suits byte-level models.

    Raises:
        ValueError: neither data.shards nor data.text is set, and data.tokenizer is not bytes.
    """
    if not (cfg.shards or cfg.text or cfg.mixture or cfg.tokenizer == "bytes"):
        raise ValueError(
            f"data.shards or data.text must be set for model.V={vocab_size} and "
            f"data.tokenizer={cfg.tokenizer}; got neither, and the default text, Python's standard "
            f"library, is only for byte-level models. Set --data.text. "
            f"{_encode_and_train(cfg.tokenizer, 'PATH')}"
        )


def check_vocabulary(
    cfg: DataConfig, tokenizer: Tokenizer, vocab_size: int, is_encoded: bool
) -> None:
    """Checks that a tokenizer's vocabulary has about the size of the model's.

    Args:
        is_encoded: whether an earlier start has encoded the text. Such a run can be resumed even
            if the model's vocabulary is far larger.

    Raises:
        ValueError: the model has fewer entries than the tokenizer, or far more.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"model.V must be at least the tokenizer's {tokenizer.vocab_size}; got "
            f"model.V={vocab_size}, data.tokenizer={cfg.tokenizer}. Set --model.V."
        )
    if not is_encoded and _is_far_larger(vocab_size, tokenizer.vocab_size):
        fitting = "tokenizer.json" if _is_far_larger(vocab_size, GPT2_ENTRIES) else "gpt2"
        raise ValueError(
            f"the tokenizer must fit the model's vocabulary; got model.V={vocab_size} and "
            f"data.tokenizer={cfg.tokenizer} of {tokenizer.vocab_size} entries. Set "
            f"--data.tokenizer={fitting}, or --model.V to about "
            f"{tokenizer.vocab_size}. {_encode_and_train(fitting, cfg.text or 'PATH')}"
        )


def _is_far_larger(vocab_size: int, entries: int) -> bool:
    """Returns whether vocab_size is not `entries` plus a plausible amount of padding."""
    unused = vocab_size - entries
    return unused < 0 or unused > max(vocab_size // 4, MAX_UNUSED_ENTRIES)


def _encode_and_train(tokenizer: str, text: str) -> str:
    encode = shell_command("encode", f"--input={text}", "--out=shards", f"--tokenizer={tokenizer}")
    train = current_command("--data.shards=shards")
    return f"Or make token shards and train on them:\n  {encode}\n  {train}"
