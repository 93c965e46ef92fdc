"""Checks that a run's files have what reports read: a job's host may have sent anything."""

import re
from pathlib import Path
from typing import Any, TypeGuard

from launch.answers import Range, mismatch
from launch.report.json_files import parse_numbers, read_json, read_json_lines
from launch.terminal import warn

MOST = 1 << 53  # of counts; each is exact as a float
SIZE = Range(int, 1, MOST)
RATE = Range(float, 1e-12, 1e30)
SECONDS = Range(float, -1e12, 1e12)  # what is left of a sum may be slightly negative
LINE = re.compile(r"[^\x00-\x1f\x7f-\x9f]{0,1000}")  # becomes part of a line of ours
LARGEST = 1e150  # the square of a larger number is no float

CHIP = {
    "name": LINE,
    "hbm_bytes": RATE,
    "hbm_bytes_per_s": RATE,
    "peak_flops_per_s": {str: (RATE, None)},
}
CONFIG = {
    "config": {
        "steps": SIZE,
        "log_every": SIZE,
        "accumulation?": SIZE,
        "model": {"dtype": str},
        "data": {"batch": SIZE, "seq_len": SIZE},
    },
    "config_hash": LINE,
    "versions": {str: str},
    "device": LINE,
    "devices": SIZE,
    "chip?": (None, CHIP),
    "hosts?": (SIZE, [str], {str: str}),
    "processes?": SIZE,
    "routes?": (None, {str: str}),
    "work?": (
        None,
        {
            "tokens_per_step?": SIZE,
            "batch_phases?": (None, [{"step": SIZE, "tokens": SIZE}]),
            "roofline_s?": (None, RATE),
            "params?": (None, SIZE),
        },
    ),
    "data?": {"fingerprint": LINE},
}
SUMMARY = {
    "step?": Range(int, 0, MOST),
    "stopped_by?": (None, LINE),
    "lost_s?": (None, {str: SECONDS}),
    "outliers?": (None, {str: Range(int, 0, MOST)}),
    "perf/wall_s?": (None, SECONDS),
    "perf/goodput?": (None, Range(float, 0, 10)),
}


def check_config(path: Path, config: Any) -> None:
    """Raises ValueError if config.json does not have what every run writes."""
    if problem := mismatch(config, CONFIG, "config.json"):
        raise ValueError(
            f"{path} must contain a run's config and data, but {problem}. "
            "Start the training command again, which rewrites it."
        )


def read_summary(path: Path) -> dict:
    """Returns summary.json, or {} and prints a warning if it is damaged: no other file needs it."""
    try:
        summary = parse_numbers(read_json(path) or {})
    except (ValueError, AttributeError):
        summary = None
    if mismatch(summary, SUMMARY, "summary.json"):
        warn(f"warning: {path} is not a run's summary, so it is ignored")
        return {}
    return summary or {}


def read_records(path: Path) -> list[dict]:
    """Returns the records of a JSON-lines file, each with its step; only an event may lack one.

    Raises:
        ValueError: the file is damaged; the message names the line.
    """
    records = read_json_lines(path)
    for number, record in enumerate(records, 1):
        step = record.get("step")
        valid = type(step) is int and 0 <= step <= MOST
        if not valid and not (step is None and "event" in record):
            raise ValueError(f"{path}, line {number} must have a step. Remove it.")
    return records


def is_number(value: Any) -> TypeGuard[int | float]:
    """Returns whether a record's value is a number that figures can be computed from."""
    return type(value) in (int, float) and abs(value) <= LARGEST
