"""Evaluates a run on its held-out text: nats per token, and bits per byte of text.

    jaxtrain evaluate --run=runs/quickstart
    jaxtrain evaluate --run=runs/quickstart --step=100
    jaxtrain evaluate --run=runs/quickstart --rows=4

Restores the newest good checkpoint, or that of --step, and reads all held-out tokens. Set --rows
to read fewer sequences at once if memory runs out. Bits per byte need a known tokenizer.
"""

import dataclasses
import json
import sys
from typing import Any

from absl import flags

from jaxtrain.config.command_line import CommandForm
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.data.sources import open_split
from jaxtrain.distributed.program import run_main
from jaxtrain.reporting.terminal import eval_text, set_up_logging
from jaxtrain.run_directory.contents import read_config_json
from jaxtrain.training.evaluation import (
    build_byte_counter,
    build_eval_step,
    evaluate_sources,
    warn_of_noise,
)
from jaxtrain.training.run import restore_run


def rows_in_training(stored: dict[str, Any]) -> int:
    """Returns how many sequences a device processed at once in training, from config.json."""
    cfg, mesh = stored["config"], stored["config"]["mesh"]
    if mesh["tensor"] > 0:
        split = stored["devices"] // mesh["tensor"]
    else:  # tensor=-1: replica and fsdp were set, and tensor took the remaining devices
        split = mesh["replica"] * mesh["fsdp"]
    return cfg["data"]["batch"] // cfg["accumulation"] // split


def fit_accumulation(cfg: TrainConfig, devices: int, rows: int) -> TrainConfig:
    """Returns the config with the fewest microbatches of at most `rows` sequences per device.

    Raises:
        ValueError: rows is below 1.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1; got {rows}. Set --rows.")
    per_device = cfg.data.batch // devices  # restore_run chose devices that divide the batch
    counts = [n for n in range(1, per_device + 1) if per_device % n == 0]
    return dataclasses.replace(cfg, accumulation=next(n for n in counts if per_device // n <= rows))


def main() -> None:
    """Evaluates the run that --run names and prints its metrics, as text and as JSON."""
    from tqdm import tqdm

    args = flags.FLAGS
    set_up_logging()
    run, state = restore_run(args.run, args.step or None)
    rows = args.rows or rows_in_training(read_config_json(args.run))
    run = run._replace(cfg=fit_accumulation(run.cfg, run.mesh.size, rows))
    cfg = run.cfg
    corpus = open_split(cfg.data, "val", cfg.model.V, cfg.workdir, cfg.steps)
    print(corpus.describe())
    watch = lambda batches: tqdm(batches, total=len(batches), unit="batch", disable=None)
    count_bytes = build_byte_counter(corpus, run.mesh)
    metrics = evaluate_sources(run, state, corpus, build_eval_step(run), count_bytes, watch=watch)
    assert metrics is not None  # None only after a signal; no signal is listened for
    if warning := warn_of_noise(metrics):
        print(warning, file=sys.stderr)
    print(f"step {int(state.step)}  {eval_text(metrics)}")
    print(json.dumps({"step": int(state.step)} | metrics))


def define_flags() -> None:
    """Defines the flags of `jaxtrain evaluate`."""
    flags.DEFINE_string("run", None, "folder of the run", required=True)
    flags.DEFINE_integer("step", 0, "checkpoint to evaluate; 0 is the newest good one")
    flags.DEFINE_integer("rows", 0, "sequences that a device reads at once; 0: as in training")


def command(argv: list[str] | None = None, prog: str = "python -m jaxtrain.evaluate") -> None:
    """Runs the evaluate command with these arguments, by default those of the process."""
    run_main(main, (), CommandForm("evaluate", __doc__ or "", define_flags), argv, prog)


if __name__ == "__main__":
    command()
