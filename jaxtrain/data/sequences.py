"""Cuts a corpus into sequences of T+1 tokens: consecutive windows, or packed documents.

The input of a training step is the first T tokens of a sequence, the targets are the last T.
"""

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
        """Returns "tokens" and "docs", int32 [sequences, T+1], for sequence numbers [sequences].

        `docs` numbers the documents inside each sequence from 0, and is -1 where a partial window
        is padded.
        """
        T = self._T
        tokens = np.zeros((len(numbers), T + 1), np.int32)
        lengths = np.full((len(numbers), 1), T + 1)
        shards = np.searchsorted(self._ends, numbers, side="right")
        for i, (shard, number) in enumerate(zip(shards.tolist(), numbers.tolist(), strict=True)):
            start = (number - self._firsts[shard]) * T
            window = self._corpus.read(shard, start, start + T + 1)
            tokens[i, : len(window)] = window
            lengths[i] = len(window)
        if not with_docs:
            return {"tokens": tokens}
        # The first document is number 0 whether or not it starts at the first token. An unknown
        # eot is -1, which no token equals: all tokens then belong to document 0.
        starts = tokens[:, 1:] == self._corpus.eot
        docs = np.zeros_like(tokens)
        np.cumsum(starts, axis=1, out=docs[:, 1:])
        docs[np.arange(T + 1) >= lengths] = -1
        return {"tokens": tokens, "docs": docs}


class PackedSequences:
    """Each sequence holds whole documents, best-fit into T+1 tokens; longer ones are cut."""

    def __init__(self, corpus: Corpus, T: int):
        self._corpus, self._T = corpus, T
        self._packing = pack(corpus.documents(), T + 1)

    def __len__(self) -> int:
        return self._packing.rows

    def read(self, numbers: np.ndarray, with_docs: bool = True) -> dict[str, np.ndarray]:
        """Returns "tokens" and "docs", int32 [sequences, T+1], for sequence numbers [sequences].

        `docs` numbers the pieces of documents inside each sequence from 0. Padding is -1 in `docs`
        and eot in `tokens`.
        """
        assert with_docs, "without docs, padding cannot be masked and would be trained on"
        tokens = np.full((len(numbers), self._T + 1), self._corpus.eot, np.int32)
        docs = np.full((len(numbers), self._T + 1), -1, np.int32)
        shard, start, length, first = self._packing
        for i, number in enumerate(numbers.tolist()):
            filled = 0
            for doc, piece in enumerate(range(first[number], first[number + 1])):
                begin, size = int(start[piece]), int(length[piece])
                tokens[i, filled : filled + size] = self._corpus.read(
                    int(shard[piece]), begin, begin + size
                )
                docs[i, filled : filled + size] = doc
                filled += size
        return {"tokens": tokens, "docs": docs}
