"""Trains a ladder of sizes and horizons, fits the loss, and checks a prediction of the fit.

    jaxtrain ladder quickstart --sizes=64x1,64x2,128x2 --horizons=60,120,240 --to=runs/ladder
    jaxtrain ladder debug --sizes=32x1,32x2,64x2 --horizons=20,40 --to=runs/tiny
    jaxtrain ladder debug --sizes=32x1,32x2,64x2 --horizons=20,40 --to=runs/tiny --predict=64x3@80

A size is WIDTHxDEPTH; heads keep the config's width. Each size has one run at a constant rate, and
a branch from it to each horizon, over whose last steps the rate falls; a horizon is the last step.
The fit is L(N, D) = E + A / N^alpha + B / D^beta. With --predict, its loss for a size and horizon
that it has not seen is written to prediction.json before that run starts. Rates are the config's at
every size: tune them, or set --optim.parametrisation=spectral. The same command resumes a ladder.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags

from jaxtrain.config import train_config as config_lib
from jaxtrain.config.command_line import CommandForm
from jaxtrain.config.help_text import describe_flags
from jaxtrain.distributed.program import run_main
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.errors import INTERRUPTED
from jaxtrain.files import write_atomic
from jaxtrain.ladder.fit import Fit, Point, fit_losses
from jaxtrain.ladder.plan import Cell, Plan, build_plan
from jaxtrain.ladder.report import (
    PICTURE,
    PREDICTION,
    draw,
    format_check,
    format_fit,
    state_prediction,
    write_result,
    write_table,
)
from jaxtrain.ladder.runs import (
    Cost,
    Devices,
    Note,
    check_folders,
    measure_cost,
    to_points,
    train_size,
)
from jaxtrain.ops.precision import resolve_dtype
from jaxtrain.reporting.terminal import set_up_logging
from jaxtrain.run_directory.lock import RunLock
from jaxtrain.study.runs import Interrupted, open_data
from jaxtrain.training.loop import Diverged
from jaxtrain.training.run import build_run

LOCK = ".ladder.lock"


def run_ladder(plan: Plan, redraws: int, note: Note = print, devices: Devices = None) -> Fit:
    """Trains what is not trained yet, and writes the table, the fit, the prediction and a picture.

    Args:
        redraws: bootstrap draws.

    Raises:
        ValueError: a size cannot be built, or the folder contains runs of another ladder.
        RunLocked: another ladder works in the folder.
        Interrupted: a signal stopped a run, which is saved; the same call resumes.
        Diverged: a run diverged.
    """
    parameters = {size: count_parameters(plan, size, devices) for size in plan.all_sizes}
    with RunLock(plan.folder, "--to", wait_s=0.0, name=LOCK):
        base, _ = open_data(plan.base, plan.folder)
        plan = plan._replace(base=base)
        check_folders(plan)
        check_prediction(plan)
        losses = {size: train_size(plan, size, plan.horizons, note, devices) for size in plan.sizes}
        fit = fit_losses(to_points(plan, parameters, losses), redraws)
        write_table(plan, fit)
        for line in format_fit(fit):
            note(line)
        costs = [measure_cost(plan, size, plan.horizons) for size in plan.sizes]
        cost = Cost(sum(c.steps for c in costs), sum(c.separate_steps for c in costs))
        share = cost.steps / cost.separate_steps
        note(f"{cost.steps:,} steps, {share:.1%} of the {cost.separate_steps:,} of separate runs")
        prediction = measured = None
        if cell := plan.held_out:
            prediction = predict_first(plan, cell, parameters[cell.size], fit, note)
            loss = train_size(plan, cell.size, [cell.horizon], note, devices)[cell.horizon]
            tokens = plan.tokens(cell.horizon)
            measured = Point(cell.size, parameters[cell.size], cell.horizon, tokens, loss)
            note(format_check(prediction, measured))
        write_result(plan, fit, cost, prediction, measured)
        write_atomic(plan.folder / PICTURE, draw(fit, prediction, measured))
        note(f"table, fit and picture are in {plan.folder}")
    return fit


def count_parameters(plan: Plan, size: str, devices: Devices = None) -> int:
    """Returns the number of parameters of a size; raises ValueError if it cannot be built."""
    return build_run(plan.trunk_config(size, plan.horizons[0]), devices).parameters


def check_prediction(plan: Plan) -> None:
    """Raises ValueError if the cell to predict was trained before this ladder's cells."""
    cell, path = plan.held_out, plan.folder / PREDICTION
    if cell is None or not plan.branch_folder(cell).exists():
        return
    stored = json.loads(path.read_bytes()) if path.exists() else None
    fitted = stored and [Cell(point["size"], point["horizon"]) for point in stored["fit"]["points"]]
    if stored is None or stored["cell"] != str(cell) or fitted != plan.cells:
        raise trained_too_early(plan, cell)


def trained_too_early(plan: Plan, cell: Cell) -> ValueError:
    """Returns the error of a cell whose run began before its prediction."""
    return ValueError(
        f"{cell} was trained before this fit, so its loss can no longer be predicted. Set "
        f"--predict to another cell, or remove {plan.branch_folder(cell)}."
    )


def predict_first(plan: Plan, cell: Cell, parameters: int, fit: Fit, note: Note) -> dict[str, Any]:
    """Returns the prediction for a cell; it is written before the cell's run starts.

    Raises:
        ValueError: a prediction from other points exists, or the run began before any prediction.
    """
    path, points = plan.folder / PREDICTION, [point._asdict() for point in fit.points]
    if path.exists():
        stored = json.loads(path.read_bytes())
        if stored["cell"] == str(cell) and stored["fit"]["points"] == points:
            return stored
    if plan.branch_folder(cell).exists():
        raise trained_too_early(plan, cell)
    prediction = state_prediction(plan, cell, parameters, fit)
    note(
        f"{cell}: predicted {prediction['loss']:.4f} "
        f"[{prediction['low']:.4f}, {prediction['high']:.4f}], written to {path}"
    )
    return prediction


def _whole_numbers(texts: list[str], flag: str) -> list[int]:
    if not all(text.strip().isdecimal() for text in texts):
        raise ValueError(f"--{flag} must be steps, as 100,200,400; got {','.join(texts)}.")
    return [int(text) for text in texts]


def main() -> int:
    """Runs the ladder that the flags describe; returns the exit status."""
    args = flags.FLAGS
    set_up_logging()
    base, folder = config_lib.freeze(args.config), Path(args.to)
    sizes = [size.strip() for size in args.sizes]
    horizons = _whole_numbers(args.horizons, "horizons")
    plan = build_plan(base, sizes, horizons, args.decay, args.predict, folder)
    start_runtime(plan.base)
    base, _ = resolve_dtype(plan.base, jax.devices()[0])
    try:
        # A ladder runs for long: a file that its output goes to should show each run at once.
        run_ladder(plan._replace(base=base), args.redraws, partial(print, flush=True))
    except (Interrupted, KeyboardInterrupt) as stop:
        print("interrupted; the same command resumes the ladder", file=sys.stderr)
        return getattr(stop, "status", INTERRUPTED)
    return 0


def define_flags() -> None:
    """Defines the flags of `jaxtrain ladder`."""
    flags.DEFINE_list("sizes", None, "sizes, as 64x1,64x2,128x2: WIDTHxDEPTH", required=True)
    flags.DEFINE_list("horizons", None, "last steps, as 100,200,400", required=True)
    flags.DEFINE_string("to", None, "folder of the ladder", required=True)
    flags.DEFINE_float("decay", 0.2, "steps of each decay, as a share of the steps before it")
    flags.DEFINE_string("predict", "", "SIZE@HORIZON to predict, then to train")
    flags.DEFINE_integer("redraws", 100, "bootstrap draws", lower_bound=10)


def command(argv: list[str] | None = None, prog: str = "python -m jaxtrain.ladder") -> None:
    """Runs the ladder command with these arguments, by default those of the process."""
    tables = describe_flags(config_lib.TrainConfig)
    form = CommandForm("ladder", __doc__ or "", define_flags, config="must", tables=tables)
    run_main(main, (Diverged,), form, argv, prog)


if __name__ == "__main__":
    command()
