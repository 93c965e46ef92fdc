"""Benchmarks, side by side: medians of interleaved turns in one process, with their ratios.

    python -m jaxtrain.bench                                  every suite
    python -m jaxtrain.bench --suite=cpu --sizes=s --dtypes=float32 --optimizers=adamw
    python -m jaxtrain.bench --suite=optimizer --sizes=124m --dtypes=float32 --rounds=3
    python -m jaxtrain.bench --suite=loader --json=loader.jsonl

Suites:
    cpu       training steps against the PyTorch twin, eager and compiled (needs the extra
              `crosscheck`); model FLOP/s are 6N + full attention, set against the GEMM peak
    dispatch  Python time of a step at 24 layers: target below 1 ms
    loader    tokens/s from a 100M-token shard: target 20M; first batch: target below 1 s
    startup   process start to first step, without and with the compile cache: target half
    metrics   what measuring a step costs the thread that trains, as a share of the step: target
              below 0.5 %
    optimizer one update of all parameters by Muon and AdamW, against optax.contrib.muon (target
              2x) and torch.optim.Muon (1x), and its temporary memory (1.5 of the largest stack).
              --sizes=124m is on request: minutes and 10 GB. Where the processor has no bf16
              products, torch's bfloat16 takes 25 times as long: --dtypes=float32 leaves it out

How to read them: every variant of a comparison takes its turns among the others, on fresh data,
after two calls that are not counted; compilation stands apart under `first s`. `cpu ms` are the
process's CPU milliseconds, which hardly move when the machine is shared. `others` is what other
processes took of the machine meanwhile: where it is not near 0 %, wall times are not to be trusted.
"""

import argparse
import functools
import importlib
import sys

from jaxtrain.benchmarks import dispatch, loader, machine, metrics, optimizer, startup, training
from jaxtrain.files import strict_json, write_atomic

ROUNDS = {"cpu": 15, "dispatch": 200, "loader": 15, "startup": 3, "metrics": 15, "optimizer": 7}

# What a suite has to choose from; what is not given is all of it, but for ON_REQUEST.
CHOICES = {
    "cpu": {
        "sizes": tuple(training.SIZES),
        "dtypes": training.DTYPES,
        "optimizers": training.OPTIMIZERS,
        "variants": training.VARIANTS,
    },
    "optimizer": {
        "sizes": tuple(optimizer.SIZES),
        "dtypes": optimizer.DTYPES,
        "variants": optimizer.VARIANTS,
    },
}
ON_REQUEST = ("124m",)


def _chosen(args, suite) -> dict[str, list]:
    """{flag: names} of a suite."""
    default = lambda names: [name for name in names if name not in ON_REQUEST]
    return {flag: getattr(args, flag) or default(CHOICES[suite][flag]) for flag in CHOICES[suite]}


def _need_twin(without):
    """Exits where torch is missing: now, not after minutes of measuring."""
    try:
        importlib.import_module("jaxtrain.crosscheck.twin")
    except ImportError as error:
        sys.exit(f"error: {error} Or leave torch out: --variants={without}.")


def _cpu(args, rounds):
    """Rows and text of suite cpu, size by size."""
    chosen = _chosen(args, "cpu")
    sizes = chosen.pop("sizes")
    if set(chosen["variants"]) != {"jaxtrain"}:
        _need_twin(without="jaxtrain")
    peaks = machine.gemm_peaks()
    row = {"suite": "machine", "gemm_peak_flops_per_s": peaks}
    yield [row], machine.peaks_text(peaks)
    for size in sizes:
        rows = training.run(size, peaks, rounds, args.most, **chosen)
        yield rows + training.ratios(rows), training.show(rows)


def _optimizer(args, rounds):
    """Rows and text of suite optimizer, size by size."""
    chosen = _chosen(args, "optimizer")
    sizes = chosen.pop("sizes")
    if "torch" in chosen["variants"]:
        _need_twin(without="jaxtrain,optax")
    for size in sizes:
        rows = optimizer.run(size, rounds, args.most, **chosen)
        yield rows + optimizer.ratios(rows), optimizer.show(rows)


def _simple(suite, args, rounds):
    del args
    rows = suite.run(rounds)
    yield rows, suite.show(rows)


SUITES = {
    "cpu": _cpu,
    "dispatch": functools.partial(_simple, dispatch),
    "loader": functools.partial(_simple, loader),
    "startup": functools.partial(_simple, startup),
    "metrics": functools.partial(_simple, metrics),
    "optimizer": _optimizer,
}


def _check_chosen(parser, args):
    """A name that a suite to run does not have is an error, in the suite's own words."""
    for suite in CHOICES if args.suite == "all" else CHOICES.keys() & {args.suite}:
        for flag, allowed in CHOICES[suite].items():
            unknown = [name for name in getattr(args, flag) or () if name not in allowed]
            if unknown:
                parser.error(
                    f"--{flag} of suite {suite} must be of {', '.join(allowed)}, separated by "
                    f"commas; got {', '.join(unknown)}."
                )


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
    only = parser.add_argument_group("of some suites; comma-separated, default: all but 124m")
    for flag in CHOICES["cpu"]:
        text = "; ".join(
            f"{name}: {', '.join(c[flag])}" for name, c in CHOICES.items() if flag in c
        )
        only.add_argument(f"--{flag}", type=lambda text: text.split(","), help=text)
    text = "seconds after which a slow variant sits the later rounds out; default: 60"
    only.add_argument("--most", type=_positive(float), default=60.0, metavar="S", help=text)
    args = parser.parse_args(argv)
    _check_chosen(parser, args)
    return args


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
