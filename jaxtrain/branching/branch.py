"""Trains on from a checkpoint of a run, in a new folder; the run itself stays as it is.

    jaxtrain branch runs/trunk --at=400 --decay=0.1 --to=runs/decay_400
    jaxtrain branch runs/trunk --at=400 --to=runs/code --data.text=src --steps=600
    jaxtrain branch runs/trunk --at=400 --to=runs/slower --optim.learning_rate=0.01

Everything goes on: optimizer state, position in the data, random numbers and counters. A branch
without further flags trains exactly what the run trained after that step. --decay=0.1 adds 10 % of
the steps before the branch, over which the rate falls to optim.final_scale of its peak. Any flag of
`jaxtrain train` changes the config, and --steps is the last step, counted from the run's start.

If flags change the data, they are read from their beginning. If flags change the optimizer so that
its state no longer fits, the branch starts at step 0 from the weights that the run is evaluated
with. The run must have kept the checkpoint: train it with --keep_every. The same command, or
`jaxtrain train` with the new folder, resumes a branch.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from jaxtrain.branching.kept import CHECKPOINTS, read_kept_record
from jaxtrain.branching.schedule import (
    check_stage_ends,
    count_decay_steps,
    count_from_zero,
    set_decay,
)
from jaxtrain.checkpoint import integrity
from jaxtrain.checkpoint.links import link_tree
from jaxtrain.config import train_config as config_lib
from jaxtrain.config.command_line import CommandForm
from jaxtrain.config.help_text import describe_flags
from jaxtrain.config.shell_commands import shell_command
from jaxtrain.distributed.preemption import StopListener
from jaxtrain.distributed.program import run_main
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.files import atomic_path, strict_json
from jaxtrain.model.compatibility import check_same_model
from jaxtrain.reporting.terminal import set_up_logging
from jaxtrain.run_directory.contents import CONFIG, load_train_config, read_config_json
from jaxtrain.run_directory.lineage import KEY, read_lineage
from jaxtrain.train import train
from jaxtrain.training.loop import Diverged
from jaxtrain.training.run import build_run
from jaxtrain.training.step import abstract_state

NOT_DATA = ("data.prefetch",)  # fields of data that do not change what is read


class Branch(NamedTuple):
    """A branch that can be created.

    Attributes:
        folder: its new folder.
        cfg: its config.
        lineage: see jaxtrain.run_directory.lineage.
    """

    folder: Path
    cfg: config_lib.TrainConfig
    lineage: dict[str, Any]


def plan_branch(
    parent: Path,
    at: int,
    to: str | Path,
    cfg: config_lib.TrainConfig,
    decay: float = 0.0,
    decay_steps: int = 0,
) -> Branch:
    """Checks everything that could refuse a branch; nothing is written.

    Args:
        parent: folder of the run.
        at: step of one of its checkpoints.
        to: folder of the branch.
        cfg: the run's config, with the fields that the user changed.
        decay, decay_steps: as count_decay_steps.

    Raises:
        ValueError: there is no such checkpoint, `to` is taken, or the config does not fit.
        CheckpointError: the checkpoint is damaged.
    """
    record = read_kept_record(parent, at, "--at")
    trunk = load_train_config(parent)
    if Path(cfg.workdir).resolve() != parent.resolve():
        raise ValueError(f"the folder of a branch is --to; got workdir={cfg.workdir}. Set --to.")
    if cfg.sites.period:
        raise ValueError(
            f"a branch trains on one site; got sites.period={cfg.sites.period}. Set "
            "--sites.period=0."
        )
    check_same_model(cfg.model, vars(trunk.model), f"that of {parent}", "train a new run")
    if decay_steps := count_decay_steps(at, decay, decay_steps):
        cfg = set_decay(cfg, trunk, at, decay_steps)
    if cfg.steps <= at:
        raise ValueError(
            f"steps must be above --at={at}, as they count from the start of {parent}; got "
            f"steps={cfg.steps}. Set --steps or --decay."
        )
    check_stage_ends(cfg, trunk, at)
    changes = config_lib.describe_changes(config_lib.flatten(trunk), cfg)
    names = {change.split()[0] for change in changes} - set(NOT_DATA)
    lineage = {
        "kind": "branch",
        "parent": str(parent.resolve()),
        "step": at,
        "checkpoint": record["sha256"],
        "new_optimizer": False,
        "decay_steps": decay_steps,
        "data": record["meta"]["data"],
        "new_data": any(name == "seed" or name.startswith("data.") for name in names),
        "changes": changes,
    }
    cfg = config_lib.freeze(config_lib.to_dict(cfg) | {"workdir": str(to)})
    if not _continues_state(cfg, record, names):
        cfg = count_from_zero(cfg, at)
        weights = str(parent.resolve() / CHECKPOINTS / str(at))
        cfg = config_lib.freeze(config_lib.to_dict(cfg) | {"weights": weights})
        lineage["new_optimizer"] = True
    return Branch(Path(to), cfg, lineage)


def _continues_state(cfg: config_lib.TrainConfig, record: dict[str, Any], names: set[str]) -> bool:
    """Returns whether the checkpoint's optimizer state is that of the branch's config.

    Raises:
        ValueError: it is not, although the optimizer was not changed.
    """
    # The shapes are the same on every mesh, so that any machine can create a branch.
    values = config_lib.to_dict(cfg) | {"mesh": vars(config_lib.MeshConfig(1, 1, 1))}
    values["model"] |= {"attention": "auto"}
    values |= {"strict": False, "kernels": values["kernels"] | {"strict": False}}
    run = build_run(config_lib.freeze(values), jax.devices()[:1])
    template = integrity.flatten_state(abstract_state(run.model, run.optimizer, run.mesh))
    try:
        integrity.check_template(record, template)
    except ValueError:
        if not any(name.startswith("optim.") for name in names):
            raise
        return False
    return True


def create_branch(branch: Branch) -> bool:
    """Creates a branch's folder, unless an earlier start of the same branch did; returns whether.

    It appears under its name only once it is complete.

    Raises:
        ValueError: the folder contains something else, or the checkpoint was deleted meanwhile.
    """
    folder, parent, at = branch.folder, Path(branch.lineage["parent"]), branch.lineage["step"]
    if folder.exists():
        _check_same_branch(branch)
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    stored = read_config_json(parent) | {
        "config": config_lib.to_dict(branch.cfg),
        "config_hash": config_lib.config_hash(branch.cfg),
        "command": sys.argv,
        KEY: branch.lineage,
    }
    try:
        with atomic_path(folder) as hidden:
            hidden.mkdir()
            if not branch.lineage["new_optimizer"]:
                (hidden / CHECKPOINTS).mkdir()
                link_tree(parent / CHECKPOINTS / str(at), hidden / CHECKPOINTS / str(at))
                integrity.read_record(hidden / CHECKPOINTS / str(at))
            if (parent / "data").is_dir():  # encoded text, which need not be encoded again
                link_tree(parent / "data", hidden / "data", hidden=False)
            (hidden / CONFIG).write_text(strict_json(stored, indent=2) + "\n")
    except FileNotFoundError as error:
        raise ValueError(
            f"checkpoint {at} of {parent} must stay while it is copied; got {error}. Train the run "
            "with a larger --keep_last, or with --keep_every."
        ) from error
    return True


def _check_same_branch(branch: Branch) -> None:
    """Raises ValueError unless the folder contains this branch, so that it can be resumed."""
    folder, want = branch.folder, branch.lineage
    found = read_lineage(folder)
    if not found:
        raise ValueError(f"--to must be a new folder; {folder} exists. Set --to.")
    differ = [k for k in ("kind", "step", "checkpoint") if found.get(k) != want[k]]
    stored = load_train_config(folder)
    differ += config_lib.describe_changes(config_lib.flatten(stored), branch.cfg)
    if differ:
        raise ValueError(
            f"--to must be a new folder, or that of the same branch; {folder} is another one: "
            f"{'; '.join(differ)}. Set --to, or resume that one with "
            f"{shell_command('train', str(folder))}."
        )


def run_branch(branch: Branch) -> int:
    """Trains a branch to its end or until a signal; returns the exit status."""
    with StopListener() as stop:
        return train(branch.cfg, stop=stop)


def main() -> int:
    """Creates the branch that the flags describe, and trains it."""
    args = flags.FLAGS
    set_up_logging()
    path = Path(args["config"].config_filename)  # pyright: ignore[reportAttributeAccessIssue]
    if path.name != CONFIG:
        raise ValueError(f"branch needs the folder of a run, with {CONFIG}; got {path}.")
    cfg = config_lib.freeze(args.config)
    start_runtime(cfg)
    parent = path.parent
    if parent.is_relative_to(Path.cwd()):  # shorter in messages
        parent = parent.relative_to(Path.cwd())
    branch = plan_branch(parent, args.at, args.to, cfg, args.decay, args.decay_steps)
    created = create_branch(branch)
    print("\n".join(describe_branch(branch, parent, created)))
    if not args.train:
        print(f"next: {shell_command('train', str(branch.folder))}")
        return 0
    return run_branch(branch)


def describe_branch(branch: Branch, parent: Path, created: bool) -> Iterator[str]:
    """Yields lines on where a branch begins, and what it changes."""
    lineage, cfg = branch.lineage, branch.cfg
    verb = "branches" if created else "is resumed, which branched"
    yield f"{branch.folder} {verb} from step {lineage['step']} of {parent}"
    if lineage["new_optimizer"]:
        yield f"a new optimizer state: its {cfg.steps} steps count from 0"
    else:
        yield f"it trains {cfg.steps - lineage['step']} steps, up to step {cfg.steps}"
    yield from (f"changed: {change}" for change in lineage["changes"])


def define_flags() -> None:
    """Defines the flags of `jaxtrain branch`."""
    flags.DEFINE_string("to", None, "new folder of the branch", required=True)
    flags.DEFINE_integer("at", None, "step of a checkpoint that the run has kept", required=True)
    flags.DEFINE_float(
        "decay", 0.0, "steps of the branch as a share of --at; the rate falls over all of them"
    )
    flags.DEFINE_integer("decay_steps", 0, "the same, as a number of steps")
    flags.DEFINE_bool("train", True, "--train=false only creates the folder, to train it later")


def command(
    argv: list[str] | None = None, prog: str = "python -m jaxtrain.branching.branch"
) -> None:
    """Runs the branch command with these arguments, by default those of the process."""
    tables = describe_flags(config_lib.TrainConfig)
    form = CommandForm("branch", __doc__ or "", define_flags, config="must", tables=tables)
    run_main(main, (Diverged,), form, argv, prog)


if __name__ == "__main__":
    command()
