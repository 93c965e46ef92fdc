"""Compares the contenders of a study in each cell, and writes tables and verdicts."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxtrain.reporting.table import format_table
from jaxtrain.study import statistics as st
from jaxtrain.study.plan import StudyConfig, StudyPlan
from jaxtrain.study.runs import Result, falling_curve
from jaxtrain.study.search import ChosenSetting
from jaxtrain.study.target import TargetResult, describe_target, steps_to_target
from jaxtrain.study.work import CellRuns

# The fields of the classes below are keys of study.json.


class PairedComparison(NamedTuple):
    """A contender's paired runs against the baseline's."""

    contender: str
    choice: ChosenSetting
    steps: int
    losses: list[float]  # one for each seed
    mean: float
    sd: float
    paired: st.Paired
    p_corrected: float
    verdict: str  # empty for the baseline itself
    track_3: float
    reached: int  # number of seeds whose curve fell to the baseline's final loss of that seed
    reach_steps: float  # mean over those seeds
    reach_seconds: float
    seconds: float  # spent in steps; mean over all seeds
    detectable: float


class ConditionResult(NamedTuple):
    """The comparisons of one cell."""

    condition: str  # the cell's name
    parameters: int
    horizon: float  # 0 without study.horizons
    tokens: int  # that the baseline trains on
    target: float  # loss for the track-3 statistic
    sigma: float  # run-to-run standard deviation, pooled over contenders
    contests: list[PairedComparison]  # the baseline first
    targets: list[TargetResult]  # empty without study.target


def compare(plan: StudyPlan, cells: Sequence[CellRuns]) -> list[ConditionResult]:
    """Compares every contender with the baseline in each cell.

    The p-values are corrected for all comparisons of all cells together.
    """
    study = plan.study
    names = [study.baseline, *(name for name in study.contenders if name != study.baseline)]
    tests = [
        st.paired_tests(
            {name: [run.loss for run in cell.paired[name]] for name in names}, study.baseline
        )
        for cell in cells
    ]
    corrected = iter(st.holm([test[name].p for test in tests for name in names[1:]]))
    return [
        _compare_cell(plan, cell, test, [math.nan, *(next(corrected) for _ in names[1:])])
        for cell, test in zip(cells, tests, strict=True)
    ]


def _compare_cell(
    plan: StudyPlan, runs: CellRuns, tests: dict[str, st.Paired], corrected: list[float]
) -> ConditionResult:
    study, results = plan.study, runs.paired
    losses = {name: [result.loss for result in results[name]] for name in tests}
    baseline = losses[study.baseline]
    target = study.target or float(np.mean(baseline))
    comparisons = []
    for (name, paired), p in zip(tests.items(), corrected, strict=True):
        mean, sd = st.mean_sd(losses[name])
        steps = results[name][0].trial.config.steps
        verdict = st.decide_verdict(losses[name], baseline, p, study.level)
        if steps != results[study.baseline][0].trial.config.steps:
            verdict = st.UNDECIDED  # final losses after different numbers of steps
        reached = _reached(results[name], results[study.baseline])
        reach_steps, reach_seconds = np.mean(reached, axis=0) if reached else (math.nan, math.nan)
        comparison = PairedComparison(
            contender=name,
            choice=runs.choices[name],
            steps=steps,
            losses=losses[name],
            mean=mean,
            sd=sd,
            paired=paired,
            p_corrected=p,
            verdict="" if name == study.baseline else verdict,
            track_3=st.track_3(losses[name], target) if math.isfinite(mean) else -math.inf,
            reached=len(reached),
            reach_steps=float(reach_steps),
            reach_seconds=float(reach_seconds),
            seconds=float(np.mean([result.seconds for result in results[name]])),
            detectable=st.detectable(paired, study.level),
        )
        comparisons.append(comparison)
    cell, cfg = plan.cells[runs.cell], results[study.baseline][0].trial.config
    targets = [
        steps_to_target(name, results[name], study.target, study.target_margin)
        for name in (tests if study.target else ())
    ]
    return ConditionResult(
        cell.name,
        cell.parameters,
        cell.horizon,
        cfg.data.tokens_before(cfg.steps),
        target,
        st.pooled_sd(losses.values()),
        comparisons,
        targets,
    )


def _reached(results: list[Result], baseline: list[Result]) -> list[tuple[float, float]]:
    """Returns (step, seconds) for each seed whose curve fell to the baseline's final loss."""
    reached = []
    for result, other in zip(results, baseline, strict=True):
        curve, baseline_curve = falling_curve(result), falling_curve(other)
        if not curve or not baseline_curve or other.diverged:
            continue
        steps, seconds, losses = zip(*curve, strict=True)
        step = st.first_reach(steps, losses, float(baseline_curve[-1][2]))
        if math.isfinite(step):
            reached.append((step, float(np.interp(step, steps, seconds))))
    return reached


def format_result(plan: StudyPlan, result: ConditionResult) -> str:
    """Returns a cell's tables, notes and one verdict for each contender."""
    study, comparisons = plan.study, result.contests
    seeds = ", ".join(map(str, study.seeds))
    target = f"{result.target:.4f}"
    if not study.target:
        target += f", the mean of {study.baseline}"
    columns = {
        "contender": lambda c: c.contender,
        "mean": lambda c: f"{c.mean:.4f}",
        "sd": lambda c: f"{c.sd:.4f}",
        "diff": lambda c: f"{c.paired.difference:+.4f}" if c.verdict else "",
        "se": lambda c: f"{c.paired.se:.4f}" if c.verdict else "",
        "t": lambda c: f"{c.paired.t:+.2f}" if c.verdict else "",
        "p": lambda c: f"{c.paired.p:.3g}" if c.verdict else "",
        "Holm p": lambda c: f"{c.p_corrected:.3g}" if c.verdict else "",
    }
    track_3 = {
        "track-3": lambda c: f"{c.track_3:+.4f}",
        "in sigma": lambda c: f"{c.track_3 / result.sigma if result.sigma else math.nan:+.1f}",
    }
    budget = plan.budget(result.condition)
    length = f"{result.horizon:g}x: {result.tokens:,} tokens for {result.parameters:,} parameters"
    lines = [
        f"== {result.condition}: held-out loss (nats/token) over {len(study.seeds)} paired seeds "
        f"({seeds})",
        *([length] if result.horizon else []),
        f"each contender was tuned with at most {budget} runs on seed {study.tuning_seed}"
        if budget
        else "no contender was tuned here",
        "",
        format_table(comparisons, columns if result.horizon else columns | track_3),
        "",
        f"diff: mean difference from {study.baseline}, paired by seed. se: its standard error; the "
        "variance is pooled over all contenders, except for one that varies more than the others.",
        f"t, p: two-sided t-test with {comparisons[0].paired.degrees} degrees of freedom "
        f"({len(study.seeds) - 1} for such a contender). Holm p: corrected for all comparisons of "
        "the study.",
    ]
    if not result.horizon:
        lines += [
            f"track-3: (target - mean) * sqrt(n), target {target}.",
            f"in sigma: track-3 over the run-to-run sigma of {result.sigma:.4f}; the track "
            f"requires {st.TRACK_3_SIGMAS:.2f}.",
            "",
            format_table(comparisons, _speed_columns()),
        ]
    lines += ["", *_describe_choices(comparisons)]
    if result.targets:
        describe = [describe_target(t, study.target, study.target_margin) for t in result.targets]
        lines += ["", f"Target {study.target:g}:", *(f"  {text}" for text in describe)]
    lines += ["", f"Verdict at significance level {study.level:g}:"]
    lines += [f"  {_verdict_text(c, comparisons[0], study)}" for c in comparisons[1:]]
    return "\n".join(lines)


def _speed_columns() -> dict[str, Callable[[PairedComparison], str]]:
    return {
        "contender": lambda c: c.contender,
        "steps to baseline's final loss": lambda c: (
            f"{c.reach_steps:,.0f} of {c.steps:,}" if c.reached else "not reached"
        ),
        "seconds to it": lambda c: f"{c.reach_seconds:.1f}" if c.reached else "-",
        "seeds that reach it": lambda c: f"{c.reached} of {len(c.losses)}",
        "seconds per run": lambda c: f"{c.seconds:.1f}",
    }


def _describe_choices(comparisons: list[PairedComparison]) -> Iterator[str]:
    for c in comparisons:
        choice = c.choice
        if not choice.losses:
            yield f"{c.contender}: {choice.setting} ({choice.stopped})"
            continue
        yield f"{c.contender}: best of {len(choice.losses)} settings is {choice.setting}"
        yield f"  the search ended because {choice.stopped}"
        diverged = sum(not math.isfinite(loss) for loss in choice.losses.values())
        if diverged:
            yield f"  {diverged} of its tuning runs diverged"
        for name, values in choice.extended.items():
            yield f"  beyond its grid, {name} was tried at {', '.join(map(str, values))}"
        for name, value in choice.edges.items():
            yield f"  AT THE EDGE of what was tried: {name}={value}; a wider grid may do better"


def _verdict_text(c: PairedComparison, baseline: PairedComparison, study: StudyConfig) -> str:
    """Returns the verdict as a sentence that needs no legend."""
    name, other = c.contender, baseline.contender
    if c.steps != baseline.steps:
        return (
            f"{name} and {other} are not compared by their final losses: they train {c.steps:,} "
            f"and {baseline.steps:,} steps"
        )
    if c.verdict == st.UNDECIDED:
        if not np.isfinite(baseline.losses).all():
            return f"{name} against {other} is undecided: {other} diverged"
        needed = f"a verdict needs {st.FEWEST_PAIRS} paired seeds; got {len(c.losses)}"
        return f"{name} against {other} is undecided: {needed}"
    diverged = sum(not math.isfinite(loss) for loss in c.losses)
    if diverged:
        return f"{name} is worse than {other}: {diverged} of its {len(c.losses)} runs diverged"
    p = f"p = {c.p_corrected:.3g} after Holm's correction"
    if c.verdict == st.TIES:
        return (
            f"{name} and {other} do not differ significantly: {c.paired.difference:+.4f} +- "
            f"{c.paired.se:.4f} nats/token (standard error), {p}; with {c.paired.pairs} seeds "
            f"only a difference of at least {c.detectable:.4f} would be significant"
        )
    comparative, direction = ("better", "lower") if c.verdict == st.WINS else ("worse", "higher")
    return (
        f"{name} is {comparative} than {other}: its held-out loss is "
        f"{abs(c.paired.difference):.4f} +- {c.paired.se:.4f} nats/token (standard error) "
        f"{direction}, {p}"
    )
