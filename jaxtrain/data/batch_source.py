"""Grain's data source: the part of batch n that one process reads, for any n."""

import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxtrain.config.batch_schedule import BatchSchedule
from jaxtrain.data.sequences import Sequences
from jaxtrain.data.shuffle import shuffled_epochs

BLOCK = 4096  # indices shuffled per call: an index costs 40 us in calls of 8, 0.3 us in a block
MAX_SITES = 1_024  # bounds the positions of shuffled_epochs below 2^63
Order = Callable[[np.ndarray], np.ndarray]


class Origin(NamedTuple):
    """Where reading of some data began, in a branch that began after step 0."""

    step: int = 0  # of the run, whose batch is number 0
    place: int = 0  # of the endless list, at which batch 0 begins


class BatchSource:
    """Item n is this process's part of batch n, as NumPy arrays."""

    def __init__(
        self,
        sequences: Sequences,
        sizes: BatchSchedule,
        order: Order,
        places: Mapping[int, np.ndarray],
        with_docs: bool,
    ):
        """Stores what defines the batches.

        Args:
            sizes: sequences in a batch, over all processes, by the step of the run.
            order: returns the sequences at places of the site's endless list.
            places: by size of a batch, the indices of those that this process reads, ascending.
            with_docs: whether document ids are read too.
        """
        self._sequences, self._sizes, self._order = sequences, sizes, order
        self._places, self._with_docs = places, with_docs
        self.origin = Origin()
        self._block = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        # Endless, but Grain requires a length.
        return sys.maxsize // self._sizes.largest // MAX_SITES

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        places = self.places_before(index) + self._places[self.size(index)]
        return self._sequences.read(self._numbers(places), self._with_docs)

    def size(self, index: int) -> int:
        """Returns the number of sequences of a batch, over all processes."""
        return self._sizes.sequences(self.origin.step + index)

    def places_before(self, index: int) -> int:
        """Returns the place of the endless list at which a batch begins."""
        return count_places(self._sizes, self.origin, index)

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


def count_places(sizes: BatchSchedule, origin: Origin, batches: int) -> int:
    """Returns how many places of the endless list the first `batches` batches cover."""
    before = sizes.sequences_before
    return origin.place + before(origin.step + batches) - before(origin.step)


def epoch_order(sequences: int, seed: int, site: tuple[int, int] = (0, 1)) -> Order:
    """Returns the order of one corpus: the shuffled epochs, of which a site takes its entries."""
    index, sites = site
    return lambda places: shuffled_epochs(places * sites + index, sequences, seed)
