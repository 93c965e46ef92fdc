"""Compares optimizers fairly: equal tuning budgets, paired fresh seeds, verdicts with errors.

    jaxtrain study study_quick
    jaxtrain study study_quick --base.steps=60 --study.workdir=runs/study_short
    jaxtrain study study_scaling --dry_run
    jaxtrain study gpt_124m --overhead

Every contender has the same number of tuning runs, on one seed. Its setting with the lowest
held-out loss is then trained on fresh seeds, the same for all contenders, and the losses at the end
of these runs are compared. This is done for each condition, size and horizon (length of the run in
tokens per parameter) of the study, which together are called a cell.

With study.search=grid, all combinations of a contender's grid are tried. With coordinates, one
field is changed at a time while the others keep their best values, in rounds, until no field
improves the loss or study.budget is spent: first learning_rate, then adam_learning_rate, then the
others. Where the best value is the lowest or highest of those tried, the next one beyond it is
tried, too. A longer horizon starts from the settings of the one before.

The study's folder receives study.txt (tables and verdicts), study.json (all numbers), study.csv (a
row for each contender in each cell) and pictures, updated after every cell, and runs.jsonl (the
result of each run). Every run is an ordinary run directory in CELL/CONTENDER/SETTING/seedK.

The same command resumes a study that was stopped: runs that have ended are not trained again. It
may run several times at once, also on several hosts that share the folder: each process claims the
run that it trains, and the claim of a process that has died is taken over. Without a shared folder,
--study.earlier=FILE uses the results in runs.jsonl of another folder of the same study.

To count steps to a target loss by the rules of modded-nanogpt's track 3, set study.target, list the
contenders with their settings and an empty grid each, set study.tune_adam=False, and set
base.eval_every and base.eval_from so that only the end of the runs is evaluated often. Contenders
may differ in their number of steps.

--dry_run prints the plan and measures how long it takes here. --overhead predicts the cost of
Newton-Schulz for a config. Neither trains anything.
"""

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

import jaxtrain.config.train_config as config_lib
from jaxtrain.config.command_line import CommandForm, parse
from jaxtrain.config.fields import list_sections
from jaxtrain.distributed.preemption import interruptible
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.errors import INTERRUPTED, CheckpointError
from jaxtrain.file_errors import exit_on_file_error
from jaxtrain.ops.precision import resolve_dtype
from jaxtrain.reporting.terminal import set_up_logging
from jaxtrain.study.estimate import describe_study, estimate_time
from jaxtrain.study.overhead import TOKENS, overhead_table
from jaxtrain.study.plan import StudyPlan, build_plan
from jaxtrain.study.result import ConditionResult
from jaxtrain.study.run_records import RunRecords
from jaxtrain.study.runs import Interrupted, check_folder, open_data
from jaxtrain.study.study_config import StudyConfig, describe_study_flags
from jaxtrain.study.summary import format_summary, summarise, write_summary
from jaxtrain.study.work import CellRuns, Work
from jaxtrain.training.run import build_run

# Fields of the study whose keys are the user's own.
OPEN_FIELDS = ("contenders", "grid", "conditions", "sizes", "horizons", "published")


def run_study(
    values: Mapping[str, Any],
    devices: Sequence[Any] | None = None,
    print_line: Callable[[str], object] = print,
    dry_run: bool = False,
) -> list[ConditionResult]:
    """Runs a study config to its end; returns one result for each cell.

    Args:
        values: `base` and `study`, as a study config's get_config() returns them.
        devices: to train on; None uses all.
        print_line: prints a line.
        dry_run: only prints what the study will do and how long it takes; returns no results.

    Raises:
        ValueError: the plan is not fair, or the folder contains runs of another study.
        Interrupted: a signal stopped a run, which is saved.
    """
    plan = build_plan(values)
    start_runtime(plan.base)
    base, _ = resolve_dtype(plan.base, (devices or jax.devices())[0])
    folder = Path(plan.study.workdir)
    if dry_run:
        for lines in (describe_study(plan), estimate_time(plan._replace(base=base), devices)):
            print_line("\n".join(lines))
        return []
    records = RunRecords(plan.study.earlier)
    folder.mkdir(parents=True, exist_ok=True)
    base, corpus = open_data(base, folder)
    plan = plan._replace(base=base)
    header = [f"data        {corpus.describe()}", *describe_study(plan)]
    for line in header:
        print_line(line)
    _check_folders(plan)
    work = Work(plan, devices, print_line, records=records)
    written = []

    def write(cells: list[CellRuns]) -> None:
        written[:] = [summarise(plan, cells)]
        write_summary(plan, corpus, header, cells, written[0])

    work.run_all(write)
    if work.reused:
        print_line(
            f"{work.reused} of {work.count} runs had ended before, or in other processes; not "
            "trained again"
        )
    print_line("\n" + format_summary(plan, written[0]))
    print_line(f"\nwritten to {folder}: study.txt, study.json, study.csv and pictures")
    return written[0].results


def _check_folders(plan: StudyPlan) -> None:
    """Checks the folders of all settings in the config before the first run."""
    study = plan.study
    for cell, contender in itertools.product(plan.cells, study.contenders):
        if not Path(study.workdir, cell, contender).exists():
            continue
        for setting in plan.declared_settings(contender):
            for seed in (study.tuning_seed, *study.seeds):
                check_folder(plan.trial(cell, contender, setting, seed))


def print_overhead(args: flags.FlagValues) -> None:
    """Prints the predicted cost of Newton-Schulz for a config."""
    values = args.config.base if "base" in args.config else args.config
    cfg = config_lib.freeze(values)
    single_device = config_lib.freeze(config_lib.to_dict(cfg) | {"mesh": {}})
    run = build_run(single_device, jax.local_devices()[:1])
    tokens = [int(count) for count in args.tokens] or TOKENS
    peak_flops = args.peak_tflops * 1e12
    print(overhead_table(cfg, run.model, tokens, args.chips, peak_flops, args.efficiency))


@exit_on_file_error()
def main(argv: Sequence[str]) -> int:
    del argv  # absl has parsed it into flags.FLAGS
    args = flags.FLAGS
    try:
        if args.overhead:
            print_overhead(args)
            return 0
        set_up_logging()
        with interruptible():
            # A study runs for hours: a file that its output goes to should show each run at once.
            run_study(args.config, print_line=partial(print, flush=True), dry_run=args.dry_run)
    except (Interrupted, KeyboardInterrupt) as stop:
        print("\nstopped; the same command continues from here")
        return getattr(stop, "status", INTERRUPTED)
    except (ValueError, CheckpointError) as error:
        logging.debug("Traceback:", exc_info=True)
        sys.exit(f"error: {error}")
    return 0


def define_flags() -> None:
    flags.DEFINE_bool("dry_run", False, "train nothing; print the plan and an estimate of its time")
    flags.DEFINE_bool("overhead", False, "train nothing and print the cost of Newton-Schulz")
    flags.DEFINE_list("tokens", [], "with --overhead: tokens per step, separated by commas")
    flags.DEFINE_integer("chips", 8, "with --overhead: devices that repeat the work", 1)
    flags.DEFINE_float(
        "peak_tflops", 0.0, "with --overhead: a device's peak; 0 shows three common GPUs", 0
    )
    flags.DEFINE_float(
        "efficiency", 0.6, "with --overhead: share of the peak that Newton-Schulz reaches", 0.01, 1
    )


def form() -> CommandForm:
    """Returns the grammar of the command line: `base.` may be left out before a run's fields."""
    run_sections = tuple(list_sections(config_lib.TrainConfig))
    base_sections = ((f"base.{prefix}", section) for prefix, section in run_sections)
    return CommandForm(
        "study",
        __doc__,
        define_flags,
        config="must",
        sections=(*run_sections, *base_sections, ("study.", StudyConfig)),
        open_fields=tuple(f"study.{name}." for name in OPEN_FIELDS),
        tables=describe_study_flags(),
        status=1,
    )


def command(argv: list[str] | None = None, prog: str = "python -m jaxtrain.study") -> None:
    """Runs the command line; `prog` is how the user called it."""
    argv = sys.argv[1:] if argv is None else argv
    app.run(main, argv=[prog, *argv], flags_parser=lambda argv: parse(form(), prog, argv[1:]))


if __name__ == "__main__":
    command()
