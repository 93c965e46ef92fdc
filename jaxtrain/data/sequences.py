"""Cuts a corpus into sequences of T+1 tokens: consecutive windows, or packed documents.

The input of a training step is the first T tokens of a sequence, the targets are the last T.

Which targets are trained, if document ids are read: each token inside a document follows from the
tokens before it, so it has weight 1. The first token of a document is a target only if an
end-of-text token separates it from the document before, that is if it is this token (the target
then says that the document has ended) or comes after it. It has weight 0 if the two documents are
not separated, and if one of them was cut there: nothing in the text implies such a target.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jaxtrain.data.corpus import Corpus
from jaxtrain.data.packing import pack


class Sequences(Protocol):
    """A corpus as numbered sequences, which can be read in any order."""

    def __len__(self) -> int: ...

    def read(self, numbers: np.ndarray, with_docs: bool) -> dict[str, np.ndarray]: ...


class WindowSequences:
    """Sequence i of a shard holds T+1 tokens, starting at token i * T; none spans two shards.

    Neighbouring windows share one token: it is the last target of one and the first input of the
    next, so every token but the first of a shard is a target exactly once.
    """

    def __init__(self, corpus: Corpus, T: int, partial: bool = False):
        """Counts the windows of each shard.

        Args:
            partial: whether tokens at the end of a shard that do not fill a window become a
                padded sequence.
        """
        self._corpus, self._T = corpus, T
        windows = corpus.windows_by_shard(T)
        if partial:
            windows = windows + np.array([(s.tokens - 1) % T > 0 for s in corpus.shards])
        self._ends = np.cumsum(windows)
        self._firsts = (self._ends - windows).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, numbers: np.ndarray, with_docs: bool = True) -> dict[str, np.ndarray]:
        """Returns "tokens" and "docs", int32 [N,T+1], and "weights", float32 [N,T].

        `docs` numbers the documents inside each sequence from 0, and is -1 where a partial window
        is padded. `weights` are those of the targets.

        Args:
            numbers: of the sequences, [N].
            with_docs: without it, only the tokens are returned.
        """
        T = self._T
        tokens = np.zeros((len(numbers), T + 1), np.int32)
        starts = np.zeros((len(numbers), T + 1), bool)
        lengths = np.full((len(numbers), 1), T + 1)
        shards = np.searchsorted(self._ends, numbers, side="right")
        for i, (shard, number) in enumerate(zip(shards.tolist(), numbers.tolist(), strict=True)):
            start = (number - self._firsts[shard]) * T
            window = self._corpus.read(shard, start, start + T + 1)
            tokens[i, : len(window)] = window
            lengths[i] = len(window)
            if with_docs:
                # The first document is number 0 whether or not it starts at the first token.
                end = start + len(window)
                starts[i, self._corpus.starts_between(shard, start + 1, end) - start] = True
        if not with_docs:
            return {"tokens": tokens}
        docs = np.cumsum(starts, axis=1, dtype=np.int32)
        docs[np.arange(T + 1) >= lengths] = -1
        weights = _target_weights(tokens, docs, self._corpus.eot)
        return {"tokens": tokens, "docs": docs, "weights": weights}


class PackedSequences:
    """Each sequence holds whole documents, best-fit into T+1 tokens; longer ones are cut."""

    def __init__(self, corpus: Corpus, T: int):
        self._corpus, self._T = corpus, T
        self._packing = pack(corpus.documents(), T + 1)

    def __len__(self) -> int:
        return self._packing.rows

    def read(self, numbers: np.ndarray, with_docs: bool = True) -> dict[str, np.ndarray]:
        """Returns "tokens" and "docs", int32 [N,T+1], and "weights", float32 [N,T].

        `docs` numbers the pieces of documents inside each sequence from 0. Padding is -1 in `docs`
        and eot in `tokens`. `weights` are those of the targets.

        Args:
            numbers: of the sequences, [N].
        """
        assert with_docs, "without docs, padding cannot be masked and would be trained on"
        corpus, T1 = self._corpus, self._T + 1
        tokens = np.full((len(numbers), T1), max(corpus.eot, 0), np.int32)
        docs = np.full((len(numbers), T1), -1, np.int32)
        is_cut = np.zeros((len(numbers), T1), bool)
        pieces = self._packing
        for i, number in enumerate(numbers.tolist()):
            filled, ended = 0, True  # whether the piece before is the end of a document
            for doc, j in enumerate(range(pieces.first[number], pieces.first[number + 1])):
                shard, start, size = int(pieces.shard[j]), int(pieces.start[j]), pieces.length[j]
                end = start + int(size)
                tokens[i, filled : filled + size] = corpus.read(shard, start, end)
                docs[i, filled : filled + size] = doc
                is_cut[i, filled] = not (ended and corpus.is_between_documents(shard, start))
                ended = corpus.is_between_documents(shard, end)
                filled += size
        weights = _target_weights(tokens, docs, corpus.eot, is_cut)
        return {"tokens": tokens, "docs": docs, "weights": weights}


class JoinedSequences:
    """The sequences of several sources, numbered on from one source to the next."""

    def __init__(self, parts: Sequence[Sequences]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, numbers: np.ndarray, with_docs: bool) -> dict[str, np.ndarray]:
        """Returns what the sources' own read() does, in the order of the numbers.

        And "source", int32 [N]: the number of each sequence's source.
        """
        source = np.searchsorted(self._ends, numbers, side="right")
        joined: dict[str, np.ndarray] = {"source": source.astype(np.int32)}
        for i in np.unique(source):
            inside = source == i
            first = self._ends[i] - len(self._parts[i])
            for name, rows in self._parts[i].read(numbers[inside] - first, with_docs).items():
                if name not in joined:
                    joined[name] = np.empty((len(numbers), *rows.shape[1:]), rows.dtype)
                joined[name][inside] = rows
        return joined


def _target_weights(
    tokens: np.ndarray, docs: np.ndarray, eot: int, is_cut: np.ndarray | None = None
) -> np.ndarray:
    """Returns the weight of each target, 0 or 1, float32 [N,T]; see the top of this file.

    Args:
        tokens: int32 [N,T+1].
        docs: int32 [N,T+1], -1 for padding.
        eot: the token that separates documents; -1: unknown, which no token equals.
        is_cut: bool [N,T+1]: whether a document was cut before this token.
    """
    is_eot = tokens == eot
    separated = is_eot[:, 1:] | is_eot[:, :-1]
    if is_cut is not None:
        separated &= ~is_cut[:, 1:]
    is_target = (docs[:, 1:] == docs[:, :-1]) | separated
    return (is_target & (docs[:, 1:] >= 0)).astype(np.float32)
