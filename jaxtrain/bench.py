"""Times jaxtrain against PyTorch, optax and the machine's own limits.

    jaxtrain bench                             # every suite for the processor
    jaxtrain bench --suite=cpu --sizes=s --dtypes=float32 --optimizers=adamw
    jaxtrain bench --suite=optimizer --sizes=124m --dtypes=float32 --rounds=3
    jaxtrain bench --suite=loader --json=loader.jsonl
    jaxtrain bench --suite=gpu --minutes=10    # on a GPU; --tiny tests the suite anywhere
    jaxtrain bench --suite=first-day --minutes=40 --out=DIR    # on a new card; see below
    jaxtrain bench --suite=first-day --minutes=15 --stages=machine,training:9,kernels --out=DIR

Suites for the processor, which run by default:
    cpu       training steps against PyTorch, eager and compiled (needs the extra `crosscheck`), as
              FLOP/s of the model (6N + full attention) and as a share of the GEMM peak
    dispatch  the time that Python takes to launch a step with 24 layers: target below 1 ms
    loader    tokens/s from a shard of 100M tokens: target 20M; first batch: target below 1 s
    startup   process start to first step, with and without a filled cache: target half the time
    metrics   time that measuring a step costs the training thread: target below 0.5 % of the step
    optimizer one update of all parameters with Muon and AdamW, against optax.contrib.muon (target
              2x) and torch.optim.Muon (1x), and its temporary memory (target 1.5 times the largest
              stack). --sizes=124m takes minutes and 10 GB and runs only if named. On processors
              without bf16 instructions torch's bfloat16 is 25 times slower; --dtypes=float32
              leaves it out

Suites for GPUs, which run only if named:
    gpu       our step at 124M to 1.4B against compiled PyTorch (extra `crosscheck`). Each runs in
              its own process, with the same tokens per step. The first row of each model has the
              largest micro-batch that fits; after every model has a row, half of that is tried, and
              later rows use the faster one. Measures step time (p50, p95), tokens/s, MFU by two
              conventions, the shares of optimizer and host, compilation time, time to first step,
              memory used and predicted. Then tries the XLA options that jaxtrain/ops/tuning.py
              lists as assumed, one at a time. It stays within --minutes and lists the rows that it
              did not reach. Each row is stored as soon as it is measured.
              --trace=DIR stores profiles of our steps. Steps are shortened to 1.5 s, which makes
              the optimizer's share larger than in training. Figures `at 524288` are computed for a
              step of that many tokens. PyTorch's optimizer is timed inside its steps, ours as a
              separate program; its range is the 10th to 90th percentile. The host's share is the
              CPU time of the launching thread, an upper bound of its work
    judge     300 steps of gpt_124m on real text (--text, --shards) beside PyTorch, from the same
              weights on the same batches, with three seeds: the difference between the losses must
              be within the spread over seeds
    scaling   data-parallel and fsdp, weak and strong, on all local devices against the ideal, and
              the communication that computation does not hide. Without a GPU it only tests the
              suite, on 8 virtual devices

    first-day the whole first day on a card, in slices: --minutes is the time of one, and a second
              call with the same --out continues where the first stopped. In this order, or in that
              of --stages: the machine (driver, versions, clocks as found, ceilings), `pytest -m
              gpu`, every kernel beside its rivals, the kernels' tiles, suite gpu with Muon at all
              sizes, two steps' time by cause, and the plan's memory and time beside the measured
              ones (from the last two come the efficiencies that `jaxtrain plan --calibrated`
              reads). Each is a process with a limit, a log and a result in --out; if one hangs or
              crashes, the others still run. Prints a plan of the minutes first, and at its end what
              is measured, what failed and why, what is left, and the command that continues. A
              stage that failed or used all its minutes runs again only if --stages names it;
              --stages=training:9 gives the stage training at most 9 minutes of this call. The last
              two stages need no GPU. A call with --write measures nothing: it writes the results
              into README.md and docs/results.md and copies the tuned tables. Where there is no git
              checkout, JAXTRAIN_COMMIT names the commit

Suites for any device, which run only if named:
    transfer  whether the best learning rate stays the best in wider and deeper models, with
              optim.parametrisation=standard and spectral. --sizes chooses width, depth or both;
              --rounds is the number of seeds. Draws a picture beside its rows. Takes half an hour
              on one core

How to read the tables for the processor: variants take turns in one process, on new data, after two
calls that do not count. Figures are medians over n turns.
    first s   the first call, which compiles
    min       the fastest turn; `of minima` compares the fastest turns
    cpu ms    CPU time of this process, which other processes hardly change
    others    the share of the machine that other processes took. If it is far from 0 %, do not
              trust wall times
"""

import argparse
import functools
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxtrain.benchmarks import (
    first_day,
    first_day_results,
    first_day_tables,
    gpu_training,
    processor,
)
from jaxtrain.benchmarks.first_day_stages import STAGES
from jaxtrain.benchmarks.gpu_results import newest_ratios
from jaxtrain.benchmarks.suites import CHOICES, CPU_SUITES, NAMED_SUITES, ROUNDS, SUITES
from jaxtrain.config.commands import rewrite_commands
from jaxtrain.file_errors import exit_on_file_error
from jaxtrain.files import strict_json, write_atomic
from pallas_kernels.arguments import Parser, positive

FIRST_DAY = "first-day"  # runs other suites and commands as child processes


def _check_choices(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with an error if a flag has a value that a chosen suite does not accept."""
    suites = CPU_SUITES if args.suite == "all" else [args.suite]
    for suite in suites:
        for flag, allowed in CHOICES.get(suite, {}).items():
            unknown = [name for name in getattr(args, flag) or () if name not in allowed]
            if unknown:
                parser.error(
                    f"--{flag} of suite {suite} must be of {', '.join(allowed)}, separated by "
                    f"commas; got {', '.join(unknown)}."
                )


def parse(
    argv: list[str] | None = None, prog: str = "python -m jaxtrain.bench"
) -> argparse.Namespace:
    parser = Parser(prog, rewrite_commands(__doc__ or "", prog))
    add = parser.add_argument
    add(
        "--suite",
        choices=(*SUITES, FIRST_DAY, "all"),
        default="all",
        help="default: all for the processor",
    )
    rounds = ", ".join(f"{name} {count}" for name, count in ROUNDS.items())
    add("--rounds", type=positive(int), help=f"turns of each variant; default: {rounds}")
    add("--json", metavar="PATH", help="write every row as a line of JSON")
    group = parser.add_argument_group("for some suites; comma-separated, default: all but 124m")
    for flag in CHOICES["cpu"]:
        text = "; ".join(
            f"{name}: {', '.join(choices[flag])}"
            for name, choices in CHOICES.items()
            if flag in choices
        )
        group.add_argument(f"--{flag}", type=lambda text: text.split(","), help=text)
    text = "a variant that has taken this many seconds skips the later rounds; default: 60"
    group.add_argument("--most", type=positive(float), default=60.0, metavar="S", help=text)
    add = parser.add_argument_group("for the suites for GPUs").add_argument
    add("--minutes", type=positive(float), default=10.0, help="time to use; default: 10")
    add("--tiny", action="store_true", help="tiny models on any processor, to test the suite")
    add("--out", metavar="DIR", type=Path, help="first-day: folder of its results")
    stages = ", ".join(stage.name for stage in STAGES)
    text = f"first-day: stages to run, in this order, of {stages}; tests:2 gives the stage tests "
    text += "at most 2 minutes of this call; default: all"
    add("--stages", type=lambda text: text.split(","), metavar="A,B", help=text)
    text = "first-day: write the results in --out into README and docs, and the tuned tables"
    add("--write", action="store_true", help=text)
    text = "gpu: keep the finished rows of --json and measure only the others"
    add("--resume", action="store_true", help=text)
    text = "gpu: sequences of a micro-batch, a power of two; default: the most that fit, and half"
    add("--rows", type=positive(int), default=0, help=text)
    text = "gpu: time for the counted steps of a row; default: 15"
    add("--seconds", type=positive(float), default=15.0, metavar="S", help=text)
    text = "gpu: store profiles of two of our steps per size and micro-batch size"
    add("--trace", metavar="DIR", default="", help=text)
    add("--text", metavar="PATH", help="judge: text to train on; default: Python's own library")
    add("--shards", metavar="PATH", help="judge: token shards to train on")
    args = parser.parse_args(argv)
    _check_choices(parser, args)
    if args.resume and not (args.suite == "gpu" and args.json):
        parser.error("--resume needs --suite=gpu and the --json of the call that it continues.")
    if (args.suite == FIRST_DAY) != bool(args.out):
        parser.error("--suite=first-day needs --out=DIR, and no other suite has it.")
    if args.rows & (args.rows - 1):
        parser.error(f"--rows must be a power of two; got {args.rows}.")
    if args.write and args.suite != FIRST_DAY:
        parser.error("--write needs --suite=first-day.")
    return args


def _read_finished(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the measured rows of an earlier call; ratios are computed again from them."""
    path = Path(args.json)
    try:
        rows = first_day_results.read_rows(path, lines=True) if path.exists() else []
    except ValueError as error:
        sys.exit(f"error: --resume must continue the rows of a call's --json; got {error}.")
    if any(bool(row.get("tiny")) != args.tiny for row in rows):
        kinds = ("measurement", "trial") if args.tiny else ("trial", "measurement")
        sys.exit("error: {} is a {}, which a {} cannot continue. Set --json.".format(path, *kinds))
    return [row for row in rows if not row.get("unfinished") and row.get("what") != "ratio"]


def _print_lines(text: str, trial: bool) -> None:
    """Prints a text; every line of a trial says that it is one, so that no figure stands alone."""
    print("\n".join(f"{'trial: ' * trial}{line}" for line in text.split("\n")), flush=True)


@exit_on_file_error()
def main(argv: list[str] | None = None, prog: str = "python -m jaxtrain.bench") -> None:
    args = parse(argv, prog)
    try:
        _run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (gpu_training.NoGpu, first_day.FirstDayError, first_day_tables.TableError) as error:
        sys.exit(f"error: {error}")


def _run(args: argparse.Namespace) -> None:
    """Runs the chosen suites, prints their tables and stores their rows."""
    show = functools.partial(_print_lines, trial=args.tiny)
    if args.write:
        show("\n".join(f"wrote {path}" for path in first_day_tables.write_tables(args.out)))
        return
    about = processor.describe_machine()
    show(processor.machine_text(about))
    if args.suite == FIRST_DAY:
        sys.exit(first_day.run_suite(args, show))
    if args.suite in NAMED_SUITES and not args.json:
        args.json = f"bench_{args.suite}_{datetime.now():%Y%m%d_%H%M%S}.jsonl"
        show(f"rows      {args.json}")
    args.finished = _read_finished(args) if args.resume else []
    trial = {"tiny": True} if args.tiny else {}
    rows = [*args.finished, about | processor.provenance() | trial]
    for name in CPU_SUITES if args.suite == "all" else [args.suite]:
        for new_rows, text in SUITES[name](args, args.rounds or ROUNDS.get(name)):
            # A later call may continue these rows at another commit.
            measured = processor.date_and_commit()
            rows = newest_ratios([*rows, *(measured | row | trial for row in new_rows)])
            if args.json:  # after each result, so that an interrupted run loses none
                write_atomic(args.json, "".join(strict_json(row) + "\n" for row in rows))
            show(text if name in NAMED_SUITES else f"\n== {name}\n{text}")


if __name__ == "__main__":
    main()
