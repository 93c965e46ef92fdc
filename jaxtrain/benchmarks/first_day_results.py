"""Reads the result files of suite first-day: what is measured, what is wrong and what is left."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.benchmarks.gpu_results import describe
from jaxtrain.benchmarks.timing import target_verdict
from pallas_kernels.bench_results import OURS, best_of
from pallas_kernels.result_files import lock_file
from pallas_kernels.targets import Target

Row = dict[str, Any]
RECORD = "first_day.json"  # what each stage has done
TOP_CAUSES = 6  # of a profile, to print
INCOMPLETE = ("incomplete", "no_trace")  # reasons why a measured row has not all its figures


def read_rows(path: Path, lines: bool | None = None) -> list[Row]:
    """Returns the rows of a result: the lines of a .jsonl file, or one row of a .json file.

    Args:
        lines: whether each line is a row; default: if the file's name ends in .jsonl.

    Raises:
        OSError: the file is missing.
        ValueError: it is not JSON, or has other values than JSON objects.
    """
    lines = path.suffix == ".jsonl" if lines is None else lines
    try:
        text = path.read_text()
        rows = [json.loads(row) for row in (text.splitlines() if lines else [text])]
    except ValueError as error:  # neither JSON nor, possibly, text
        raise ValueError(f"{path} must have JSON objects; got {error}") from None
    if other := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"{path} must have JSON objects; got {str(other[0])[:80]}")
    return rows


class FirstDayError(ValueError):
    """A flag of the suite does not fit the folder, the card or the stages."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks a folder for the block. Raises FirstDayError if another call of the suite has it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_file(folder / RECORD))
        except BlockingIOError:
            text = f"--out {folder} is in use by another call. Wait for its end."
            raise FirstDayError(text) from None
        yield


def read_record(folder: Path) -> dict[str, Any]:
    """Returns the record of a folder of the suite.

    Raises:
        FirstDayError: the folder has none, or a damaged one.
    """
    try:
        [record] = read_rows(folder / RECORD)
        states = [entry["state"] for entry in record["stages"].values()]
        if {type(value) for value in (*states, record["card"])} - {str}:
            raise ValueError(f"card={record['card']}, states={states}")
        return record | {"tiny": bool(record["tiny"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FirstDayError(
            f"--out must be a folder of suite first-day; got {folder / RECORD}: "
            f"{type(error).__name__} {error}. Set another --out."
        ) from None


def row_name(row: Row) -> str:
    """Returns the name of a row of suite gpu or of the tests; "" for other rows."""
    parts = [str(row[key]) for key in ("test", "case", "variant", "what") if row.get(key)]
    return " ".join([*parts, "half"] if row.get("half") else parts)


def contests(rows: Sequence[Row]) -> dict[str, Row]:
    """Returns {contest: its result} of the kernels' results, as pallas_kernels.bench writes it."""
    return {name: value for row in rows for name, value in row.get("contests", {}).items()}


def _errors(value: Any, name: str) -> Iterator[str]:
    """Yields every entry `error` in nested objects, with the names that lead to it."""
    if isinstance(value, dict) and value.get("error"):
        yield f"{name}: {value['error']}" if name else str(value["error"])
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _errors(entry, f"{name}, {key}" if name else key)


def find_problems(rows: Sequence[Row]) -> list[str]:
    """Returns the errors in a result, without those of rows that the next slice measures again.

    An incomplete row is an error. A contest is an error if it was not finished or if a body of
    our kernel is wrong or failed, but not if a rival is missing.
    """
    found = []
    for row in rows:
        if not row.get("unfinished"):
            own = {key: value for key, value in row.items() if key != "contests"}
            found += _errors(own, row_name(row))
            found += [f"{row_name(row)}: {row[key]}" for key in INCOMPLETE if row.get(key)]
    for name, result in contests(rows).items():
        found += [f"{name}: {result[key]}" for key in ("error", "tuning_error") if result.get(key)]
        failed = {k: v for k, v in result.get("contestants", {}).items() if isinstance(v, str)}
        found += [f"{name}, {body}: {failed[body]}" for body in OURS if body in failed]
    return found


def find_left(rows: Sequence[Row]) -> list[str]:
    """Returns what a stage has not measured yet: rows marked `unfinished`, names in `left`."""
    marked = [row_name(row) or "a row" for row in rows if row.get("unfinished")]
    return marked + [str(name) for row in rows for name in row.get("left", ())]


def ceilings_figure(row: Row) -> str:
    """Returns what a plain product and a plain copy reach on the card."""
    return (
        f"product {row['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s, copy "
        f"{row['copy_bytes_per_s'] / 1e9:.1f} GB/s"
    )


def _summarize_machine(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        lines += [f"{row['device']}: {versions}", f"clocks as found: {row['clocks']}"]
        lines.append(f"ceilings: {ceilings_figure(row)}")
    return lines


def _summarize_tests(rows: Sequence[Row]) -> list[str]:
    counts = Counter(row["outcome"] for row in rows if row.get("outcome"))
    return [", ".join(f"{count} {outcome}" for outcome, count in counts.items())] if counts else []


def kernel_figure(result: Row, trial: bool, target: Target | None = None) -> str:
    """Returns our kernel's time in a contest; "" if no correct kernel was timed.

    Except in a trial, it is compared with the contest's target and with the fastest rival.
    """
    ours, timing = best_of(result.get("contestants", {}), lambda name: name in OURS)
    rival, other = best_of(result.get("contestants", {}), lambda name: name not in OURS)
    if timing is None:
        return ""
    text = f"{ours} {1e6 * timing['median_s']:.4g} us"
    if target and not trial:
        target_us = round(1e6 * target.serial_s)
        text += f" ({target_verdict(1e6 * timing['median_s'], target_us, at_most=True)})"
    if other and not trial:
        ratio = other["median_s"] / timing["median_s"]
        text += f", {ratio:.2f}x as fast as {rival} ({1e6 * other['median_s']:.4g} us)"
    return text


def _summarize_kernels(rows: Sequence[Row]) -> list[str]:
    trial = any(row.get("tiny") or row.get("trial") for row in rows)
    lines = []
    for name, result in contests(rows).items():
        figure = kernel_figure(result, trial) or "no correct kernel was timed"
        lines.append(f"{name}: {figure if result.get('done') else 'not finished'}")
    return lines


def _summarize_training(rows: Sequence[Row]) -> list[str]:
    return [describe(row) for row in rows if row.get("suite") == "gpu" and "error" not in row]


def _summarize_plan(rows: Sequence[Row]) -> list[str]:
    lines = []
    for plan in rows:
        for row in plan["rows"]:
            ms = {name: f"{1e3 * row[f'{name}_s']:.1f}" for name in ("measured", "bound")}
            calibrated_s = row.get("calibrated_s")
            fitted = "" if calibrated_s is None else f", calibrated {1e3 * calibrated_s:.1f}"
            peaks = [row["measured_bytes"], row["planned_on_card_bytes"], row["planned_bytes"]]
            gib = ["unknown" if peak is None else f"{peak / 2**30:.1f}" for peak in peaks]
            lines.append(
                f"{row['case']}: {ms['measured']} ms, bound {ms['bound']}{fitted}; peak {gib[0]} "
                f"GiB, compiled {gib[1]}, planned {gib[2]}"
            )
        lines += [f"{plan['chip']}: {plan['calibration']}"] if "calibration" in plan else []
    return lines


def profile_figure(row: Row) -> str:
    """Returns the length of a trace, the device's idle share and the shares of the top causes."""
    causes = list(row["by_cause_s"].items())[:TOP_CAUSES]
    total_s = sum(row["by_cause_s"].values())
    shares = "; ".join(f"{cause} {seconds / total_s:.1%}" for cause, seconds in causes)
    idle = row["idle_s"] / row["span_s"]
    return f"{1e3 * row['span_s']:.1f} ms, {idle:.1%} idle: {shares}"


def _summarize_profile(rows: Sequence[Row]) -> list[str]:
    return [f"{row['trace']}: {profile_figure(row)}" for row in rows]


SUMMARIES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "machine": _summarize_machine,
    "tests": _summarize_tests,
    "kernels": _summarize_kernels,
    "tune": _summarize_kernels,
    "training": _summarize_training,
    "plan": _summarize_plan,
    "profile": _summarize_profile,
}


def summarize(stage: str, rows: Sequence[Row]) -> list[str]:
    """Returns a stage's figures as lines; a damaged result is a line too."""
    default = lambda rows: [f"{len(rows)} rows"] if rows else []
    try:
        return SUMMARIES.get(stage, default)(rows)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"its result has another form than expected: {type(error).__name__} {error}"]
