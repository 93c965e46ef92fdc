"""Suite loader: the loader's tokens/s, from a shard to the device, and the first batch's time.

For comparison it times a minimal reader, which copies windows at random places of the same file.
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.benchmarks.timing import interleave, summarise, target_verdict, warm_up
from jaxtrain.config.train_config import DataConfig, MeshConfig
from jaxtrain.data.corpus import Corpus, open_corpus
from jaxtrain.data.loader import Batches, build_batches
from jaxtrain.data.shard_writer import ShardWriter
from jaxtrain.distributed.mesh import build_mesh
from jaxtrain.reporting.table import format_table

TOKENS, V = 100_000_000, 50_304
BATCH, T = 64, 1_024
BATCHES = 100  # per turn
LEAST_TOKENS_PER_S, FIRST_BATCH_S = 20e6, 1.0
CHUNK = 1 << 22


def write_shard(folder: Path, tokens: int) -> None:
    """Writes random uint16 tokens as one llm.c shard."""
    writer = ShardWriter(folder, "bench", "train", "<u2", tokens)
    rng = np.random.default_rng(0)
    for start in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - start)
        writer.append(rng.integers(0, V, count, np.uint16), [(count, count)])
    writer.close()


def _load_batches(batches: Batches) -> None:
    """Takes BATCHES batches from the loader."""
    batch = None
    for _ in range(BATCHES):
        batch = next(batches)
    jax.block_until_ready(batch)


def _crop_file(corpus: Corpus, seed: int) -> None:
    """Copies BATCHES batches from random places of the mapped file, as int32."""
    rng = np.random.default_rng(seed)
    for _ in range(BATCHES):
        starts = rng.integers(0, corpus.tokens - T - 1, BATCH)
        np.stack([corpus.read(0, s, s + T + 1) for s in starts]).astype(np.int32)


def measure(rounds: int, tokens: int = TOKENS) -> list[dict[str, Any]]:
    """Returns rows for prefetch 2 (the default), prefetch 0, plain crops and the first batch."""
    jax.block_until_ready(jax.device_put(np.zeros(1)))  # so that starting the backend is not timed
    mesh = build_mesh(MeshConfig(), jax.devices("cpu")[:1])
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder), tokens)
        start_s = time.perf_counter()
        cfg = DataConfig(shards=folder, batch=BATCH, seq_len=T)
        corpus = open_corpus(cfg, "train", V, folder)
        opened_s = time.perf_counter() - start_s
        prefetching = build_batches(cfg, corpus, mesh, 0)
        jax.block_until_ready(next(prefetching))
        first_s = time.perf_counter() - start_s
        in_loop = build_batches(dataclasses.replace(cfg, prefetch=0), corpus, mesh, 0)
        with prefetching, in_loop:
            variants = {
                f"prefetch={cfg.prefetch}": lambda turn: _load_batches(prefetching),
                "prefetch=0": lambda turn: _load_batches(in_loop),
                "numpy crops": lambda turn: _crop_file(corpus, turn),
            }
            warm_up(variants, most_s=60.0)
            samples = interleave(variants, rounds)
    case = f"{tokens / 1e6:g}M tokens, B={BATCH} T={T}"
    rows = []
    for variant, taken in samples.items():
        row = {"suite": "loader", "case": case, "variant": variant} | summarise(taken)
        rows.append(row | {"tokens_per_s": BATCHES * BATCH * T / row["wall_s"]})
    first = {"suite": "loader", "case": case, "first_batch_s": first_s, "open_corpus_s": opened_s}
    return [*rows, first]


def tables(rows: Sequence[dict[str, Any]]) -> str:
    *rows, first = rows
    table = format_table(
        rows,
        {
            "case": lambda r: r["case"],
            "variant": lambda r: r["variant"],
            "target": lambda r: (
                target_verdict(r["tokens_per_s"] / 1e6, LEAST_TOKENS_PER_S / 1e6)
                if r["variant"].startswith("prefetch")
                else ""
            ),
            "M tokens/s": lambda r: f"{r['tokens_per_s'] / 1e6:.1f}",
            "ms a batch": lambda r: f"{1e3 * r['wall_s'] / BATCHES:.3f}",
            "cpu ms": lambda r: f"{1e3 * r['cpu_s'] / BATCHES:.3f}",
            "others": lambda r: f"{r['others']:.0%}",
            "n": lambda r: r["samples"],
        },
    )
    return (
        f"{table}\n\nfirst batch {first['first_batch_s']:.2f} s after imports, "
        f"{first['open_corpus_s']:.2f} s of it checking the shard (in memory, just written): "
        f"{target_verdict(first['first_batch_s'], FIRST_BATCH_S, at_most=True)}"
    )
