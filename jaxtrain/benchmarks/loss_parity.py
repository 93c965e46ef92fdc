"""Suite judge: checks on real text that our training reaches the same loss as PyTorch's.

jaxtrain and compiled PyTorch train gpt_124m from the same weights and on the same batches, once for
each seed. A run's final loss is the mean over its last tenth of steps. The suite passes if the mean
difference between the frameworks' final losses is at most the standard deviation of PyTorch's over
the seeds.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.benchmarks.child import BenchJob, run_child
from jaxtrain.benchmarks.gpu_training import CHILD_ENV, CHILD_MODULES, check_gpu

SIZE = "gpt_124m"
JOB = BenchJob("losses", SIZE, "muon", batch=64, rows=16, steps=300, seeds=(0, 1, 2))
TINY_JOB = BenchJob("losses", SIZE, "adamw", batch=4, rows=2, steps=10, seeds=(0, 1), tiny=True)


def mean_of_last_tenth(nats: Sequence[float]) -> float:
    return statistics.fmean(nats[-max(len(nats) // 10, 1) :])


def compare_losses(
    ours: dict[str, list[float]], theirs: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Returns a row for each seed, and one with the verdict, from {seed: losses} of both sides."""
    rows = []
    for seed, nats in ours.items():
        row: dict[str, Any] = {"suite": "judge", "case": f"seed {seed}"}
        row["jaxtrain_nats"] = mean_of_last_tenth(nats)
        row["pytorch_nats"] = mean_of_last_tenth(theirs[seed])
        row["gap_nats"] = row["jaxtrain_nats"] - row["pytorch_nats"]
        rows.append(row | {"jaxtrain": nats, "pytorch": theirs[seed]})
    gap = statistics.fmean(row["gap_nats"] for row in rows)
    noise = statistics.stdev(row["pytorch_nats"] for row in rows)
    verdict = {"suite": "judge", "case": "verdict", "gap_nats": gap, "seed_noise_nats": noise}
    return [*rows, verdict | {"within_noise": abs(gap) <= noise}]


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the suite's rows.

    Raises:
        NoGpu: there is no GPU and --tiny was not given.
    """
    check_gpu(args.tiny)
    deadline_s = time.monotonic() + 60 * args.minutes
    data = {"text": args.text or "", "tokenizer": "bytes" if args.tiny else "gpt2"}
    data = {"shards": args.shards} if args.shards else data
    losses, shards = {}, ()
    with tempfile.TemporaryDirectory() as folder:
        job = dataclasses.replace(TINY_JOB if args.tiny else JOB, data=data, folder=folder)
        for variant, module in CHILD_MODULES.items():
            job = dataclasses.replace(job, shards=shards)
            left_s = max(deadline_s - time.monotonic(), 1.0)
            result = run_child(module, job, Path(folder), left_s, CHILD_ENV)
            if "losses" not in result:
                reason = result.get("error") or result["oom"]
                yield {"suite": "judge", "case": variant, "error": reason}
                return
            losses[variant], shards = result["losses"], tuple(result.get("shards", ()))
    yield from compare_losses(losses["jaxtrain"], losses["pytorch"])


def describe(row: dict[str, Any]) -> str:
    """Returns a row as one line of text."""
    if "error" in row:
        return f"{row['case']:9} {row['error']}"
    if row["case"] == "verdict":
        position = "within" if row["within_noise"] else "OUTSIDE"
        return (
            f"verdict   mean difference {row['gap_nats']:+.4f} nats, {position} the spread over "
            f"seeds of {row['seed_noise_nats']:.4f}"
        )
    return (
        f"{row['case']:9} jaxtrain {row['jaxtrain_nats']:.4f} nats, pytorch "
        f"{row['pytorch_nats']:.4f}, difference {row['gap_nats']:+.4f}"
    )
