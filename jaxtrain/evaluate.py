"""Evaluates a run on its held-out text: nats per token, and bits per byte of text.

    jaxtrain evaluate --run=runs/quickstart
    jaxtrain evaluate --run=runs/quickstart --step=100
    jaxtrain evaluate --run=runs/quickstart --rows=4
    jaxtrain evaluate --run=runs/quickstart --tasks="arc=arc_easy.jsonl lambada=lambada.jsonl"
    jaxtrain evaluate --run=runs/quickstart --lm_eval=hellaswag,arc_easy

Restores the newest good checkpoint, or that of --step, and reads all held-out tokens. Set --rows
to read fewer sequences at once if memory runs out. Bits per byte need a known tokenizer. Tasks are
those of the run's eval.tasks, or of --tasks in the same form; all of their examples are scored.
--lm_eval runs EleutherAI's lm_eval on the run instead, without an export; it downloads the data of
its own tasks.
"""

import dataclasses
import json
import sys
from typing import Any

from absl import flags

from jaxtrain.config.command_line import CommandForm
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.data.sources import open_split
from jaxtrain.data.tasks.open_tasks import open_tasks
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.distributed.program import run_main
from jaxtrain.interop.lm_eval_model import run_lm_eval
from jaxtrain.interop.text_model import TextModel
from jaxtrain.reporting.terminal import eval_text, score_texts, set_up_logging
from jaxtrain.run_directory.contents import read_config_json
from jaxtrain.training.evaluation import Evaluator, warn_of_noise
from jaxtrain.training.run import Run, restore_run
from jaxtrain.training.step import TrainState


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
    if args.start_token is not None:
        chosen = dataclasses.replace(run.cfg.eval, start_token=args.start_token)
        run = run._replace(cfg=dataclasses.replace(run.cfg, eval=chosen))
    if args.lm_eval:
        return evaluate_by_lm_eval(run, state)
    cfg = run.cfg
    corpus = open_split(cfg.data, "val", cfg.model.V, cfg.workdir, cfg.steps)
    print(corpus.describe())
    scored = dataclasses.replace(cfg.eval, tasks=args.tasks or cfg.eval.tasks, examples=0)
    tasks = open_tasks(scored, cfg.data, corpus.tokenizer_name, cfg.model.V, cfg.workdir)
    evaluator = Evaluator(run, corpus, tasks)
    for line in evaluator.describe():
        print(line)
    watch = lambda batches: tqdm(batches, unit="batch", disable=None)
    metrics = evaluator.evaluate(state, watch=watch)
    assert metrics is not None  # None only after a signal; no signal is listened for
    if warning := warn_of_noise(metrics):
        print(warning, file=sys.stderr)
    print(f"step {int(state.step)}  {eval_text(metrics)}")
    for label, text in score_texts(metrics).items():
        print(f"{label:<6} {text}")
    print(json.dumps({"step": int(state.step)} | metrics))


def evaluate_by_lm_eval(run: Run, state: TrainState) -> None:
    """Runs the tasks of --lm_eval and prints lm_eval's table and results."""
    args, name = flags.FLAGS, read_config_json(flags.FLAGS.run)["data"].get("tokenizer")
    if not name:
        raise ValueError(
            f"--lm_eval needs the run's tokenizer; got --run={args.run}, whose shards do not name "
            "theirs. Run lm_eval on an export: jaxtrain export --tokenizer=NAME."
        )
    model = TextModel(run, state, build_tokenizer(name), run.cfg.eval.start_token)
    table, results = run_lm_eval(model, args.lm_eval.split(","), args.limit)
    print(f"step {int(state.step)}\n{table}")
    print(json.dumps({"step": int(state.step)} | results))


def define_flags() -> None:
    """Defines the flags of `jaxtrain evaluate`."""
    flags.DEFINE_string("run", None, "folder of the run", required=True)
    flags.DEFINE_integer("step", 0, "checkpoint to evaluate; 0 is the newest good one")
    flags.DEFINE_string("tasks", "", "as eval.tasks: NAME=PATH ...; default: the run's")
    text = "as eval.start_token, for --tasks and --lm_eval; default: the run's"
    flags.DEFINE_bool("start_token", None, text)
    flags.DEFINE_string("lm_eval", "", "tasks of lm_eval, or its YAML files, separated by commas")
    flags.DEFINE_integer("limit", 0, "examples of each task of --lm_eval; 0: all")
    flags.DEFINE_integer("rows", 0, "sequences that a device reads at once; 0: as in training")


def command(argv: list[str] | None = None, prog: str = "python -m jaxtrain.evaluate") -> None:
    """Runs the evaluate command with these arguments, by default those of the process."""
    run_main(main, (), CommandForm("evaluate", __doc__ or "", define_flags), argv, prog)


if __name__ == "__main__":
    command()
