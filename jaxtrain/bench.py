"""Benchmarks, side by side, with their ratios.

    jaxtrain bench                             # every suite of this processor
    jaxtrain bench --suite=cpu --sizes=s --dtypes=float32 --optimizers=adamw
    jaxtrain bench --suite=optimizer --sizes=124m --dtypes=float32 --rounds=3
    jaxtrain bench --suite=loader --json=loader.jsonl
    jaxtrain bench --suite=gpu --minutes=10    # on a card; --tiny tries it anywhere

Suites of the processor:
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

Suites of GPUs, by name alone:
    gpu       our step at 124M to 1.4B against the compiled PyTorch twin (extra `crosscheck`), each
              in processes of its own, at the same tokens a step, in its own best micro-batch: step
              p50 and p95, tokens/s, MFU by both conventions, the optimizer's and the host's share,
              compile time, time to first step, memory against the compiler's and the formula's
              prediction, clocks; then XLA options that jaxtrain/ops/tuning.py lists as assumed,
              one by one. The suites are planned to end inside --minutes, and rows that they do not
              reach are named. A row is on disk as soon as it is measured. --trace=DIR keeps a
              profile of each of our steps.
              Steps are shortened to 1.5 s, which shows more of the optimizer: figures `at 524288`
              are computed for a step of so many tokens, from the optimizer's part and the rest.
              The optimizer's part of the twin is timed in its steps; ours, inside one program,
              as a program of its own, launched one ahead, with the range of the middle eight
              tenths. The host's share is CPU time of the thread that launches, at most its work
    judge     300 steps of gpt_124m on real text (--text, --shards) beside the twin, from the same
              weights and batches, three seeds: our gap to it must be within the seeds' own noise
    scaling   data-parallel and fsdp, weak and strong, on all local devices against the ideal, and
              what of the communication nothing hides. Without a GPU on 8 virtual devices: a trial

How to read those of the processor: variants of a comparison take turns in one process, on fresh
data, after two calls that are not counted; figures are medians, and compilation stands apart under
`first s`. `cpu ms` are the process's CPU milliseconds, which hardly move when the machine is busy.
`others` is what other processes took of the machine meanwhile: where it is not near 0 %, wall times
are not to be trusted.
"""

import argparse
import functools
import importlib
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from jaxtrain.benchmarks import (
    cpu_training,
    data_loading,
    dispatch,
    first_step,
    gpu_results,
    gpu_training,
    loss_parity,
    metrics_overhead,
    optimizer,
    processor,
    scaling,
)
from jaxtrain.config.commands import rewrite_commands
from jaxtrain.file_errors import exit_on_file_error
from jaxtrain.files import strict_json, write_atomic
from pallas_kernels.arguments import Parser

ROUNDS = {"cpu": 15, "dispatch": 200, "loader": 15, "startup": 3, "metrics": 15, "optimizer": 7}

# What a suite has to choose from; what is not given is all of it, but for ON_REQUEST.
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
        "sizes": gpu_training.SIZES,
        "optimizers": gpu_training.OPTIMIZERS,
        "variants": gpu_training.VARIANTS,
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
        importlib.import_module("jaxtrain.crosscheck.torch_model")
    except ImportError as error:
        sys.exit(f"error: {error} Or leave torch out: --variants={without}.")


def _cpu(args, rounds):
    """Rows and text of suite cpu, size by size."""
    chosen = _chosen(args, "cpu")
    sizes = chosen.pop("sizes")
    if set(chosen["variants"]) != {"jaxtrain"}:
        _need_twin(without="jaxtrain")
    peaks = processor.gemm_peaks()
    row = {"suite": "machine", "gemm_peak_flops_per_s": peaks}
    yield [row], processor.peaks_text(peaks)
    for size in sizes:
        rows = cpu_training.run(size, peaks, rounds, args.most, **chosen)
        yield rows + cpu_training.ratios(rows), cpu_training.show(rows)


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


def _each(suite, line, args, rounds):
    """Rows and text of a suite of GPUs, row by row."""
    del rounds
    chosen = vars(args) | (_chosen(args, "gpu") if suite is gpu_training else {})
    if suite is not scaling:
        gpu_training.need_gpu(args.tiny)  # before a package is asked for that would not help
    if suite is loss_parity or suite is gpu_training and "pytorch" in chosen["variants"]:
        _need_twin(without="jaxtrain")
    for row in suite.run(argparse.Namespace(**chosen)):
        yield [row], line(row)


OF_GPUS = {
    "gpu": functools.partial(_each, gpu_training, gpu_results.line),
    "judge": functools.partial(_each, loss_parity, loss_parity.line),
    "scaling": functools.partial(_each, scaling, scaling.line),
}
OF_CPU = {
    "cpu": _cpu,
    "dispatch": functools.partial(_simple, dispatch),
    "loader": functools.partial(_simple, data_loading),
    "startup": functools.partial(_simple, first_step),
    "metrics": functools.partial(_simple, metrics_overhead),
    "optimizer": _optimizer,
}
SUITES = OF_CPU | OF_GPUS


def _check_chosen(parser, args):
    """A name that a suite to run does not have is an error, in the suite's own words."""
    asked = OF_CPU if args.suite == "all" else [args.suite]
    for suite in filter(CHOICES.__contains__, asked):
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


def parse(argv=None, prog="python -m jaxtrain.bench") -> argparse.Namespace:
    parser = Parser(prog, rewrite_commands(__doc__, prog))
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
    add = parser.add_argument_group("of the suites of GPUs").add_argument
    add("--minutes", type=_positive(float), default=10.0, help="to plan for; default: 10")
    add("--tiny", action="store_true", help="small shapes on any processor: a trial of the path")
    add("--trace", metavar="DIR", default="", help="gpu: profile two of our steps a size into DIR")
    add("--text", metavar="PATH", help="judge: text to train on; default: Python's own library")
    add("--shards", metavar="PATH", help="judge: token shards to train on")
    text = "seconds after which a slow variant sits the later rounds out; default: 60"
    only.add_argument("--most", type=_positive(float), default=60.0, metavar="S", help=text)
    args = parser.parse_args(argv)
    _check_chosen(parser, args)
    return args


def provenance() -> dict:
    """The command, when it was given, and the commit of this code, where git knows it."""
    here = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"command": sys.argv, "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"} | {
        "commit": commit
    }


@exit_on_file_error()
def main(argv=None, prog="python -m jaxtrain.bench") -> None:
    args = parse(argv, prog)
    about = processor.describe()
    print(processor.header(about), flush=True)
    rows = [about | provenance()]
    if args.suite in OF_GPUS and not args.json:
        args.json = f"bench_{args.suite}_{datetime.now():%Y%m%d_%H%M%S}.jsonl"
        print(f"rows      {args.json}", flush=True)
    try:
        for name in OF_CPU if args.suite == "all" else [args.suite]:
            for new, text in SUITES[name](args, args.rounds or ROUNDS.get(name)):
                rows += new
                if args.json:  # at once: a run that is cut keeps what it has measured
                    write_atomic(args.json, "".join(strict_json(row) + "\n" for row in rows))
                print(text if name in OF_GPUS else f"\n== {name}\n{text}", flush=True)
    except gpu_training.NoGpu as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
