"""The tables of `python -m jaxtrain.bench`: every suite, its rounds and the values of its flags."""

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxtrain.benchmarks import (
    cpu_training,
    data_loading,
    dispatch,
    first_step,
    gpu_items,
    gpu_results,
    gpu_training,
    loss_parity,
    metrics_overhead,
    optimizer,
    processor,
    scaling,
    transfer,
)
from jaxtrain.files import write_atomic

ROUNDS = {"cpu": 15, "dispatch": 200, "loader": 15, "startup": 3, "metrics": 15, "optimizer": 7}
ROUNDS |= {"transfer": 1}
# The values that a suite's flags accept. By default a flag has all of them except ON_REQUEST.
CHOICES = {
    "cpu": {
        "sizes": tuple(cpu_training.SIZES),
        "dtypes": cpu_training.DTYPES,
        "optimizers": cpu_training.OPTIMIZERS,
        "variants": cpu_training.VARIANTS,
    },
    "optimizer": {
        "sizes": tuple(optimizer.SIZES),
        "dtypes": optimizer.DTYPES,
        "variants": optimizer.VARIANTS,
    },
    "gpu": {
        "sizes": gpu_items.SIZES,
        "optimizers": gpu_items.OPTIMIZERS,
        "variants": gpu_items.VARIANTS,
    },
    "transfer": {
        "sizes": tuple(transfer.SERIES),
        "optimizers": transfer.OPTIMIZERS,
        "variants": transfer.PARAMETRISATIONS,
    },
}
ON_REQUEST = ("124m",)

Results = Iterator[tuple[list[dict[str, Any]], str]]  # rows for JSON, and the same as text


def _chosen(args: argparse.Namespace, suite: str) -> dict[str, list[str]]:
    """Returns {flag: names} of a suite, with its defaults."""
    return {
        flag: getattr(args, flag) or [name for name in names if name not in ON_REQUEST]
        for flag, names in CHOICES[suite].items()
    }


def _require_torch(variants_without: str) -> None:
    """Exits if torch is missing, so that this is not found out after minutes of measuring."""
    try:
        importlib.import_module("jaxtrain.crosscheck.torch_model")
    except ImportError as error:
        sys.exit(f"error: {error} Or leave torch out: --variants={variants_without}.")


def _run_cpu(args: argparse.Namespace, rounds: int) -> Results:
    chosen = _chosen(args, "cpu")
    if set(chosen["variants"]) != {"jaxtrain"}:
        _require_torch(variants_without="jaxtrain")
    peaks = processor.gemm_peaks()
    row = {"suite": "machine", "gemm_peak_flops_per_s": peaks}
    yield [row], processor.peaks_text(peaks)
    for size in chosen.pop("sizes"):
        rows = cpu_training.measure(size, peaks, rounds, args.most, **chosen)
        yield rows + cpu_training.ratios(rows), cpu_training.tables(rows)


def _run_optimizer(args: argparse.Namespace, rounds: int) -> Results:
    chosen = _chosen(args, "optimizer")
    if "torch" in chosen["variants"]:
        _require_torch(variants_without="jaxtrain,optax")
    for size in chosen.pop("sizes"):
        rows = optimizer.measure(size, rounds, args.most, **chosen)
        yield rows + optimizer.ratios(rows), optimizer.tables(rows)


def _run_simple(suite: ModuleType, args: argparse.Namespace, rounds: int) -> Results:
    """Runs a processor suite that takes no additional flags."""
    del args
    rows = suite.measure(rounds)
    yield rows, suite.tables(rows)


def _run_transfer(args: argparse.Namespace, rounds: int) -> Results:
    """Runs the suite row by row, and draws the rows so far after each verdict."""
    chosen = argparse.Namespace(**vars(args) | _chosen(args, "transfer"))
    rows = []
    for row in transfer.measure(chosen, rounds):
        rows.append(row)
        if row["case"] == "verdict":
            write_atomic(Path(args.json).with_suffix(".png"), transfer.draw(rows))
        yield [row], transfer.describe(row)


def _run_gpu_suite(
    suite: ModuleType,
    describe: Callable[[dict[str, Any]], str],
    args: argparse.Namespace,
    rounds: int | None,
) -> Results:
    """Runs a suite for GPUs, row by row."""
    del rounds
    chosen = vars(args) | (_chosen(args, "gpu") if suite is gpu_training else {})
    if suite is not scaling:
        gpu_training.check_gpu(args.tiny)  # first, as installing torch would not help
    if suite is loss_parity or suite is gpu_training and "pytorch" in chosen["variants"]:
        _require_torch(variants_without="jaxtrain")
    for row in suite.measure(argparse.Namespace(**chosen)):
        yield [row], describe(row)


NAMED_SUITES = {  # run only if named, and print each row as soon as it is measured
    "gpu": functools.partial(_run_gpu_suite, gpu_training, gpu_results.describe),
    "judge": functools.partial(_run_gpu_suite, loss_parity, loss_parity.describe),
    "scaling": functools.partial(_run_gpu_suite, scaling, scaling.describe),
    "transfer": _run_transfer,
}
CPU_SUITES = {
    "cpu": _run_cpu,
    "dispatch": functools.partial(_run_simple, dispatch),
    "loader": functools.partial(_run_simple, data_loading),
    "startup": functools.partial(_run_simple, first_step),
    "metrics": functools.partial(_run_simple, metrics_overhead),
    "optimizer": _run_optimizer,
}
SUITES = CPU_SUITES | NAMED_SUITES
