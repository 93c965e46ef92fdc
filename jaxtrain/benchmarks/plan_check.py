"""Stage plan of suite first-day: compares the plan with measured steps and fits its efficiencies.

    JAX_PLATFORMS=cpu python -m jaxtrain.benchmarks.plan_check DIR

It compiles each step of ours in DIR/training.jsonl as `jaxtrain plan` does and stores its memory
and least times beside the measured ones in DIR/plan.json. It needs no GPU but the extra `offline`.
DIR/calibration.json gets one efficiency for each class of work; see jaxtrain.planning.calibration.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain.benchmarks.child import BenchJob, job_config
from jaxtrain.benchmarks.first_day_results import Row, read_rows, row_name
from jaxtrain.benchmarks.processor import provenance
from jaxtrain.file_errors import exit_on_file_error
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.ops.precision import resolve_dtype_for_chip
from jaxtrain.planning.calibration import (
    calibrate_by_traces,
    classes_of_causes,
    fit_calibration,
)
from jaxtrain.planning.hardware import build_hardware
from jaxtrain.planning.search import compiled_figures
from jaxtrain.training.remat import with_remat
from pallas_kernels.arguments import Parser, positive
from pallas_kernels.chip import Chip, chip_of_kind, find_chip

TINY_CHIP = "a40"  # that a trial, which has no card, plans for


def find_measured_chip(rows: Sequence[Row], tiny: bool) -> Chip:
    """Returns the chip that rows of suite gpu were measured on.

    Raises:
        ValueError: they name none, or it is not in the chip table.
    """
    if tiny:
        return find_chip(TINY_CHIP)
    kinds = [row["device"] for row in rows if row.get("device")]
    chip = chip_of_kind(kinds[-1]) if kinds else None
    if chip is None:
        raise ValueError(
            f"training.jsonl must name a device of the chip table; got {kinds or 'none'}. Run the "
            "stage training first, or add the chip to pallas_kernels/chip.py."
        )
    return chip


def own_steps(rows: Sequence[Row]) -> list[Row]:
    """Returns the measured steps of jaxtrain, each setting once: no XLA options on trial."""
    ours = (row for row in rows if row.get("variant") == "jaxtrain" and "step_s" in row)
    return [row for row in ours if row["what"] == "step"]


def compare_step(row: Row, chip: Chip, cache: Path) -> Row:
    """Returns a measured step beside its plan: seconds and bytes."""
    size, optimizer = row["case"].split()
    tiny = bool(row.get("tiny"))
    cfg = job_config(BenchJob("train", size, optimizer, tiny=tiny))
    batch = row["tokens_per_step"] // cfg.data.seq_len
    data = dataclasses.replace(cfg.data, batch=batch)
    cfg = dataclasses.replace(cfg, data=data, accumulation=batch // row["rows"], compile_cache="")
    cfg = with_remat(cfg, row.get("routes", {}).get("remat", cfg.model.remat))
    hardware = build_hardware(chip, 1, 1, "", "ethernet10")
    figures = compiled_figures(resolve_dtype_for_chip(cfg, chip), hardware, str(cache))
    return {
        "case": f"{row['case']}, micro-batches of {row['rows']}",
        "measured_s": row["step_s"],
        "bound_s": figures["roofline_s"],
        "class_s": figures["class_s"],
        "measured_bytes": row.get("peak_bytes"),
        "planned_on_card_bytes": row.get("planned_bytes"),
        "planned_bytes": figures["memory_bytes"]["peak"],
        "measured_routes": row.get("routes"),
        "planned_routes": figures["routes"],
        "notes": figures["notes"],
    } | ({"tiny": True} if tiny else {})


def traced_classes(folder: Path, steps: list[Row]) -> list[dict[str, float]]:
    """Returns each step's measured seconds by class, from the stage profile; {} without a trace."""
    path = folder / "profile.jsonl"
    traces = read_rows(path) if path.exists() else []
    causes_s = {trace.get("trace"): trace.get("by_cause_s", {}) for trace in traces}
    name = lambda step: row_name(step).replace(" ", "_")
    return [classes_of_causes(causes_s.get(name(step), {}), step["step_s"]) for step in steps]


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m jaxtrain.benchmarks.plan_check", __doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of suite first-day")
    parser.add_argument(
        "--minutes", type=positive(float), default=10.0, help="time limit; default: 10"
    )
    parser.add_argument("--tiny", action="store_true", help="the folder is a trial's")
    args = parser.parse_args(argv)
    try:
        check_folder(args.folder, time.monotonic() + 60 * args.minutes, args.tiny)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


@exit_on_file_error()
def check_folder(folder: Path, until_s: float, tiny: bool) -> None:
    """Compares all measured steps of a folder until the time is up; then fits, if none is left.

    Raises:
        ValueError: the folder has no measured step, or one of an unknown chip.
        RuntimeError: the compiler for GPUs is missing.
    """
    rows = read_rows(folder / "training.jsonl")
    steps, chip = own_steps(rows), find_measured_chip(rows, tiny)
    trial = {"tiny": True} if tiny else {}
    devices = [row for row in rows if row.get("device")]
    about = provenance() | {"card": devices[-1]["device"], "jax": jax.__version__}
    result: dict[str, Any] = {"chip": chip.name, **about, **trial, "rows": []}

    def write(name: str, value: dict[str, Any]) -> None:
        write_atomic(folder / name, strict_json(value, indent=1) + "\n")

    for index, step in enumerate(steps):
        result["left"] = [row["case"] for row in steps[index:]]
        if time.monotonic() > until_s:
            write("plan.json", result)
            return
        result["rows"].append(compare_step(step, chip, folder / "plans"))
    classes_s = [row["class_s"] for row in result["rows"]]
    pairs = zip(classes_s, traced_classes(folder, steps), strict=True)
    pairs = [pair for pair in pairs if pair[1]]
    if pairs:
        least_s, traced_s = zip(*pairs, strict=True)
        fitted = calibrate_by_traces(chip.name, least_s, traced_s, about)
    else:
        measured_s = [row["measured_s"] for row in result["rows"]]
        fitted = fit_calibration(chip.name, classes_s, measured_s, about)
    for row in result["rows"]:
        row["calibrated_s"] = fitted.seconds(row["class_s"])
    write("calibration.json", fitted._asdict() | trial)
    write("plan.json", result | {"left": [], "calibration": fitted.describe()})


if __name__ == "__main__":
    main()
