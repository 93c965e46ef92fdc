"""What a study found in one condition: choices, comparisons, their table and their verdicts."""

import math
from typing import NamedTuple

import numpy as np

from jaxtrain.study import statistics as st
from jaxtrain.study.plan import Plan
from jaxtrain.study.runs import Result, falling_curve


class Choice(NamedTuple):
    """A contender's best setting of its tuning runs."""

    setting: str
    losses: dict  # setting's name -> held-out loss
    edges: dict  # field -> its chosen value, where that is the least or the greatest tried


class Contest(NamedTuple):
    """A contender's paired runs against the baseline's."""

    contender: str
    choice: Choice
    losses: list  # a seed each
    mean: float
    sd: float
    paired: st.Paired
    p_corrected: float
    verdict: str
    track_3: float
    reached: int  # seeds whose curve came down to the baseline's final loss with that seed
    reach_steps: float  # mean over those seeds
    reach_seconds: float
    seconds: float  # in steps, mean over seeds
    detectable: float


class Finding(NamedTuple):
    condition: str
    target: float  # of the track-3 statistic
    sigma: float  # run-to-run, pooled over contenders
    contests: list  # the baseline's first


def choose(plan: Plan, contender: str, results: list[Result]) -> Choice:
    """The setting of the lowest held-out loss, and where it stands at an edge of the grid.

    Raises:
        ValueError: every setting diverged.
    """
    losses = {result.trial.setting: result.loss for result in results}
    best = min(losses, key=losses.get)
    if not math.isfinite(losses[best]):
        raise ValueError(
            f"a contender needs a setting that trains; all {len(losses)} of {contender} diverged. "
            f"Lower the rates in study.grid.{contender}."
        )
    settings, edges = plan.settings[contender], {}
    for name, value in settings[best].items():
        tried = {setting[name] for setting in settings.values()}
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in tried)
        if numbers and len(tried) > 1 and value in (min(tried), max(tried)):
            edges[name] = value
    return Choice(best, losses, edges)


def find(plan: Plan, condition: str, choices: dict, results: dict) -> Finding:
    """The Finding of a condition.

    Args:
        choices: contender -> Choice.
        results: contender -> its Results, a seed each, all in the order of study.seeds.
    """
    study = plan.study
    names = [study.baseline, *(name for name in study.contenders if name != study.baseline)]
    losses = {name: [result.loss for result in results[name]] for name in names}
    base = losses[study.baseline]
    target = study.target or float(np.mean(base))
    paired = {name: st.paired_test(losses[name], base) for name in names}
    corrected = st.holm([paired[name].p for name in names[1:]])
    contests = []
    for name, p in zip(names, [math.nan, *corrected], strict=True):
        mean, sd = st.mean_sd(losses[name])
        reached = _reach(results[name], results[study.baseline])
        contest = Contest(
            contender=name,
            choice=choices[name],
            losses=losses[name],
            mean=mean,
            sd=sd,
            paired=paired[name],
            p_corrected=p,
            verdict="" if name == study.baseline else st.judge(losses[name], base, p, study.level),
            track_3=st.track_3(losses[name], target) if math.isfinite(mean) else -math.inf,
            reached=len(reached),
            reach_steps=float(np.mean(reached, axis=0)[0]) if reached else math.nan,
            reach_seconds=float(np.mean(reached, axis=0)[1]) if reached else math.nan,
            seconds=float(np.mean([result.seconds for result in results[name]])),
            detectable=st.detectable(paired[name], study.level),
        )
        contests.append(contest)
    return Finding(condition, target, st.pooled_sd(losses.values()), contests)


def _reach(results, baseline) -> list:
    """(step, seconds) of each seed whose curve comes down to where the baseline's ends."""
    found = []
    for result, other in zip(results, baseline, strict=True):
        rows, ends = falling_curve(result), falling_curve(other)
        if not rows or not ends or other.diverged:
            continue
        steps, seconds, losses = zip(*rows, strict=True)
        step = st.reach(steps, losses, float(ends[-1][2]))
        if math.isfinite(step):
            found.append((step, float(np.interp(step, steps, seconds))))
    return found


def text(plan: Plan, finding: Finding) -> str:
    """The finding as tables, notes and a verdict a contender."""
    study, contests = plan.study, finding.contests
    seeds = ", ".join(map(str, study.seeds))
    lines = [
        f"== {finding.condition}: held-out nats/token of {len(study.seeds)} paired seeds ({seeds})",
        f"each contender tuned with {plan.budget} runs on seed {study.tuning_seed}",
        "",
        *_aligned([_LOSSES] + [_loss_row(c, finding) for c in contests]),
        "",
        f"diff, se, t, p: against {study.baseline}, paired by seed, two-sided; Holm p: corrected "
        "over contenders.",
        f"track-3: (target - mean) * sqrt(n), target {finding.target:.4f}"
        f"{'' if study.target else f', the mean of {study.baseline}'}; sigma, run to run: "
        f"{finding.sigma:.4f}; the track asks for {st.TRACK_3_SIGMAS:.2f}.",
        "",
        *_aligned([_REACH] + [_reach_row(c, contests[0], plan) for c in contests]),
        "",
        *_settings(contests),
        "",
        "Verdict" + (f" at level {study.level:g}:"),
        *(f"  {_verdict(c, contests[0], study)}" for c in contests[1:]),
    ]
    return "\n".join(lines)


_LOSSES = ("contender", "mean", "sd", "diff", "se", "t", "p", "Holm p", "track-3", "in sigma")
_PREPOSITIONS = {st.TIES: "with", st.WINS: "against", st.LOSES: "to"}
_REACH = (
    "contender",
    "steps to baseline's final loss",
    "seconds to it",
    "seeds that reach it",
    "seconds a run",
)


def _loss_row(c: Contest, finding: Finding):
    ours = (c.contender, f"{c.mean:.4f}", f"{c.sd:.4f}")
    sigmas = c.track_3 / finding.sigma if finding.sigma else math.nan
    track = (f"{c.track_3:+.4f}", f"{sigmas:+.1f}")
    if not c.verdict:
        return (*ours, "", "", "", "", "", *track)
    p = c.paired
    tests = (f"{p.difference:+.4f}", f"{p.se:.4f}", f"{p.t:+.2f}", f"{p.p:.3g}")
    return (*ours, *tests, f"{c.p_corrected:.3g}", *track)


def _reach_row(c: Contest, base: Contest, plan: Plan):
    seeds = f"{c.reached} of {len(c.losses)}"
    if not c.reached:
        return (c.contender, "not reached", "-", seeds, f"{c.seconds:.1f}")
    steps = f"{c.reach_steps:,.0f} of {plan.base.steps:,}"
    return (c.contender, steps, f"{c.reach_seconds:.1f}", seeds, f"{c.seconds:.1f}")


def _settings(contests):
    for c in contests:
        yield f"{c.contender}: best of {len(c.choice.losses)} is {c.choice.setting}"
        diverged = sum(not math.isfinite(loss) for loss in c.choice.losses.values())
        if diverged:
            yield f"  {diverged} of its tuning runs diverged"
        for name, value in c.choice.edges.items():
            yield f"  AT THE EDGE of its grid: {name}={value}; a wider grid may do better"


def _verdict(c: Contest, base: Contest, study) -> str:
    against = f"{c.contender} {c.verdict}"
    if c.verdict == st.UNDECIDED:
        if not np.isfinite(base.losses).all():
            return f"{against}: {base.contender} diverged"
        return f"{against}: {len(c.losses)} paired seeds, {st.FEWEST_PAIRS} are the fewest"
    against += f" {_PREPOSITIONS[c.verdict]} {base.contender}"
    bad = sum(not math.isfinite(loss) for loss in c.losses)
    if bad:
        return f"{against}: {bad} of {len(c.losses)} runs diverged"
    p = c.paired
    measured = f"{p.difference:+.4f} +- {p.se:.4f} (se), Holm p {c.p_corrected:.3g}"
    if c.verdict == st.TIES:
        return f"{against}: {measured}; a difference below {c.detectable:.4f} would not have shown"
    return f"{against}: {measured}"


def _aligned(rows) -> list[str]:
    """Columns to the right, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
