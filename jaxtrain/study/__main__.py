"""Compares optimizers honestly: equal tuning budgets, paired fresh seeds, verdicts with errors.

    jaxtrain study study_quick
    jaxtrain study study_quick --base.steps=60 --study.workdir=runs/study_short
    jaxtrain study gpt_124m --overhead

In each condition every contender tries the same number of settings on one seed; the one of the
lowest held-out loss is trained anew on fresh seeds, the same for all contenders. The folder
receives study.txt (the tables and verdicts), study.json (all numbers) and a picture a condition;
below it every run is an ordinary run directory, CONDITION/CONTENDER/SETTING/seedK.

The same command resumes a study that was stopped: what has ended is read, not trained again. With
--overhead nothing is trained: what Newton-Schulz will cost a config is predicted.
"""

import math
import sys
from pathlib import Path

import jax
from absl import app, flags, logging

import jaxtrain.config.train_config as config_lib
from jaxtrain.config.command_line import CommandForm, parse
from jaxtrain.config.fields import list_sections
from jaxtrain.distributed.preemption import interruptible
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.errors import INTERRUPTED, CheckpointError
from jaxtrain.file_errors import exit_on_file_error
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.model.layers import letter_sizes
from jaxtrain.model.transformer import count_params
from jaxtrain.ops.precision import resolve_dtype
from jaxtrain.reporting.terminal import set_up_logging
from jaxtrain.study.overhead import TOKENS, overhead_table
from jaxtrain.study.picture import study_curves
from jaxtrain.study.plan import Plan, StudyConfig, build_plan, describe
from jaxtrain.study.result import Finding, choose, find, text
from jaxtrain.study.runs import Interrupted, Progress, check_folder, open_data
from jaxtrain.training.run import build_run
from jaxtrain.training.startup import library_versions


def run_study(values, devices=None, show=print) -> list[Finding]:
    """Runs a study config to its end, printing with `show`; a Finding a condition.

    Raises:
        ValueError: the plan is not fair, or the folder holds runs of another study.
        Interrupted: a signal stopped a run, which is saved.
    """
    plan = build_plan(values)
    start_runtime(plan.base)
    base, _ = resolve_dtype(plan.base, (devices or jax.devices())[0])
    plan = plan._replace(base=base)
    folder = Path(plan.study.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    base, corpus = open_data(plan.base, folder)
    plan = plan._replace(base=base)
    for line in header(plan, corpus):
        show(line)
    _check_folders(plan)
    progress = Progress(plan.runs, devices, show)
    findings, rows = [], []
    for condition in plan.study.conditions:
        finding, results = _run_condition(plan, condition, progress)
        findings.append(finding)
        rows += results
    texts = [text(plan, finding) for finding in findings]
    if progress.read:
        show(f"{progress.read} of {plan.runs} runs were read, not trained again")
    show("\n" + "\n\n".join(texts))
    _write(plan, corpus, findings, rows, texts)
    show(f"\nwritten to {folder}: study.txt, study.json and a picture a condition")
    return findings


def header(plan: Plan, corpus):
    """What the study will do, a line each."""
    study, base = plan.study, plan.base
    run = build_run(base, jax.local_devices()[:1])
    parameters = count_params(run.model.axes, letter_sizes(base.model))
    tokens = base.steps * base.data.batch * base.data.seq_len
    pairs = len(study.contenders) * len(study.seeds)
    tuning = len(study.contenders) * plan.budget
    yield f"model       {parameters:,} parameters, {tokens:,} tokens in {base.steps} steps"
    yield f"data        {corpus.describe()}"
    yield f"contenders  {', '.join(study.contenders)}; baseline {study.baseline}"
    yield f"conditions  {', '.join(study.conditions)}; in each {tuning} tuning runs, {pairs} paired"
    yield f"folder      {study.workdir}"


def _check_folders(plan: Plan) -> None:
    """Every folder that the study may read, before the first run."""
    study = plan.study
    for condition in study.conditions:
        for contender, settings in plan.settings.items():
            for setting in settings:
                for seed in (study.tuning_seed, *study.seeds):
                    check_folder(plan.trial(condition, contender, setting, seed))


def _run_condition(plan: Plan, condition, progress):
    """(Finding, [Result of every run]) of a condition, its picture drawn."""
    study, choices, all_results = plan.study, {}, []
    tuned = {name: [] for name in study.contenders}
    for name in study.contenders:
        tuned[name] = [progress.run(trial) for trial in plan.tuning(condition, name)]
        choices[name] = choose(plan, name, tuned[name])
        all_results += tuned[name]
    fresh = {name: [] for name in study.contenders}
    for trial in plan.paired(condition, {name: c.setting for name, c in choices.items()}):
        fresh[trial.contender].append(progress.run(trial))
        all_results.append(fresh[trial.contender][-1])
    finding = find(plan, condition, choices, fresh)
    shown = {contest.contender: fresh[contest.contender] for contest in finding.contests}
    title = f"{Path(study.workdir).name}, {condition}"
    if any(math.isfinite(result.loss) for results in fresh.values() for result in results):
        write_atomic(Path(study.workdir) / f"{condition}.png", study_curves(title, shown))
    return finding, all_results


def _write(plan: Plan, corpus, findings, results, texts) -> None:
    folder = Path(plan.study.workdir)
    head = list(header(plan, corpus))
    write_atomic(folder / "study.txt", "\n".join(head) + "\n\n" + "\n\n".join(texts) + "\n")
    runs = [
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
        for r in results
    ]
    study = {
        "study": vars(plan.study),
        "base": config_lib.to_dict(plan.base),
        "data": corpus.fingerprint,
        "versions": library_versions(),
        "device": jax.devices()[0].device_kind,
        "findings": [_as_dict(finding) for finding in findings],
        "runs": runs,
    }
    write_atomic(folder / "study.json", strict_json(study, indent=2) + "\n")


def _as_dict(value):
    """NamedTuples by their fields, however deep."""
    if hasattr(value, "_asdict"):
        return {name: _as_dict(inner) for name, inner in value._asdict().items()}
    return [_as_dict(inner) for inner in value] if isinstance(value, list) else value


def print_overhead(args) -> None:
    values = args.config.base if "base" in args.config else args.config
    cfg = config_lib.freeze(values)
    alone = config_lib.freeze(config_lib.to_dict(cfg) | {"mesh": {}})
    run = build_run(alone, jax.local_devices()[:1])
    tokens = [int(count) for count in args.tokens] or TOKENS
    peak = args.peak_tflops * 1e12
    print(overhead_table(cfg, run.model, tokens, args.chips, peak, args.efficiency))


@exit_on_file_error()
def main(words) -> int:
    del words  # there are none
    args = flags.FLAGS
    try:
        if args.overhead:
            print_overhead(args)
            return 0
        set_up_logging()
        with interruptible():
            run_study(args.config)
    except (Interrupted, KeyboardInterrupt) as stop:
        print("\nstopped; the same command goes on from here, and trains nothing twice")
        return getattr(stop, "status", INTERRUPTED)
    except (ValueError, CheckpointError) as error:
        logging.debug("in full:", exc_info=True)
        sys.exit(f"error: {error}")
    return 0


def define_flags() -> None:
    flags.DEFINE_bool("overhead", False, "print what Newton-Schulz will cost, and train nothing")
    flags.DEFINE_list("tokens", [], "with --overhead: tokens a step, separated by commas")
    flags.DEFINE_integer("chips", 8, "with --overhead: devices that repeat the work", 1)
    flags.DEFINE_float(
        "peak_tflops", 0.0, "with --overhead: a device's peak; 0: A40, A100, H100", 0
    )
    flags.DEFINE_float(
        "efficiency", 0.6, "with --overhead: of Newton-Schulz, share of peak", 0.01, 1
    )


def form() -> CommandForm:
    """Returns what the command line may hold: `base.` may be left out before a run's fields."""
    of_run = tuple(list_sections(config_lib.TrainConfig))
    return CommandForm(
        "study",
        __doc__,
        define_flags,
        config="must",
        sections=(*of_run, *((f"base.{p}", cls) for p, cls in of_run), ("study.", StudyConfig)),
        open_fields=tuple(f"study.{name}." for name in ("contenders", "grid", "conditions")),
        tables=describe(),
        status=1,
    )


def command(argv=None, prog="python -m jaxtrain.study") -> None:
    argv = sys.argv[1:] if argv is None else argv
    app.run(main, argv=[prog, *argv], flags_parser=lambda argv: parse(form(), prog, argv[1:]))


if __name__ == "__main__":
    command()
