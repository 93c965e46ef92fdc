"""Averages the weights of several checkpoints of a run, and evaluates the average.

    jaxtrain merge runs/trunk --steps=200,300,400 --to=runs/merged
    jaxtrain merge runs/trunk --steps=200,300,400 --weights=wsm --to=runs/merged
    jaxtrain evaluate --run=runs/merged

Prints the held-out loss of the average beside that of the newest of these checkpoints, on the same
tokens, and the scores of both on the run's eval.tasks or on --tasks. What is averaged are the
weights that evaluation uses, never look-ahead points of an accelerated optimizer. The result is the
folder of a run, which `jaxtrain evaluate`, `jaxtrain generate`, `jaxtrain export` and --weights of
`jaxtrain train` can read. --weights=wsm emulates a decay of the learning rate over these steps,
which --decay names; uniform and linear (1, 2, 3, ...) ignore the steps. The run must have kept the
checkpoints: train it with --keep_every.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from jaxtrain.branching.kept import CHECKPOINTS, read_kept_record
from jaxtrain.branching.weights import DECAYS, SCHEMES, merge_weights
from jaxtrain.checkpoint.links import link_tree
from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.config import train_config as config_lib
from jaxtrain.config.command_line import CommandForm
from jaxtrain.config.shell_commands import shell_command
from jaxtrain.data.sources import open_split
from jaxtrain.data.tasks.open_tasks import open_tasks
from jaxtrain.distributed.program import run_main
from jaxtrain.files import atomic_path, strict_json
from jaxtrain.metrics.jsonl import FILE
from jaxtrain.optim.acceleration import describe_evaluated_weights, eval_params
from jaxtrain.reporting.terminal import score_texts, set_up_logging
from jaxtrain.run_directory.contents import CONFIG, SUMMARY, read_config_json
from jaxtrain.run_directory.lineage import KEY
from jaxtrain.training.evaluation import Evaluator, token_limit
from jaxtrain.training.run import Run, build_reader
from jaxtrain.training.startup import library_versions
from jaxtrain.training.step import TrainState, abstract_state, init_state


def merge(
    parent: Path,
    steps: Sequence[int],
    scheme: str,
    to: Path,
    decay: str = "sqrt",
    tasks: str | None = None,
) -> dict[str, dict[str, float]]:
    """Writes the average of a run's checkpoints to a new folder; returns the figures of both.

    One checkpoint is in memory at a time. The sum is computed in float64 on the host and rounded
    once, so that an entry is within 2^-24 of its size of the exact average.

    Args:
        parent: folder of the run.
        steps: steps of its checkpoints, in any order.
        scheme, decay: as merge_weights.
        tasks: as eval.tasks; None means the run's.

    Returns:
        {"last": metrics of the newest checkpoint, "merge": metrics of the average}, as evaluate.

    Raises:
        ValueError: the run has not kept a checkpoint, or `to` exists.
        CheckpointError: a checkpoint is damaged.
    """
    steps = check_steps(steps)
    if to.exists():
        raise ValueError(f"--to must be a new folder; {to} exists. Set --to.")
    records = [read_kept_record(parent, step, "--steps") for step in steps]
    weights = merge_weights(steps, scheme, decay)
    run = build_reader(parent)
    evaluator = _open_evaluator(run, tasks)
    average, last = average_checkpoints(run, parent, steps, weights)
    params = _like(average, eval_params(last.opt_state, last.params))
    state = init_state(run.model, run.optimizer, run.mesh, params)
    state = state._replace(step=last.step)
    figures = _evaluate_both(evaluator, run, state, last)
    cfg = dataclasses.replace(run.cfg, workdir=str(to), steps=steps[-1])
    stored = read_config_json(parent) | {
        "config": config_lib.to_dict(cfg),
        "config_hash": config_lib.config_hash(cfg),
        "command": sys.argv,
        KEY: {
            "kind": "merge",
            "parent": str(parent.resolve()),
            "step": steps[-1],
            "steps": steps,
            "weights": weights,
            "scheme": f"wsm, {decay}" if scheme == "wsm" else scheme,
            "checkpoints": [record["sha256"] for record in records],
            "last": figures["last"],
        },
    }
    meta = {"data": records[-1]["meta"]["data"], "config": config_lib.flatten(cfg)}
    _write(to, parent, state, meta, stored, figures["merge"])
    return figures


def check_steps(steps: Sequence[int]) -> list[int]:
    """Returns the steps in ascending order.

    Raises:
        ValueError: there are fewer than two, or one is there twice.
    """
    if len(steps) < 2 or len(set(steps)) < len(steps):
        raise ValueError(
            f"--steps must name two or more different checkpoints; got {list(steps)}. Write "
            "--steps=200,300,400."
        )
    return sorted(steps)


def average_checkpoints(
    run: Run, parent: Path, steps: Sequence[int], weights: Sequence[float]
) -> tuple[Any, TrainState]:
    """Returns the weighted sum of evaluated weights, as float64 NumPy arrays, and the last state.

    Args:
        run: from build_reader(parent).

    Raises:
        CheckpointError: a checkpoint is damaged.
    """
    template = abstract_state(run.model, run.optimizer, run.mesh)
    total = state = None
    with Checkpoints(parent / CHECKPOINTS, 1, read_only=True) as checkpoints:
        for step, weight in zip(steps, weights, strict=True):
            state = None  # frees the previous checkpoint before the next is read
            restored = checkpoints.restore(template, step=step)
            assert restored is not None  # read_kept_record found it
            state = restored.state
            params = jax.device_get(eval_params(state.opt_state, state.params))
            scaled = jax.tree.map(lambda x, c=weight: c * np.asarray(x, np.float64), params)
            total = scaled if total is None else jax.tree.map(np.add, total, scaled)
    assert isinstance(state, TrainState)
    return total, state


def _like(values: Any, params: Any) -> Any:
    """Returns NumPy arrays as JAX arrays with the types and shardings of `params`."""
    put = lambda x, like: jax.device_put(x.astype(like.dtype), like.sharding)
    return jax.tree.map(put, values, params)


def _open_evaluator(run: Run, tasks: str | None) -> Evaluator:
    """Opens the held-out text and the tasks, before any checkpoint is read."""
    cfg = run.cfg
    corpus = open_split(cfg.data, "val", cfg.model.V, cfg.workdir, cfg.steps)
    scored = dataclasses.replace(cfg.eval, tasks=cfg.eval.tasks if tasks is None else tasks)
    try:
        opened = open_tasks(scored, cfg.data, corpus.tokenizer_name, cfg.model.V, cfg.workdir)
    except ValueError as error:
        raise ValueError(str(error).replace("--eval.tasks", "--tasks")) from error
    return Evaluator(run, corpus, opened)


def _evaluate_both(
    evaluator: Evaluator, run: Run, merged: TrainState, last: TrainState
) -> dict[str, dict[str, float]]:
    """Returns the metrics of both states, on the same tokens and tasks."""
    figures = {}
    for name, state in (("last", last), ("merge", merged)):
        metrics = evaluator.evaluate(state, max_tokens=token_limit(run.cfg))
        assert metrics is not None  # None only after a signal; no signal is listened for
        figures[name] = metrics
    return figures


def _write(
    to: Path, parent: Path, state: TrainState, meta: dict, stored: dict, metrics: dict[str, float]
) -> None:
    """Writes a run directory with one checkpoint, which appears once it is complete."""
    step = int(state.step)
    to.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(to) as hidden:
        hidden.mkdir()
        with Checkpoints(hidden / CHECKPOINTS, 1) as checkpoints:
            checkpoints.save(step, state, meta)
        if (parent / "data").is_dir():  # encoded text, which need not be encoded again
            link_tree(parent / "data", hidden / "data", hidden=False)
        (hidden / CONFIG).write_text(strict_json(stored, indent=2) + "\n")
        record = {"step": step, "time": time.time()} | metrics
        (hidden / FILE).write_text(strict_json(record) + "\n")
        summary = {"steps": step, "step": step, "stopped_by": None} | metrics
        summary |= {"versions": library_versions()}
        summary["eval_at"] = describe_evaluated_weights(state.opt_state)
        (hidden / SUMMARY).write_text(strict_json(summary, indent=2) + "\n")


def format_figures(
    steps: Sequence[int], weights: Sequence[float], figures: dict[str, dict[str, float]]
) -> str:
    """Returns the weights, a table of both losses, and the scores on tasks and further texts."""
    listed = ", ".join(f"{w:.4f} x {step}" for w, step in zip(weights, steps, strict=True))
    names = {"last": f"step {steps[-1]}", "merge": "average"}
    width = max(map(len, names.values()))
    lines = [f"average: {listed}", f"{'':<{width}}  nats/token  bits/byte"]
    for key, name in names.items():
        nats, bits = figures[key]["eval/loss_nats"], figures[key].get("eval/bits_per_byte")
        lines.append(f"{name:<{width}}  {nats:10.4f}  {'-' if bits is None else f'{bits:9.4f}'}")
    change = figures["merge"]["eval/loss_nats"] - figures["last"]["eval/loss_nats"]
    lines.append(f"{'change':<{width}}  {change:+10.4f}")
    lines.append(f"on the same {figures['merge']['eval/tokens']:,} held-out tokens")
    for key, name in names.items():
        for label, text in score_texts(figures[key]).items():
            lines.append(f"{name:<{width}}  {label}: {text}")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Merges the checkpoints that the flags name, and prints both losses."""
    args = flags.FLAGS
    set_up_logging()
    if not words:
        raise ValueError("merge needs the folder of a run. Write jaxtrain merge RUN --steps=...")
    try:
        steps = check_steps([int(step) for step in args.steps])
    except ValueError as error:
        if "invalid literal" not in str(error):
            raise
        raise ValueError(
            f"--steps must be steps of checkpoints, as 200,300,400; got {','.join(args.steps)}."
        ) from None
    parent, to = Path(words[0]), Path(args.to)
    figures = merge(parent, steps, args.weights, to, args.decay, args.tasks)
    print(format_figures(steps, merge_weights(steps, args.weights, args.decay), figures))
    print(f"next: {shell_command('evaluate', f'--run={to}')}")
    print(f"      {shell_command('export', f'--run={to}', f'--to={to}_hf')}")


def define_flags() -> None:
    """Defines the flags of `jaxtrain merge`."""
    flags.DEFINE_list("steps", None, "steps of the checkpoints, as 200,300,400", required=True)
    flags.DEFINE_string("to", None, "new folder of the average", required=True)
    flags.DEFINE_enum("weights", "uniform", sorted(SCHEMES), "weights of the checkpoints")
    flags.DEFINE_string("tasks", None, "as eval.tasks; default: the run's; empty: none")
    flags.DEFINE_enum("decay", "sqrt", sorted(DECAYS), "wsm: the decay that is emulated")


def command(
    argv: list[str] | None = None, prog: str = "python -m jaxtrain.branching.merge"
) -> None:
    """Runs the merge command with these arguments, by default those of the process."""
    run_main(main, (), CommandForm("merge", __doc__ or "", define_flags, words=1), argv, prog)


if __name__ == "__main__":
    command()
