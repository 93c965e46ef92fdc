"""Grain's data source: the part of batch n that one process reads, for any n."""

import sys
from collections.abc import Callable

import numpy as np

from jaxtrain.data.sequences import Sequences
from jaxtrain.data.shuffle import shuffled_epochs

BLOCK = 4096  # indices shuffled per call: an index costs 40 us in calls of 8, 0.3 us in a block
MAX_SITES = 1_024  # bounds the positions of shuffled_epochs below 2^63
Order = Callable[[np.ndarray], np.ndarray]


class BatchSource:
    """Item n is this process's part of batch n, as NumPy arrays."""

    def __init__(
        self, sequences: Sequences, batch: int, order: Order, places: np.ndarray, with_docs: bool
    ):
        """Stores what defines the batches.

        Args:
            batch: sequences in a batch, over all processes.
            order: returns the sequences at places of the site's endless list.
            places: indices in 0..batch-1 of those that this process reads, ascending.
            with_docs: whether document ids are read too.
        """
        self._sequences, self._batch, self._order = sequences, batch, order
        self._places, self._with_docs = places, with_docs
        self._block = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return sys.maxsize // self._batch // MAX_SITES  # endless, but Grain requires a length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        numbers = self._numbers(index * self._batch + self._places)
        return self._sequences.read(numbers, self._with_docs)

    def _numbers(self, places: np.ndarray) -> np.ndarray:
        """Returns the sequence at each place of the site's endless list, [N] int64."""
        numbers = np.empty_like(places)
        blocks = places // BLOCK
        for number in np.unique(blocks):
            # Grain's threads share this cache without a lock: number and block are replaced
            # together, as one tuple.
            cached_number, block = self._block
            if cached_number != number:
                block = self._order(number * BLOCK + np.arange(BLOCK))
                self._block = (number, block)
            inside = blocks == number
            numbers[inside] = block[places[inside] - number * BLOCK]
        return numbers


def epoch_order(sequences: int, seed: int, site: tuple[int, int] = (0, 1)) -> Order:
    """Returns the order of one corpus: the shuffled epochs, of which a site takes its entries."""
    index, sites = site
    return lambda places: shuffled_epochs(places * sites + index, sequences, seed)
