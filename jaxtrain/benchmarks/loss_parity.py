"""Suite judge: the loss says whether speed was bought with correctness.

Ours and the compiled PyTorch twin train gpt_124m on the same real text, from the same weights and
batches, once for each seed. The verdict compares the mean of the last tenth of the steps: our gap
to the twin, averaged over seeds, must be within what another seed changes, the standard deviation
of the twin's own losses.
"""

import statistics
import tempfile
import time
from pathlib import Path

from jaxtrain.benchmarks.child import BenchJob, run_child
from jaxtrain.benchmarks.gpu_training import CHILD, ENV, need_gpu

SIZE, STEPS, BATCH, ROWS, SEEDS = "gpt_124m", 300, 64, 16, (0, 1, 2)
TINY = dict(tiny=True, optimizer="adamw", steps=20, batch=4, rows=2, seeds=(0, 1))


def last_tenth(nats) -> float:
    return statistics.fmean(nats[-max(len(nats) // 10, 1) :])


def compare(ours: dict, theirs: dict) -> list[dict]:
    """A row for each seed and one with the verdict, of {seed: losses} of both."""
    rows = []
    for seed, nats in ours.items():
        first, second = last_tenth(nats), last_tenth(theirs[seed])
        row = {"suite": "judge", "case": f"seed {seed}", "jaxtrain_nats": first}
        row |= {"pytorch_nats": second, "gap_nats": first - second}
        rows.append(row | {"jaxtrain": nats, "pytorch": theirs[seed]})
    gap = statistics.fmean(row["gap_nats"] for row in rows)
    noise = statistics.stdev(row["pytorch_nats"] for row in rows)
    verdict = {"suite": "judge", "case": "verdict", "gap_nats": gap, "seed_noise_nats": noise}
    return [*rows, verdict | {"within_noise": abs(gap) <= noise}]


def data_of(args) -> dict:
    """DataConfig's fields of --text or --shards; without, Python's own standard library."""
    if args.shards:
        return {"shards": args.shards}
    return {"text": args.text or "", "tokenizer": "bytes" if args.tiny else "gpt2"}


def run(args):
    """Yields the suite's rows.

    Raises:
        NoGpu: there is none, and --tiny was not given.
    """
    need_gpu(args.tiny)
    until = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        plain = dict(optimizer="muon", steps=STEPS, batch=BATCH, rows=ROWS, seeds=SEEDS)
        given = dict(data=data_of(args), folder=folder)
        found, shards = {}, ()
        for variant, module in CHILD.items():
            job = BenchJob("losses", SIZE, **(TINY if args.tiny else plain), **given, shards=shards)
            left_s = max(until - time.monotonic(), 1.0)
            child = run_child(module, job, Path(folder), left_s, ENV)
            if "losses" not in child:
                reason = child.get("error") or child["oom"]
                yield {"suite": "judge", "case": variant, "error": reason}
                return
            found[variant], shards = child["losses"], tuple(child.get("shards", ()))
    yield from compare(found["jaxtrain"], found["pytorch"])


def line(row) -> str:
    """A row as one line of text."""
    if "error" in row:
        return f"{row['case']:9} {row['error']}"
    if row["case"] == "verdict":
        word = "within" if row["within_noise"] else "OUTSIDE"
        return (
            f"verdict   mean gap {row['gap_nats']:+.4f} nats, {word} the seeds' own "
            f"{row['seed_noise_nats']:.4f}"
        )
    return (
        f"{row['case']:9} jaxtrain {row['jaxtrain_nats']:.4f} nats, pytorch "
        f"{row['pytorch_nats']:.4f}, gap {row['gap_nats']:+.4f}"
    )
