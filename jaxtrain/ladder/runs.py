"""Trains the runs of a ladder: a stable run per size, and a branch that decays to each horizon."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtrain.branching.branch import create_branch, plan_branch
from jaxtrain.branching.kept import CHECKPOINTS
from jaxtrain.checkpoint.step_folders import list_steps
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.distributed.preemption import StopListener
from jaxtrain.ladder.fit import Point
from jaxtrain.ladder.plan import Cell, Plan
from jaxtrain.run_directory.contents import (
    CONFIG,
    EVAL_LOSS,
    has_ended,
    load_train_config,
    read_summary_json,
)
from jaxtrain.run_directory.lineage import read_branch
from jaxtrain.study.runs import Interrupted, identity
from jaxtrain.train import train

Note = Callable[[str], None]
Devices = Sequence[Any] | None  # None: all
# Fields that a run must share with the ladder, and those of them that differ between its runs.
COMPARED = ("seed", "eval_tokens", "model.", "data.", "loss.", "optim.")
NOT_COMPARED = ("optim.schedule", "optim.total_steps", "optim.decay_fraction")
NOT_COMPARED += ("model.dtype", "data.prefetch")  # the type is that of the device


class Cost(NamedTuple):
    """Steps that a size's runs trained, and those of separate runs to the same horizons."""

    steps: int
    separate_steps: int


def check_folders(plan: Plan) -> None:
    """Checks all runs that are in the ladder's folder, before any is trained.

    Raises:
        ValueError: a run has another config, or a stable run has passed the start of a decay.
    """
    for size in plan.all_sizes:
        if (plan.trunk_folder(size) / CONFIG).exists():
            _check_same(plan, size, plan.trunk_folder(size))
    for cell in plan.all_cells:
        folder, start = plan.branch_folder(cell), plan.branch_step(cell.horizon)
        if folder.exists():
            _check_branch(plan, cell)
            continue
        kept = list_steps(plan.trunk_folder(cell.size) / CHECKPOINTS)
        if kept and start < kept[-1] and start not in kept:
            raise ValueError(
                f"the decay to {cell.horizon} steps starts at step {start}, which the stable run "
                f"{plan.trunk_folder(cell.size)} has passed; it has kept "
                f"{', '.join(map(str, kept))}. Leave it out of --horizons, or set --to."
            )


def _check_branch(plan: Plan, cell: Cell) -> None:
    """Raises ValueError unless a cell's folder contains its branch."""
    folder, start = plan.branch_folder(cell), plan.branch_step(cell.horizon)
    branch = read_branch(folder)
    if branch is None or load_train_config(folder).steps != cell.horizon:
        raise ValueError(f"{folder} must be a branch to step {cell.horizon}. Set --to.")
    if branch["step"] != start:
        raise ValueError(
            f"the decay to {cell.horizon} steps must start at step {start} with decay="
            f"{plan.decay:g}; that of {folder} starts at step {branch['step']}. Set --decay as "
            "before, or --to."
        )
    _check_same(plan, cell.size, folder)


def _check_same(plan: Plan, size: str, folder: Path) -> None:
    """Raises ValueError if a run in the ladder's folder was trained with another config."""
    wanted = identity(plan.trunk_config(size, 1))
    stored = identity(load_train_config(folder))
    names = [k for k in wanted if k.startswith(COMPARED) and k not in NOT_COMPARED]
    changed = [f"{k}={stored[k]!r}, now {wanted[k]!r}" for k in names if stored[k] != wanted[k]]
    if changed:
        raise ValueError(
            f"{folder} must be a run of this ladder; got {'; '.join(changed)}. Set these flags as "
            "before, or --to to a new folder."
        )


def train_size(
    plan: Plan, size: str, horizons: list[int], note: Note, devices: Devices = None
) -> dict[int, float]:
    """Trains a size's stable run and its branches; returns the held-out loss at each horizon.

    Runs that have ended are not trained again, and an interrupted one is resumed. The stable run
    goes from branch to branch: at each it stops, and its checkpoint is linked into the branch's
    folder before later ones replace it. check_folders has found no run of another config.

    Raises:
        Interrupted: a signal stopped a run, which is saved.
        Diverged: a run diverged.
    """
    losses = {}
    for horizon in sorted(horizons):
        cell, start = Cell(size, horizon), plan.branch_step(horizon)
        folder, trunk = plan.branch_folder(cell), plan.trunk_folder(size)
        if not folder.exists():
            if not (trunk / CHECKPOINTS / str(start)).exists() or not _ended(trunk, start):
                note(f"{size}: stable run up to step {start}")
                _train(plan.trunk_config(size, start), devices)
            cfg = load_train_config(trunk)
            create_branch(plan_branch(trunk, start, folder, cfg, decay_steps=horizon - start))
        if not _ended(folder, horizon):
            note(f"{cell}: decay from step {start} to {horizon}")
            _train(load_train_config(folder), devices)
        losses[horizon] = read_loss(plan, folder)
        note(f"{cell}: held-out loss {losses[horizon]:.4f}")
    return losses


def _train(cfg: TrainConfig, devices: Devices) -> None:
    with StopListener() as stop:  # also while XLA compiles, in threads that outlive an exception
        status = train(cfg, devices, quiet=True, stop=stop)
    if status:
        raise Interrupted(status)


def _ended(folder: Path, steps: int) -> bool:
    """Returns whether a run has been trained and evaluated at least up to `steps`."""
    try:
        summary = read_summary_json(folder)
    except (FileNotFoundError, ValueError):
        return False
    return has_ended(summary, summary["step"]) and summary["step"] >= steps


def read_loss(plan: Plan, folder: Path) -> float:
    """Returns the held-out loss of a run that has ended, in nats/token.

    That of a mixture weighs the sources as its last stage does, in every run.
    """
    summary, weights = read_summary_json(folder), plan.loss_weights()
    if not weights:
        return float(summary[EVAL_LOSS])
    return sum(share * summary[f"eval/{name}_loss_nats"] for name, share in weights.items())


def measure_cost(plan: Plan, size: str, horizons: list[int]) -> Cost:
    """Returns the steps of a size's runs, and of separate runs to the same horizons."""
    starts = [plan.branch_step(horizon) for horizon in horizons]
    decays = [horizon - start for horizon, start in zip(horizons, starts, strict=True)]
    return Cost(max(starts) + sum(decays), sum(horizons))


def to_points(
    plan: Plan, parameters: dict[str, int], losses: dict[str, dict[int, float]]
) -> list[Point]:
    """Returns the points of the fit: one for each size and horizon."""
    return [
        Point(cell.size, parameters[cell.size], cell.horizon, plan.tokens(cell.horizon), loss)
        for cell in plan.cells
        for loss in [losses[cell.size][cell.horizon]]
    ]
