"""Compares optimizers fairly: equal tuning budgets, paired fresh seeds, verdicts with errors.

    jaxtrain study study_quick
    jaxtrain study study_quick --base.steps=60 --study.workdir=runs/study_short
    jaxtrain study gpt_124m --overhead

In each condition every contender tries the same number of settings on one seed. The setting with
the lowest held-out loss is then trained on fresh seeds, the same for all contenders. The study's
folder receives study.txt (tables and verdicts), study.json (all numbers) and a picture of each
condition. Every run is an ordinary run directory in CONDITION/CONTENDER/SETTING/seedK.

The same command resumes a study that was stopped: runs that have ended are not trained again.
--overhead trains nothing and predicts the cost of Newton-Schulz for a config.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

import jaxtrain.config.train_config as config_lib
from jaxtrain.config.command_line import CommandForm, parse
from jaxtrain.config.fields import list_sections
from jaxtrain.data.corpus import Corpus
from jaxtrain.distributed.preemption import interruptible
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.errors import INTERRUPTED, CheckpointError
from jaxtrain.file_errors import exit_on_file_error
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.ops.precision import resolve_dtype
from jaxtrain.reporting.terminal import set_up_logging
from jaxtrain.study.overhead import TOKENS, overhead_table
from jaxtrain.study.picture import study_curves
from jaxtrain.study.plan import StudyConfig, StudyPlan, build_plan, describe_study_flags
from jaxtrain.study.result import ConditionResult, choose_setting, compare, format_result
from jaxtrain.study.runs import Interrupted, Progress, Result, check_folder, open_data
from jaxtrain.training.run import build_run
from jaxtrain.training.startup import library_versions


def run_study(
    values: Mapping[str, Any],
    devices: Sequence[Any] | None = None,
    print_line: Callable[[str], object] = print,
) -> list[ConditionResult]:
    """Runs a study config to its end; returns one result for each condition.

    Args:
        values: `base` and `study`, as a study config's get_config() returns them.
        devices: to train on; None uses all.
        print_line: prints a line.

    Raises:
        ValueError: the plan is not fair, or the folder contains runs of another study.
        Interrupted: a signal stopped a run, which is saved.
    """
    plan = build_plan(values)
    start_runtime(plan.base)
    base, _ = resolve_dtype(plan.base, (devices or jax.devices())[0])
    folder = Path(plan.study.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    base, corpus = open_data(base, folder)
    plan = plan._replace(base=base)
    header = _describe_study(plan, corpus)
    for line in header:
        print_line(line)
    _check_folders(plan)
    progress = Progress(plan.runs, devices, print_line)
    results, runs = [], []
    for condition in plan.study.conditions:
        result, condition_runs = _run_condition(plan, condition, progress)
        results.append(result)
        runs += condition_runs
    texts = [format_result(plan, result) for result in results]
    if progress.reused:
        print_line(f"{progress.reused} of {plan.runs} runs had ended before; not trained again")
    print_line("\n" + "\n\n".join(texts))
    write_atomic(folder / "study.txt", "\n".join(header) + "\n\n" + "\n\n".join(texts) + "\n")
    _write_numbers(plan, corpus, results, runs)
    print_line(f"\nwritten to {folder}: study.txt, study.json and a picture of each condition")
    return results


def _describe_study(plan: StudyPlan, corpus: Corpus) -> list[str]:
    """Returns lines on what the study will do."""
    study, base = plan.study, plan.base
    run = build_run(base, jax.local_devices()[:1])
    tokens = base.steps * base.data.batch * base.data.seq_len
    pairs = len(study.contenders) * len(study.seeds)
    tuning = len(study.contenders) * plan.budget
    return [
        f"model       {run.parameters:,} parameters, {tokens:,} tokens in {base.steps} steps",
        f"data        {corpus.describe()}",
        f"contenders  {', '.join(study.contenders)}; baseline {study.baseline}",
        f"conditions  {', '.join(study.conditions)}; {tuning} tuning runs and {pairs} paired runs "
        "in each",
        f"folder      {study.workdir}",
    ]


def _check_folders(plan: StudyPlan) -> None:
    """Checks every folder that the study may read, before the first run."""
    study = plan.study
    for condition in study.conditions:
        for contender, settings in plan.settings.items():
            for setting in settings:
                for seed in (study.tuning_seed, *study.seeds):
                    check_folder(plan.trial(condition, contender, setting, seed))


def _run_condition(
    plan: StudyPlan, condition: str, progress: Progress
) -> tuple[ConditionResult, list[Result]]:
    """Trains, compares and draws one condition; also returns the results of all its runs."""
    study, choices, all_runs = plan.study, {}, []
    for name in study.contenders:
        tuning = [progress.run(trial) for trial in plan.tuning(condition, name)]
        choices[name] = choose_setting(plan, name, tuning)
        all_runs += tuning
    paired = {name: [] for name in study.contenders}
    for trial in plan.paired(condition, {name: c.setting for name, c in choices.items()}):
        paired[trial.contender].append(progress.run(trial))
        all_runs.append(paired[trial.contender][-1])
    result = compare(plan, condition, choices, paired)
    baseline_first = {c.contender: paired[c.contender] for c in result.contests}
    title = f"{Path(study.workdir).name}, {condition}"
    if any(math.isfinite(run.loss) for runs in paired.values() for run in runs):
        picture = study_curves(title, baseline_first)
        write_atomic(Path(study.workdir) / f"{condition}.png", picture)
    return result, all_runs


def _write_numbers(
    plan: StudyPlan, corpus: Corpus, results: list[ConditionResult], runs: list[Result]
) -> None:
    """Writes study.json."""
    folder = Path(plan.study.workdir)
    study = {
        "study": vars(plan.study),
        "base": config_lib.to_dict(plan.base),
        "data": corpus.fingerprint,
        "versions": library_versions(),
        "device": jax.devices()[0].device_kind,
        "findings": [_as_dict(result) for result in results],
        "runs": [
            {
                "condition": r.trial.condition,
                "contender": r.trial.contender,
                "setting": r.trial.setting,
                "seed": r.trial.seed,
                "folder": str(Path(r.trial.config.workdir).relative_to(folder)),
                "loss_nats": r.loss,
                "seconds": r.seconds,
                "compile_s": r.compile_s,
            }
            for r in runs
        ],
    }
    write_atomic(folder / "study.json", strict_json(study, indent=2) + "\n")


def _as_dict(value: Any) -> Any:
    """Converts nested NamedTuples to dicts by field."""
    if hasattr(value, "_asdict"):
        return {name: _as_dict(inner) for name, inner in value._asdict().items()}
    return [_as_dict(inner) for inner in value] if isinstance(value, list) else value


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
            run_study(args.config)
    except (Interrupted, KeyboardInterrupt) as stop:
        print("\nstopped; the same command continues from here")
        return getattr(stop, "status", INTERRUPTED)
    except (ValueError, CheckpointError) as error:
        logging.debug("Traceback:", exc_info=True)
        sys.exit(f"error: {error}")
    return 0


def define_flags() -> None:
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
        open_fields=tuple(f"study.{name}." for name in ("contenders", "grid", "conditions")),
        tables=describe_study_flags(),
        status=1,
    )


def command(argv: list[str] | None = None, prog: str = "python -m jaxtrain.study") -> None:
    """Runs the command line; `prog` is how the user called it."""
    argv = sys.argv[1:] if argv is None else argv
    app.run(main, argv=[prog, *argv], flags_parser=lambda argv: parse(form(), prog, argv[1:]))


if __name__ == "__main__":
    command()
