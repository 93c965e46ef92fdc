"""Describes a mixture: its stages at the start of a run, and what is read of each source."""

from collections.abc import Iterator

from jaxtrain.data.loader import Batches
from jaxtrain.data.source_counts import SourceCounts
from jaxtrain.data.sources import AnyCorpus, MixedCorpus
from jaxtrain.reporting.table import format_table


def mixture_lines(corpus: AnyCorpus, batches: Batches) -> Iterator[tuple[str, str]]:
    """Yields a mixture's sources, stages and planned counts, as (name, value) pairs.

    Yields nothing without a mixture.
    """
    if not (isinstance(corpus, MixedCorpus) and batches.sources):
        return
    for name, part in corpus.sources.items():
        yield name, part.describe()
    steps = [*(start // batches.sources.batch for start in corpus.starts), batches.sources.steps]
    for i, stage in enumerate(corpus.stages):
        weights = ", ".join(f"{name} {float(weight):g}" for name, weight in stage.weights.items())
        yield (
            f"stage {i + 1}",
            f"steps {steps[i] + 1:,} to {max(steps[i], steps[i + 1]):,}: {weights}; exact in any "
            f"{sum(stage.quotas.values()):,} sequences in a row",
        )
    for line in source_table(batches.sources, batches.sources.steps).split("\n"):
        yield "planned", line


def source_table(sources: SourceCounts, step: int) -> str:
    """Returns a table of what the steps up to `step` read of each source."""
    rows = sources.read_by(step)
    total = sum(figures["tokens"] for figures in rows.values())
    columns = {
        "source": lambda name: name,
        "tokens": lambda name: f"{rows[name]['tokens']:,}",
        "share": lambda name: f"{rows[name]['tokens'] / max(total, 1):.2%}",
        "epochs": lambda name: f"{rows[name]['epochs']:.3f}",
        "stored": lambda name: f"{rows[name]['stored_tokens']:,}",
        "unread": lambda name: f"{rows[name]['unread_tokens']:,}",
    }
    return format_table(rows, columns)
