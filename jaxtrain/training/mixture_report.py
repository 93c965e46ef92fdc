"""Describes a mixture: its stages at the start of a run, and what is read of each source."""

from collections.abc import Iterator

from jaxtrain.data.loader import Batches
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
    steps = [*corpus.start_steps, corpus.steps]
    for i, stage in enumerate(corpus.stages):
        weights = ", ".join(f"{name} {float(weight):g}" for name, weight in stage.weights.items())
        yield (
            f"stage {i + 1}",
            f"steps {steps[i] + 1:,} to {max(steps[i], steps[i + 1]):,}: {weights}; exact in any "
            f"{sum(stage.quotas.values()):,} sequences in a row",
        )
    for line in source_table(batches.sources.planned()).split("\n"):
        yield "planned", line


def source_table(rows: dict[str, dict[str, int | float]]) -> str:
    """Returns a table of what is read of each source, from SourceCounts."""
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
