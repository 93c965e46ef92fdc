"""Evaluates one condition of a study: the chosen settings, the paired comparisons, the verdicts."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxtrain.reporting.table import format_table
from jaxtrain.study import statistics as st
from jaxtrain.study.plan import StudyConfig, StudyPlan
from jaxtrain.study.runs import Result, falling_curve

# The fields of the three classes below are the keys of study.json.


class ChosenSetting(NamedTuple):
    """A contender's best setting of its tuning runs."""

    setting: str
    losses: dict[str, float]  # setting's name -> held-out loss
    edges: dict[str, float]  # field -> chosen value, if it is the lowest or highest tried


class PairedComparison(NamedTuple):
    """A contender's paired runs against the baseline's."""

    contender: str
    choice: ChosenSetting
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
    """The comparisons of one condition."""

    condition: str
    target: float  # loss for the track-3 statistic
    sigma: float  # run-to-run standard deviation, pooled over contenders
    contests: list[PairedComparison]  # the baseline first


def choose_setting(plan: StudyPlan, contender: str, results: Sequence[Result]) -> ChosenSetting:
    """Returns the setting with the lowest held-out loss, and where it is at an edge of the grid.

    Raises:
        ValueError: every setting diverged.
    """
    losses = {result.trial.setting: result.loss for result in results}
    best = min(losses, key=lambda setting: losses[setting])
    if not math.isfinite(losses[best]):
        raise ValueError(
            f"a contender must have a setting that trains; all {len(losses)} of {contender} "
            f"diverged. Lower the learning rates in study.grid.{contender}."
        )
    settings, edges = plan.settings[contender], {}
    for name, value in settings[best].items():
        tried = {setting[name] for setting in settings.values()}
        numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in tried)
        if numeric and len(tried) > 1 and value in (min(tried), max(tried)):
            edges[name] = value
    return ChosenSetting(best, losses, edges)


def compare(
    plan: StudyPlan,
    condition: str,
    choices: dict[str, ChosenSetting],
    results: dict[str, list[Result]],
) -> ConditionResult:
    """Compares every contender with the baseline in one condition.

    Args:
        choices: contender -> its chosen setting.
        results: contender -> one result for each seed, in the order of study.seeds.
    """
    study = plan.study
    names = [study.baseline, *(name for name in study.contenders if name != study.baseline)]
    losses = {name: [result.loss for result in results[name]] for name in names}
    baseline = losses[study.baseline]
    target = study.target or float(np.mean(baseline))
    paired = {name: st.paired_test(losses[name], baseline) for name in names}
    corrected = st.holm([paired[name].p for name in names[1:]])
    comparisons = []
    for name, p in zip(names, [math.nan, *corrected], strict=True):
        mean, sd = st.mean_sd(losses[name])
        verdict = st.decide_verdict(losses[name], baseline, p, study.level)
        reached = _reached(results[name], results[study.baseline])
        reach_steps, reach_seconds = np.mean(reached, axis=0) if reached else (math.nan, math.nan)
        comparison = PairedComparison(
            contender=name,
            choice=choices[name],
            losses=losses[name],
            mean=mean,
            sd=sd,
            paired=paired[name],
            p_corrected=p,
            verdict="" if name == study.baseline else verdict,
            track_3=st.track_3(losses[name], target) if math.isfinite(mean) else -math.inf,
            reached=len(reached),
            reach_steps=float(reach_steps),
            reach_seconds=float(reach_seconds),
            seconds=float(np.mean([result.seconds for result in results[name]])),
            detectable=st.detectable(paired[name], study.level),
        )
        comparisons.append(comparison)
    return ConditionResult(condition, target, st.pooled_sd(losses.values()), comparisons)


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
    """Returns a condition's tables, notes and one verdict for each contender."""
    study, comparisons = plan.study, result.contests
    seeds = ", ".join(map(str, study.seeds))
    target = f"{result.target:.4f}"
    if not study.target:
        target += f", the mean of {study.baseline}"
    losses = {
        "contender": lambda c: c.contender,
        "mean": lambda c: f"{c.mean:.4f}",
        "sd": lambda c: f"{c.sd:.4f}",
        "diff": lambda c: f"{c.paired.difference:+.4f}" if c.verdict else "",
        "se": lambda c: f"{c.paired.se:.4f}" if c.verdict else "",
        "t": lambda c: f"{c.paired.t:+.2f}" if c.verdict else "",
        "p": lambda c: f"{c.paired.p:.3g}" if c.verdict else "",
        "Holm p": lambda c: f"{c.p_corrected:.3g}" if c.verdict else "",
        "track-3": lambda c: f"{c.track_3:+.4f}",
        "in sigma": lambda c: f"{c.track_3 / result.sigma if result.sigma else math.nan:+.1f}",
    }
    steps = f"{plan.base.steps:,}"
    speed = {
        "contender": lambda c: c.contender,
        "steps to baseline's final loss": lambda c: (
            f"{c.reach_steps:,.0f} of {steps}" if c.reached else "not reached"
        ),
        "seconds to it": lambda c: f"{c.reach_seconds:.1f}" if c.reached else "-",
        "seeds that reach it": lambda c: f"{c.reached} of {len(c.losses)}",
        "seconds per run": lambda c: f"{c.seconds:.1f}",
    }
    lines = [
        f"== {result.condition}: held-out loss (nats/token) over {len(study.seeds)} paired seeds "
        f"({seeds})",
        f"each contender was tuned with {plan.budget} runs on seed {study.tuning_seed}",
        "",
        format_table(comparisons, losses),
        "",
        f"diff, se, t, p: difference from {study.baseline}, paired by seed, with its standard "
        "error and two-sided t-test.",
        "Holm p: p corrected for comparing several contenders.",
        f"track-3: (target - mean) * sqrt(n), target {target}.",
        f"in sigma: track-3 over the run-to-run sigma of {result.sigma:.4f}; the track requires "
        f"{st.TRACK_3_SIGMAS:.2f}.",
        "",
        format_table(comparisons, speed),
        "",
        *_describe_choices(comparisons),
        "",
        f"Verdict at significance level {study.level:g}:",
        *(f"  {_verdict_text(c, comparisons[0], study)}" for c in comparisons[1:]),
    ]
    return "\n".join(lines)


def _describe_choices(comparisons: list[PairedComparison]) -> Iterator[str]:
    for c in comparisons:
        yield f"{c.contender}: best of {len(c.choice.losses)} settings is {c.choice.setting}"
        diverged = sum(not math.isfinite(loss) for loss in c.choice.losses.values())
        if diverged:
            yield f"  {diverged} of its tuning runs diverged"
        for name, value in c.choice.edges.items():
            yield f"  AT THE EDGE of its grid: {name}={value}; a wider grid may do better"


def _verdict_text(c: PairedComparison, baseline: PairedComparison, study: StudyConfig) -> str:
    """Returns the verdict as a sentence that needs no legend."""
    name, other = c.contender, baseline.contender
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
