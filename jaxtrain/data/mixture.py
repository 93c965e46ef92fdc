"""Which sequence of which source a mixture reads at each place of its endless list.

The list is cut into stages. In a stage whose weights have the common denominator P, a pattern of P
places repeats, in which each source has exactly its share of places:

- any window of P places inside a stage contains each source exactly weight x P times;
- the first n places of a stage contain it weight x n times, up to less than one.

So how often a source comes among the first n places is one multiplication and one look-up per
stage, and nothing has to be replayed when a run resumes. The k-th place of a source reads the k-th
sequence of that source's own shuffled epochs: the ones that a run on this source only would read.
Of S sites, each has the same list of sources; site j reads the sequences j, j + S, ... of a source,
so that no two sites read the same.

Source of the pattern: Tijdeman 1980, "The chairman assignment problem", Discrete Mathematics 32,
https://doi.org/10.1016/0012-365X(80)90269-1 (of the sources that are due, the one whose deadline is
next; no prefix deviates by more than 1 - 1/(2 sources - 2)).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxtrain.data.shuffle import shuffled_epochs


class StagePlan(NamedTuple):
    """A stage of a mixture, in places of its list."""

    start: int
    quotas: tuple[int, ...]  # places of each source in a period; the period is their sum


class Mixture:
    """The places of a mixture's list: their sources, and how often each source came before."""

    def __init__(self, stages: Sequence[StagePlan]):
        """Computes the pattern of each stage.

        Args:
            stages: by ascending start, the first at 0; all have quotas for the same sources.
        """
        self._starts = np.array([stage.start for stage in stages])
        self._patterns = [build_pattern(stage.quotas) for stage in stages]
        self._before = [
            _counts_before(pattern, len(stages[0].quotas)) for pattern in self._patterns
        ]
        counts = np.zeros((len(stages), len(stages[0].quotas)), np.int64)
        for i in range(1, len(stages)):
            counts[i] = counts[i - 1] + self._count(i - 1, stages[i].start - stages[i - 1].start)
        self._counts = counts  # [stages, sources]: of each source before a stage

    def _count(self, stage: int, places: int) -> np.ndarray:
        """Returns how often each source comes in the first places of a stage, [sources] int64."""
        before = self._before[stage]
        periods, rest = divmod(places, len(before) - 1)
        return periods * before[-1] + before[rest]

    def counts(self, places: int) -> np.ndarray:
        """Returns how often each source comes among the first places, [sources] int64."""
        stage = int(np.searchsorted(self._starts, places, side="right")) - 1
        return self._counts[stage] + self._count(stage, places - int(self._starts[stage]))

    def sources(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each place, and how often it came before, [N] int64 each."""
        places = np.asarray(places, np.int64)
        source, before = np.empty_like(places), np.empty_like(places)
        stages = np.searchsorted(self._starts, places, side="right") - 1
        for stage in np.unique(stages):
            inside = stages == stage
            pattern, counts = self._patterns[stage], self._before[stage]
            periods, rest = np.divmod(places[inside] - self._starts[stage], len(pattern))
            chosen = source[inside] = pattern[rest]
            in_stage = periods * counts[-1, chosen] + counts[rest, chosen]
            before[inside] = self._counts[stage, chosen] + in_stage
        return source, before


class MixedOrder:
    """The number of the sequence at each place, where the sources' sequences are numbered on."""

    def __init__(
        self, mixture: Mixture, sizes: Sequence[int], seed: int, site: tuple[int, int] = (0, 1)
    ):
        """Stores what defines the order.

        Args:
            sizes: sequences of each source.
            site: index of this site, and number of sites.
        """
        self._mixture, self._sizes, self._seed, self._site = mixture, sizes, seed, site
        self._firsts = np.cumsum([0, *sizes])

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Returns the numbers of the sequences at these places, [N] int64."""
        source, before = self._mixture.sources(places)
        site, sites = self._site
        numbers = np.empty_like(source)
        for i in np.unique(source):
            inside = source == i
            positions = before[inside] * sites + site
            own = shuffled_epochs(positions, self._sizes[i], self._seed)
            numbers[inside] = self._firsts[i] + own
        return numbers


def build_pattern(quotas: Sequence[int]) -> np.ndarray:
    """Returns the source at each place of a period of sum(quotas) places, [P] int64.

    Raises:
        ValueError: a quota is negative, or all are 0.
    """
    if min(quotas) < 0 or not sum(quotas):
        raise ValueError(f"quotas must not be negative and not all 0; got {tuple(quotas)}.")
    period = sum(quotas)
    used = [i for i, quota in enumerate(quotas) if quota]
    twice = max(2 * len(used) - 2, 1)  # 1 - 1/twice is the largest deviation
    taken = dict.fromkeys(used, 0)
    pattern = []
    for place in range(1, period + 1):
        # In whole numbers, so that the pattern is the same on every machine.
        due = [i for i in used if twice * (quotas[i] * place - period * taken[i]) >= period]
        first = due[0]
        for i in due[1:]:  # deadline of i: (twice - 1 + twice * taken) * period / twice / quota
            own, best = twice - 1 + twice * taken[i], twice - 1 + twice * taken[first]
            if own * quotas[first] < best * quotas[i]:
                first = i
        taken[first] += 1
        pattern.append(first)
    return np.array(pattern, np.int64)


def _counts_before(pattern: np.ndarray, sources: int) -> np.ndarray:
    """Returns how often each source comes before each place and in all, [P + 1, sources] int64."""
    is_source = pattern[:, None] == np.arange(sources)
    return np.concatenate([np.zeros((1, sources), np.int64), np.cumsum(is_source, axis=0)])
