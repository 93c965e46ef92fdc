"""Trains the runs of a ladder: a stable run per size, and a branch that decays to each horizon."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxtrain.branching.branch import create_branch, plan_branch
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.ladder.fit import Point
from jaxtrain.ladder.plan import Cell, Plan
from jaxtrain.metrics.jsonl import FILE, read_metrics
from jaxtrain.run_directory.contents import (
    CONFIG,
    EVAL_LOSS,
    has_ended,
    load_train_config,
    read_summary_json,
)
from jaxtrain.study.runs import Interrupted
from jaxtrain.train import train

Note = Callable[[str], None]


class Cost(NamedTuple):
    """Steps that a size's runs trained, and those of separate runs to the same horizons."""

    steps: int
    separate_steps: int


def train_size(plan: Plan, size: str, horizons: list[int], note: Note) -> dict[int, float]:
    """Trains a size's stable run and its branches; returns the held-out loss at each horizon.

    Runs that have ended are not trained again, and an interrupted one is resumed. The stable run
    goes from branch to branch: at each it stops, and its checkpoint is linked into the branch's
    folder before later ones replace it.

    Raises:
        Interrupted: a signal stopped a run, which is saved.
        Diverged: a run diverged.
        ValueError: a folder contains a run of another config.
    """
    losses = {}
    for horizon in sorted(horizons):
        cell, start = Cell(size, horizon), plan.branch_step(horizon)
        folder = plan.branch_folder(cell)
        if not folder.exists():
            _train_trunk(plan, size, start, note)
            trunk = plan.trunk_folder(size)
            cfg = load_train_config(trunk)
            create_branch(plan_branch(trunk, start, folder, cfg, decay_steps=horizon - start))
        cfg = load_train_config(folder)
        _check_branch(plan, cell, cfg)
        if not _ended(folder, horizon):
            note(f"{cell}: decay from step {start} to {horizon}")
            _train(cfg)
        losses[horizon] = read_loss(folder)
        note(f"{cell}: held-out loss {losses[horizon]:.4f}")
    return losses


def _train_trunk(plan: Plan, size: str, steps: int, note: Note) -> None:
    """Trains the stable run of a size up to a step, from where it is."""
    cfg, folder = plan.trunk_config(size, steps), plan.trunk_folder(size)
    if (folder / CONFIG).exists():
        _check_same(cfg, load_train_config(folder), folder)
        if _ended(folder, steps):
            return
    note(f"{size}: stable run up to step {steps}")
    _train(cfg)


def _check_branch(plan: Plan, cell: Cell, stored: TrainConfig) -> None:
    """Raises ValueError unless a branch's folder contains what the plan wants there."""
    folder = plan.branch_folder(cell)
    _check_same(plan.trunk_config(cell.size, plan.branch_step(cell.horizon)), stored, folder)
    if stored.steps != cell.horizon or stored.optim.schedule != "wsd":
        raise ValueError(f"{folder} must be the branch to step {cell.horizon}. Set --to.")


def _check_same(wanted: TrainConfig, stored: TrainConfig, folder: Path) -> None:
    """Raises ValueError if a run in the ladder's folder was trained with another config.

    Steps and schedule are not compared: they change from branch to branch. The dtype is that of
    the device.
    """
    ours, theirs = vars(wanted), vars(stored)
    optim = lambda values: {
        name: value
        for name, value in vars(values["optim"]).items()
        if name not in ("schedule", "total_steps", "decay_fraction")
    }
    model = lambda values: {k: v for k, v in vars(values["model"]).items() if k != "dtype"}
    checks = [
        ("seed", ours["seed"], theirs["seed"]),
        ("data", ours["data"], theirs["data"]),
        ("loss", ours["loss"], theirs["loss"]),
        ("model", model(ours), model(theirs)),
        ("optim", optim(ours), optim(theirs)),
    ]
    changed = [name for name, our, their in checks if our != their]
    if changed:
        raise ValueError(
            f"{folder} must be a run of this ladder; its {', '.join(changed)} differ. Set --to to "
            "a new folder, or the flags as before."
        )


def _train(cfg: TrainConfig) -> None:
    if status := train(cfg, quiet=True):
        raise Interrupted(status)


def _ended(folder: Path, steps: int) -> bool:
    """Returns whether a run has been trained and evaluated at least up to `steps`."""
    try:
        summary = read_summary_json(folder)
    except (FileNotFoundError, ValueError):
        return False
    return has_ended(summary, summary["step"]) and summary["step"] >= steps


def read_loss(folder: Path) -> float:
    """Returns the held-out loss of a run that has ended, in nats/token."""
    return float(read_summary_json(folder)[EVAL_LOSS])


def measure_cost(plan: Plan, size: str, horizons: list[int]) -> Cost:
    """Returns the steps of a size's runs, and of separate runs to the same horizons."""
    starts = [plan.branch_step(horizon) for horizon in horizons]
    decays = [horizon - start for horizon, start in zip(horizons, starts, strict=True)]
    return Cost(max(starts) + sum(decays), sum(horizons))


def logged_losses(folder: Path) -> list[tuple[int, float]]:
    """Returns (step, training loss) of every logged step of a run."""
    records = read_metrics(folder / FILE)
    return [(r["step"], r["train/loss_nats"]) for r in records if "train/loss_nats" in r]


def to_points(
    plan: Plan, parameters: dict[str, int], losses: dict[str, dict[int, float]]
) -> list[Point]:
    """Returns the points of the fit: one for each size and horizon."""
    return [
        Point(cell.size, parameters[cell.size], cell.horizon, plan.tokens(cell.horizon), loss)
        for cell in plan.cells
        for loss in [losses[cell.size][cell.horizon]]
    ]
