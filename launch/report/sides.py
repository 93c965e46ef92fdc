"""Reads the two sides of a comparison from run directories or from published figures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.inventory import read_toml
from launch.report.run_folder import EVAL_LOSS, LOSS, RunFolder, find_runs

# Settings in which runs of the same work may differ.
NOT_WORK = ("workdir", "compile_cache", "checkpoint.storage", "seed")
# REPORT_SECTIONS of jaxtrain, which launch cannot import.
NOT_WORK_SECTIONS = ("eval.", "measure.", "profile.", "export.", "notify.")
EXTERNAL = {  # key of a [[side]] -> its type; the first seven are required
    "name": str,
    "config_hash": str,
    "data_fingerprint": str,
    "tokens_per_step": int,
    "devices": int,
    "device": str,
    "source": str,
    "step_time_s": list,
    "clock_s": list,
    "loss_nats": list,
    "peak_flops_per_s": float,
    "hbm_bytes_per_s": float,
    "roofline_s": float,
}
REQUIRED = 7
LARGEST = 1e100  # of published numbers, so that their sums and squares are finite
PEAKS = ("peak_flops_per_s", "hbm_bytes_per_s", "roofline_s")


@dataclass(frozen=True)
class Side:
    """One side of a comparison; None means unknown."""

    name: str
    device: str  # the chip's name, or JAX's name where the chip is unknown
    device_kind: str  # JAX's name
    devices: int
    config_hash: str
    settings: dict | None  # those that define the work, by flag; None for published figures
    data_fingerprint: str
    tokens_per_step: int
    times_s: list[list[float]]  # of each run, in order
    what: str  # describes the times, such as "each step, hosts/0.jsonl"
    losses: list[dict[int, float]]  # of each run: step -> nats
    peak_flops_per_s: float | None = None
    hbm_bytes_per_s: float | None = None
    roofline_s: float | None = None
    matmul_flops_per_s: float | None = None  # measured, as the next
    copy_bytes_per_s: float | None = None


def flatten(values: dict, prefix: str = "") -> dict:
    """Returns a nested dict as {"outer.inner": value}."""
    flat = {}
    for key, value in values.items():
        nested = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= nested if nested is not None else {f"{prefix}{key}": value}
    return flat


def read_side(path: str | Path, may_differ: Sequence[str] = ()) -> Side:
    """Reads a run directory, or a folder of repetitions, which may differ in their seed.

    Args:
        may_differ: settings, by flag, that are not part of the work.

    Raises:
        ValueError: there is no run, a run has no step times, or the runs are not repetitions.
    """
    runs = find_runs(path)
    first = runs[0]
    for run in runs:
        if not run.seconds:
            raise ValueError(f"{run.folder} must have two logged steps or more to be compared.")
        if work_of(run, may_differ) != work_of(first, may_differ) or run.device != first.device:
            raise ValueError(
                f"the runs in {path} must be repetitions of one; got {first.name} and {run.name}, "
                "whose configs or devices differ. Give one run per side, or set --may_differ."
            )
    return Side(
        name=first.name if len(runs) == 1 else f"{Path(path).name}, {len(runs)} runs",
        device=first.device,
        device_kind=first.device_kind,
        devices=first.devices,
        config_hash=first.config_hash,
        settings=work_of(first, may_differ),
        data_fingerprint=first.data_fingerprint,
        tokens_per_step=first.tokens_per_step,
        times_s=[run.seconds for run in runs],
        what=f"{first.step_times[1]}, without the first",
        losses=[dict(run.points(LOSS) or run.points(EVAL_LOSS)) for run in runs],
        peak_flops_per_s=first.peak_flops_per_s,
        hbm_bytes_per_s=first.chip["hbm_bytes_per_s"] if first.chip else None,
        # That of a step of one size says nothing of the others.
        roofline_s=None if first.step_tokens.differ else first.work.get("roofline_s"),
    )


def work_of(run: RunFolder, may_differ: Sequence[str] = ()) -> dict:
    """Returns the settings that define the work, by flag."""
    skipped = (*NOT_WORK, *may_differ)
    return {
        flag: value
        for flag, value in flatten(run.settings).items()
        if flag not in skipped and not flag.startswith(NOT_WORK_SECTIONS)
    }


def read_external(path: str | Path) -> list[Side]:
    """Reads one or two sides from a TOML file of published figures.

    docs/track3_record44.toml is an example with all keys.

    Raises:
        ValueError: a key is missing, unknown or of the wrong type; the message names it.
    """
    found = read_toml(path, "--external")
    sides = found.get("side")
    if not isinstance(sides, list) or not 1 <= len(sides) <= 2:
        raise ValueError(f"--external {path} must have one or two [[side]] tables.")
    return [_external(side, f"{path}: side {i + 1}") for i, side in enumerate(sides)]


def _external(values: Any, where: str) -> Side:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a table; got {str(values)[:80]}.")
    for key, value in values.items():
        kind = EXTERNAL.get(key)
        if kind is None:
            raise ValueError(f"{where} has no key {key!r}; it has {', '.join(EXTERNAL)}.")
        if fault := _find_fault(key, kind, value):
            raise ValueError(f"{where}: {key} must be {fault}; got {str(value)[:80]}.")
    missing = [key for key in list(EXTERNAL)[:REQUIRED] if key not in values]
    if missing:
        raise ValueError(f"{where} must have {', '.join(missing)}.")
    if ("clock_s" in values) == ("step_time_s" in values):
        raise ValueError(f"{where} must have either step_time_s or clock_s.")
    times, what = values.get("step_time_s"), "published step times"  # both have been checked
    if times is None:
        clock = values["clock_s"]
        pairs = list(zip(clock, clock[1:], strict=False))  # of (step, seconds since the start)
        spans = {after[0] - before[0] for before, after in pairs}
        if len(spans) != 1:
            raise ValueError(f"{where}: clock_s must have a constant step interval; got {spans}.")
        times = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in pairs]
        what = f"means of {spans.pop()} steps, from published clocks"
    copied = ("name", "device", "devices", "config_hash", "data_fingerprint", "tokens_per_step")
    peaks: Any = {key: values.get(key) for key in PEAKS}
    return Side(
        **{key: values[key] for key in copied},
        device_kind=values["device"],
        settings=None,
        times_s=[times],
        what=what,
        losses=[dict(map(tuple, run)) for run in values.get("loss_nats", [])],
        **peaks,
    )


def _find_fault(key: str, kind: type, value: Any) -> str:
    """Returns what the value of an external figure must be, or "" if it is valid."""
    if kind is str:
        return "" if isinstance(value, str) and value.strip() else "a text"
    if kind is int:
        return "" if type(value) is int and 0 < value <= LARGEST else "a positive integer"
    if kind is float:
        return "" if _is_number(value) and value > 0 else f"a positive number up to {LARGEST:g}"
    if not isinstance(value, list) or not value:
        return "a list with an entry or more"
    if key == "step_time_s":
        valid = all(_is_number(time) and time > 0 for time in value)
        return "" if valid else f"positive numbers of seconds, up to {LARGEST:g}"
    if key == "clock_s":
        rising = _are_pairs(value) and len(value) > 1
        rising = rising and all(
            a[0] < b[0] and a[1] < b[1] for a, b in zip(value, value[1:], strict=False)
        )
        return "" if rising else "two or more pairs [step, seconds], both rising"
    valid = all(isinstance(run, list) and run and _are_pairs(run) for run in value)
    return "" if valid else "a list of pairs [step, finite loss] for each run"


def _is_number(value: Any) -> bool:
    """Returns whether a value is a number whose square a float can represent; NaN is not."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def _are_pairs(rows: list) -> bool:
    return all(
        isinstance(row, list) and len(row) == 2 and all(map(_is_number, row)) for row in rows
    )


def with_ceilings(side: Side, path: str | Path) -> Side:
    """Returns the side with the ceilings that `pallas_kernels.bench --out` measured on its device.

    Raises:
        ValueError: the file is not a result of the benchmark, or has another device's results.
    """
    try:
        found = json.loads(Path(path).read_text())
        ceilings = {key: found[key] for key in ("matmul_flops_per_s", "copy_bytes_per_s")}
        device = found["device"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"--ceilings must be a file of `python -m pallas_kernels.bench --out`; got {path}: "
            f"{type(error).__name__} {error}."
        ) from None
    if device not in (side.device_kind, side.device):
        raise ValueError(
            f"--ceilings {path} was measured on {device!r}; {side.name} ran on "
            f"{side.device_kind!r}. Give the file of A first, then that of B."
        )
    if not all(_is_number(value) and value > 0 for value in ceilings.values()):
        raise ValueError(f"--ceilings {path} must have positive numbers; got {ceilings}.")
    return replace(side, **ceilings)
