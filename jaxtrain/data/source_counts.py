"""Counts what a mixture reads of each source: planned before the run, and read by some step."""

from collections.abc import Callable

from jaxtrain.data.sources import MixedCorpus


class SourceCounts:
    """Exact counts of a mixture's sources. A sequence counts as seq_len tokens, packed or not."""

    def __init__(
        self,
        corpus: MixedCorpus,
        sizes: list[int],
        places_before: Callable[[int], int],
        seq_len: int,
        sites: int = 1,
    ):
        """Stores the sizes.

        Args:
            sizes: sequences of each source.
            places_before: returns the sequences that the first n batches read.
            sites: number of sites that read the sources together, each as much as this one.
        """
        self._corpus, self._places_before = corpus, places_before
        self._seq_len, self._sites = seq_len, sites
        self.sizes = dict(zip(corpus.sources, sizes, strict=True))

    def planned(self) -> dict[str, dict[str, int | float]]:
        """Returns what the whole run reads of each source, as read_by does."""
        return self._figures(self._corpus.places)

    def read_by(self, batches: int) -> dict[str, dict[str, int | float]]:
        """Returns what the first `batches` batches read of each source.

        "tokens" are those of this site; "epochs" and "unread_tokens", which no epoch has read yet,
        are those of all sites together. "stored_tokens" is the size of the source.
        """
        return self._figures(self._places_before(batches))

    def _figures(self, places: int) -> dict[str, dict[str, int | float]]:
        counts = self._corpus.mixture.counts(places).tolist()
        figures = {}
        for (name, size), count in zip(self.sizes.items(), counts, strict=True):
            read = count * self._sites
            figures[name] = {
                "tokens": count * self._seq_len,
                "epochs": read / size,
                "unread_tokens": max(0, size - read) * self._seq_len,
                "stored_tokens": size * self._seq_len,
            }
        return figures

    def metrics(self, batches: int) -> dict[str, int | float]:
        """Returns `data/SOURCE_tokens` and `data/SOURCE_epochs` after `batches` batches."""
        return {
            f"data/{name}_{figure}": figures[figure]
            for name, figures in self.read_by(batches).items()
            for figure in ("tokens", "epochs")
        }

    def check_limits(self) -> None:
        """Raises ValueError if the run would read a source more often than data.max_epochs."""
        faults = []
        for name, figures in self.planned().items():
            limit = self._corpus.limits.get(name)
            needed, stored = figures["tokens"] * self._sites, figures["stored_tokens"]
            if limit is not None and needed > limit * stored:
                faults.append(
                    f"{needed:,} tokens of {name} in {self._corpus.steps:,} steps, which is "
                    f"{figures['epochs']:.3g} epochs of its {stored:,} tokens, with a limit of "
                    f"{float(limit):g}"
                )
        if faults:
            raise ValueError(
                f"no source may be read more often than data.max_epochs allows; got "
                f"{'; '.join(faults)}. Set --data.max_epochs, --data.stages or --steps."
            )
