"""Held-out loss: nats per token and, where the text's bytes are known, bits per byte.

    jaxtrain evaluate --run=runs/quickstart
    jaxtrain evaluate --run=runs/quickstart --step=100
    jaxtrain evaluate --run=runs/quickstart --rows=4

Restores the newest good checkpoint of a run, or that of --step, and reads all of its validation
shard. --rows takes fewer sequences at once, where memory is short.
"""

import dataclasses
import json
import sys

from absl import flags

from jaxtrain.config.command_line import CommandForm
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_eval_batches
from jaxtrain.distributed.program import run_main
from jaxtrain.reporting.terminal import eval_text
from jaxtrain.run_directory.contents import read_config_json
from jaxtrain.training.evaluation import (
    build_byte_counter,
    build_eval_step,
    evaluate,
    warn_of_noise,
)
from jaxtrain.training.run import restore_run


def rows_in_training(stored: dict) -> int:
    """Sequences that a device held at once, of a run's config.json."""
    cfg, mesh = stored["config"], stored["config"]["mesh"]
    if mesh["tensor"] > 0:
        split = stored["devices"] // mesh["tensor"]
    else:  # it was the rest of the devices
        split = mesh["replica"] * mesh["fsdp"]
    return cfg["data"]["batch"] // cfg["accumulation"] // split


def fit_parts(cfg, devices: int, rows: int):
    """The TrainConfig in the fewest microbatches of at most `rows` sequences a device.

    Raises:
        ValueError: rows is below 1.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1; got {rows}. Set --rows.")
    each = cfg.data.batch // devices  # restore_run has taken devices that divide it
    parts = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= rows)
    return dataclasses.replace(cfg, accumulation=parts)


def main() -> None:
    from tqdm import tqdm

    args = flags.FLAGS
    run, state = restore_run(args.run, args.step or None)
    rows = args.rows or rows_in_training(read_config_json(args.run))
    run = run._replace(cfg=fit_parts(run.cfg, run.mesh.size, rows))
    corpus = open_corpus(run.cfg.data, "val", run.cfg.model.V, run.cfg.workdir)
    print(corpus.describe())
    batches = build_eval_batches(run.cfg.data, corpus, run.mesh)
    progress = tqdm(batches, total=len(batches), unit="batch", disable=None)
    count_bytes = build_byte_counter(corpus, run.mesh)
    metrics = evaluate(build_eval_step(run), state, progress, count_bytes)
    if warning := warn_of_noise(metrics):
        print(warning, file=sys.stderr)
    print(f"step {int(state.step)}  {eval_text(metrics)}")
    print(json.dumps({"step": int(state.step)} | metrics))


def define_flags() -> None:
    flags.DEFINE_string("run", None, "folder of the run", required=True)
    flags.DEFINE_integer("step", 0, "checkpoint to evaluate; 0 is the newest good one")
    flags.DEFINE_integer("rows", 0, "sequences a device reads at once; 0 is training's")


def command(argv=None, prog="python -m jaxtrain.evaluate") -> None:
    run_main(main, (), CommandForm("evaluate", __doc__, define_flags), argv, prog)


if __name__ == "__main__":
    command()
