"""Removes the rows that pad a model's vocabulary to a round number from an export.

A run with model.V=50304 and a tokenizer of 50,257 tokens has 47 rows that no text uses. In an
export they would be tokens that a model can generate, but that no tokenizer can decode.
"""

from typing import Any

from jaxtrain.axes import Axes
from jaxtrain.data.tokenizer import Tokenizer
from jaxtrain.interop.hf_tokenizer import SpecialTokens

MAX_PADDING = 1_024  # rows; vocabularies are rounded up to a multiple of at most this


def choose_rows(
    tokenizer: Tokenizer | None, special: SpecialTokens, V: int, imported: bool
) -> tuple[int, str]:
    """Returns (how many of V rows an export has, a line about them for the export's report).

    The rows after the last token are removed, with two exceptions. Padding of imported weights is
    part of their model, which has the same number of rows everywhere else. And rows that are too
    many to be padding may be those of another tokenizer.

    Args:
        tokenizer: of the run's text; None if it is not known.
        imported: whether the run began with imported weights.
    """
    if tokenizer is None:
        return V, f"vocabulary: {V:,} rows; without a tokenizer, padding is not recognised"
    ids = [id for id in (special.bos, special.pad, *special.eos) if id is not None]
    used = min(V, max([tokenizer.vocab_size, *(id + 1 for id in ids)]))
    unused = V - used
    if not unused:
        return V, f"vocabulary: {V:,} rows, one for each token"
    if not imported and unused < MAX_PADDING:
        return used, f"vocabulary: {used:,} rows; {unused:,} rows of padding are removed"
    reason = "as in the imported weights" if imported else "too many to be padding"
    return V, f"vocabulary: {V:,} rows, of which {unused:,} are without a token ({reason})"


def cut_vocabulary(axes: dict[str, Axes], params: dict[str, Any], rows: int) -> dict[str, Any]:
    """Returns {name: array} with the first rows of the embedding and the head, [V,D]."""
    has_vocabulary = lambda name: "V" in axes[name].stack + axes[name].outputs
    return {name: x[:rows] if has_vocabulary(name) else x for name, x in params.items()}
