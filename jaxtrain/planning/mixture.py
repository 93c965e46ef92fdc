"""Predicts what a run reads of each source of its mixture, without reading any tokens."""

from typing import Any

from jaxtrain.config.mixture_fields import parse_sources
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.data.shard_files import are_shards, find_shards
from jaxtrain.data.shards import probe
from jaxtrain.data.sources import planned_sequences
from jaxtrain.reporting.table import format_table


def plan_mixture(cfg: TrainConfig) -> dict[str, dict[str, Any]]:
    """Returns "tokens", "share", "stored_tokens" and "epochs" of each source of data.mixture.

    The size of a source is that in its shards' headers; it and the epochs are None for text that is
    not encoded yet, and for shards that are not on this machine. The start of the run counts whole
    sequences, and documents if they are packed. {} without a mixture.
    """
    if not cfg.data.mixture:
        return {}
    counts, paths = planned_sequences(cfg.data, cfg.steps), parse_sources(cfg.data.mixture)
    rows = {}
    for name, count in counts.items():
        tokens, stored = count * cfg.data.seq_len, _stored_tokens(cfg, paths[name])
        rows[name] = {
            "tokens": tokens,
            "share": count / sum(counts.values()),
            "stored_tokens": stored,
            "epochs": tokens / stored if stored else None,
        }
    return rows


def _stored_tokens(cfg: TrainConfig, path: str) -> int | None:
    if not are_shards(path):
        return None
    try:
        shards = find_shards(path, "train")
        files = (path for path in shards if path.suffix == ".bin")
        return sum(probe(path, cfg.data.shard_format).tokens for path in files)
    except (ValueError, OSError):  # the start of the run will say what is wrong
        return None


def mixture_text(rows: dict[str, dict[str, Any]], steps: int) -> str:
    """Returns a table of plan_mixture's figures; "" without a mixture."""
    if not rows:
        return ""
    optional = lambda x, form: "-" if x is None else format(x, form)
    columns = {
        "source": lambda name: name,
        "tokens": lambda name: f"{rows[name]['tokens']:,}",
        "share": lambda name: f"{rows[name]['share']:.2%}",
        "epochs": lambda name: optional(rows[name]["epochs"], ".3f"),
        "stored": lambda name: optional(rows[name]["stored_tokens"], ","),
    }
    note = ""
    if any(row["stored_tokens"] is None for row in rows.values()):
        note = "\n  -: no token shards on this machine; jaxtrain encode writes them"
    return f"Mixture, read in {steps:,} steps:\n{format_table(rows, columns, indent=2)}{note}"
