"""Suite loader: tokens/s from a token shard to arrays on the device, and the first batch's time.

Beside it stands the least that such a reader can do: NumPy crops of the same file at random.
"""

import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jaxtrain.benchmarks.timing import interleave, summarise, verdict, warm_up
from jaxtrain.config.train_config import DataConfig, MeshConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.data.shard_writer import ShardWriter
from jaxtrain.distributed.mesh import build_mesh
from jaxtrain.reporting.table import format_table

TOKENS, V = 100_000_000, 50_304
BATCH, T = 64, 1_024
BATCHES = 100  # a turn
LEAST_TOKENS_PER_S, FIRST_BATCH_S = 20e6, 1.0
CHUNK = 1 << 22


def write_shard(folder: Path, tokens: int) -> None:
    """Random uint16 tokens in one llm.c shard."""
    writer = ShardWriter(folder, "bench", "train", "<u2", tokens)
    rng = np.random.default_rng(0)
    for start in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - start)
        writer.append(rng.integers(0, V, count, np.uint16), [(count, count)])
    writer.close()


def _deliver(batches):
    def turn(_):
        for _ in range(BATCHES):
            batch = next(batches)
        jax.block_until_ready(batch)

    return turn


def _crops(corpus):
    """The floor: windows at random places of the mapped file, widened to int32."""
    rng, last = np.random.default_rng(0), corpus.tokens - T - 1

    def turn(_):
        for _ in range(BATCHES):
            starts = rng.integers(0, last, BATCH)
            np.stack([corpus.read(0, s, s + T + 1) for s in starts]).astype(np.int32)

    return turn


def run(rounds: int, tokens: int = TOKENS) -> list[dict]:
    """Rows of prefetch 2 (the default), prefetch 0 and plain crops, in turns."""
    jax.block_until_ready(jax.device_put(np.zeros(1)))  # the backend's start is not the loader's
    mesh = build_mesh(MeshConfig(), jax.devices("cpu")[:1])
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder), tokens)
        start_s = time.perf_counter()
        cfg = DataConfig(shards=folder, batch=BATCH, seq_len=T)
        corpus = open_corpus(cfg, "train", V, folder)
        opened_s = time.perf_counter() - start_s
        ahead = build_batches(cfg, corpus, mesh, 0)
        jax.block_until_ready(next(ahead))
        first_s = time.perf_counter() - start_s
        in_loop = build_batches(DataConfig(**vars(cfg) | {"prefetch": 0}), corpus, mesh, 0)
        with ahead, in_loop:
            variants = {
                f"prefetch={cfg.prefetch}": _deliver(ahead),
                "prefetch=0": _deliver(in_loop),
                "numpy crops": _crops(corpus),
            }
            warm_up(variants, most_s=60.0)
            samples = interleave(variants, rounds)
    case = f"{tokens / 1e6:g}M tokens, B={BATCH} T={T}"
    rows = [
        {"suite": "loader", "case": case, "variant": v} | summarise(s) for v, s in samples.items()
    ]
    for row in rows:
        row["tokens_per_s"] = BATCHES * BATCH * T / row["wall_s"]
    first = {"suite": "loader", "case": case, "first_batch_s": first_s, "open_corpus_s": opened_s}
    return [*rows, first]


def show(rows) -> str:
    *rows, first = rows
    table = format_table(
        rows,
        {
            "case": lambda r: r["case"],
            "variant": lambda r: r["variant"],
            "target": lambda r: (
                verdict(r["tokens_per_s"] / 1e6, LEAST_TOKENS_PER_S / 1e6)
                if r["variant"].startswith("prefetch")
                else ""
            ),
            "M tokens/s": lambda r: f"{r['tokens_per_s'] / 1e6:.1f}",
            "ms a batch": lambda r: f"{1e3 * r['wall_s'] / BATCHES:.3f}",
            "cpu ms": lambda r: f"{1e3 * r['cpu_s'] / BATCHES:.3f}",
            "others": lambda r: f"{r['others']:.0%}",
            "n": lambda r: str(r["samples"]),
        },
    )
    return (
        f"{table}\n\nfirst batch {first['first_batch_s']:.2f} s after imports, "
        f"{first['open_corpus_s']:.2f} s of it checking the shard (just written, so in memory): "
        f"{verdict(first['first_batch_s'], FIRST_BATCH_S, at_most=True)}"
    )
