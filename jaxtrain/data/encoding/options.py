"""The options of an encoding."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtrain.data.encoding.input_files import InputFiles, input_key
from jaxtrain.data.encoding.work_units import PIECE_BYTES
from jaxtrain.data.metadata import META_FORMAT
from jaxtrain.data.tokenizer import tokenizer_identity

ENCODING = 4  # incremented when the same input gives other tokens
SHARD_TOKENS = 100_000_000
JOURNAL_S = 10.0  # between writes of the journal: the most work that a kill can cost


class Flags(NamedTuple):
    """The command-line flags that errors name, which differ between commands."""

    text: str = "--data.text"
    text_field: str = "--data.text_field"


@dataclass(frozen=True)
class EncodeOptions:
    """How text is encoded. Only the first six decide what the shards contain."""

    tokenizer: str  # bytes, gpt2 or the path of a tokenizer.json
    name: str = "text"  # first part of the shards' names
    val_fraction: float = 0.0
    shard_tokens: int = SHARD_TOKENS
    text_field: str = "text"
    on_bad_document: str = "skip"  # skip: count and list unusable documents; stop: raise
    workers: int = 1
    piece_bytes: int = PIECE_BYTES
    journal_s: float = JOURNAL_S
    bar_delay_s: float = 1.0  # before a progress bar is shown
    flags: Flags = Flags()

    def key(self, files: InputFiles) -> str:
        """Returns a key of input and options: encodings with equal keys give equal shards."""
        made_by = META_FORMAT, ENCODING, tokenizer_identity(self.tokenizer)
        cut = self.val_fraction, self.shard_tokens, self.text_field, self.name
        return input_key(files, *made_by, *cut, self.on_bad_document)
