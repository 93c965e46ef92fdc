"""Benchmarks, side by side: medians of interleaved turns in one process, with their ratios.

    python -m jaxtrain.bench                                  every suite
    python -m jaxtrain.bench --suite=cpu --sizes=s --dtypes=float32 --optimizers=adamw
    python -m jaxtrain.bench --suite=loader --json=loader.jsonl

Suites:
    cpu       training steps against the PyTorch twin, eager and compiled (needs the extra
              `crosscheck`); model FLOP/s are 6N + full attention, set against the GEMM peak
    dispatch  Python time of a step at 24 layers: target below 1 ms
    loader    tokens/s from a 100M-token shard: target 20M; first batch: target below 1 s
    startup   process start to first step, without and with the compile cache: target half

How to read them: every variant of a comparison takes its turns among the others, on fresh data,
after two calls that are not counted; compilation stands apart under `first s`. `cpu ms` are the
process's CPU milliseconds, which hardly move when the machine is shared. `others` is what other
processes took of the machine meanwhile: where it is not near 0 %, wall times are not to be trusted.
"""

import argparse
import functools
import importlib
import sys

from jaxtrain.benchmarks import dispatch, loader, machine, startup, training
from jaxtrain.files import strict_json, write_atomic

ROUNDS = {"cpu": 15, "dispatch": 200, "loader": 15, "startup": 3}


def _cpu(args, rounds):
    """Rows and text of suite cpu, size by size."""
    if set(args.variants) != {"jaxtrain"}:
        try:
            importlib.import_module("jaxtrain.crosscheck.twin")
        except ImportError as error:  # now, not after minutes of measuring
            sys.exit(f"error: {error} Or leave torch out: --variants=jaxtrain.")
    peaks = machine.gemm_peaks()
    row = {"suite": "machine", "gemm_peak_flops_per_s": peaks}
    yield [row], machine.peaks_text(peaks)
    for size in args.sizes:
        rows = training.run(
            size, peaks, rounds, args.most, args.dtypes, args.optimizers, args.variants
        )
        yield rows + training.ratios(rows), training.show(rows)


def _simple(suite, args, rounds):
    del args
    rows = suite.run(rounds)
    yield rows, suite.show(rows)


SUITES = {
    "cpu": _cpu,
    "dispatch": functools.partial(_simple, dispatch),
    "loader": functools.partial(_simple, loader),
    "startup": functools.partial(_simple, startup),
}


def _listed(allowed):
    """argparse type: comma-separated names out of `allowed`."""

    def parse(text):
        names = text.split(",")
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"must be of {', '.join(allowed)}, separated by commas; got {', '.join(unknown)}"
            )
        return names

    return parse


def _positive(kind):
    def parse(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be positive; got {text}")
        return value

    return parse


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxtrain.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", choices=(*SUITES, "all"), default="all", help="default: all")
    rounds = ", ".join(f"{name} {count}" for name, count in ROUNDS.items())
    add("--rounds", type=_positive(int), help=f"turns of each variant; default: {rounds}")
    add("--json", metavar="PATH", help="write every row as a line of JSON")
    only = parser.add_argument_group("suite cpu only; comma-separated, default: all of them")
    choices = {
        "sizes": training.SIZES,
        "dtypes": training.DTYPES,
        "optimizers": training.OPTIMIZERS,
        "variants": training.VARIANTS,
    }
    for name, allowed in choices.items():
        text = ", ".join(allowed)
        only.add_argument(f"--{name}", type=_listed(allowed), default=list(allowed), help=text)
    text = "seconds after which a slow variant sits the later rounds out; default: 60"
    only.add_argument("--most", type=_positive(float), default=60.0, metavar="S", help=text)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    about = machine.describe()
    print(machine.header(about), flush=True)
    rows = [about]
    for name in SUITES if args.suite == "all" else [args.suite]:
        rounds = args.rounds or ROUNDS[name]
        for new, text in SUITES[name](args, rounds):
            rows += new
            print(f"\n== {name}\n{text}", flush=True)
        if args.json:  # after each suite: what is measured is kept
            write_atomic(args.json, "".join(strict_json(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
