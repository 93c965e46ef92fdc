"""What a call of bench still has to run, in which order, and the plan of its minutes."""

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from pallas_kernels.bench_results import row_key
from pallas_kernels.contest import Contest
from pallas_kernels.search_space import SHORTLIST

TUNED_OPS = tuple(SHORTLIST["sm_86"])
CONTEST_S = 150.0  # a contest without tuning is killed after this time
TUNE_S = 60.0  # for the tiles of one contest, besides
FIRST_S = 30.0  # the first contest of a call starts only if as much is left


def choose_contests(contests: list[Contest], only: list[str] | None) -> list[Contest]:
    """Returns the contests whose name contains one of the texts; all if there is none.

    Raises:
        ValueError: no name contains a text.
    """
    names = [contest.name for contest in contests]
    if unknown := [text for text in only or () if not any(text in name for name in names)]:
        raise ValueError(
            f"--only must be part of a contest's name; got {', '.join(unknown)}. The contests are: "
            f"{', '.join(names)}."
        )
    return [c for c in contests if not only or any(text in c.name for text in only)]


class Job(NamedTuple):
    """One contest, at its default tiles or tuned."""

    contest: Contest
    tune: bool

    @property
    def tune_s(self) -> float:
        return TUNE_S if self.tune else 0.0

    @property
    def limit_s(self) -> float:
        """The time after which it is killed."""
        return CONTEST_S + self.tune_s


def is_done(job: Job, result: dict[str, Any], again: bool) -> bool:
    """Returns whether a job has its results; the forward's tiles come with both ways.

    A contest that hung counts as done, tuned too: it would take its whole limit in every call.

    Args:
        again: whether contests that hung are run again.
    """
    if job.tune and (job.contest.op not in TUNED_OPS or "forward" in job.contest.name):
        return True
    if "hung" in result and not again:
        return True
    is_tuned = "tried" in result and not result.get("untried")
    return bool(result.get("done")) and (is_tuned or not job.tune)


def order_contests(contests: Sequence[Contest], known: Collection[tuple]) -> list[Contest]:
    """Returns the contests in the order in which a call with little time should measure them.

    Those without a row in the table come first, and those of no shipped model last. The ops take
    turns. Attention's forward, of which the table has no row, comes after both ways.

    Args:
        known: row_key of the rows that this chip has with this minor series of JAX.
    """
    turns, places = Counter(), {}
    for contest in sorted(contests, key=lambda contest: "forward" in contest.name):
        group = not contest.shipped, row_key(contest) in known
        turns[group, contest.op] += 1
        places[contest.name] = *group, turns[group, contest.op]
    return sorted(contests, key=lambda contest: places[contest.name])


def _first_to_tune(contests):
    """Returns the first contest of each op with tiles, and of each width of attention's heads."""
    first = {}
    for contest in contests:
        masked = contest.documents or contest.window
        if contest.op in TUNED_OPS and contest.shipped and not masked:
            width = contest.shape[-1] if contest.op == "attention" else None
            first.setdefault((contest.op, width), contest)  # both ways come before the forward
    return list(first.values())


def open_jobs(
    contests: Sequence[Contest],
    stored: dict[str, Any],
    tune: bool,
    again: bool,
    known: Collection[tuple] = (),
) -> list[Job]:
    """Returns the jobs that are not done, in the order of order_contests.

    With `tune`, the first contest of each kind is measured and tuned before all others, so that a
    call with little time has tuned tiles of each kernel. The others are tuned at the end.
    """
    ordered = order_contests(contests, known)
    first = _first_to_tune(contests) if tune else []
    names = {contest.name for contest in first}
    rest = [contest for contest in ordered if contest.name not in names]
    jobs = [Job(contest, tuned) for contest in first for tuned in (False, True)]
    jobs += [Job(contest, tuned) for tuned in (False, True)[: 1 + tune] for contest in rest]
    return [job for job in jobs if not is_done(job, stored.get(job.contest.name, {}), again)]


def why_no_time(taken_s: Sequence[float], left_s: float, minutes: float) -> str:
    """Returns why no contest can start in the seconds that are left of `minutes`; "" if one can.

    Args:
        taken_s: how long the contests so far took. Another needs as much as the longest of them.
    """
    if left_s <= 0:
        return f"the {minutes:g} minutes are up"
    needed_s = max(taken_s, default=FIRST_S)
    if left_s >= needed_s:
        return ""
    left = f"only {left_s:.0f} s of the {minutes:g} minutes are left"
    return f"{left}, and a contest takes {needed_s:.0f} s"


def count_jobs(jobs: Sequence[Job]) -> list[str]:
    """Returns how many of the jobs are at the default tiles and how many tune, as texts."""
    defaults = sum(not job.tune for job in jobs)
    texts = {
        f"{defaults} contest{'s at their' if defaults > 1 else ' at its'} default tiles": defaults,
        f"{len(jobs) - defaults} to tune": len(jobs) - defaults,
    }
    return [text for text, count in texts.items() if count]


def plan_lines(jobs: Sequence[Job], minutes: float) -> list[str]:
    """Returns what is to run, the limits of its time, and which of it surely fits; [] of no jobs.

    Most contests take far less than their limit.
    """
    groups = (
        ("contests at their default tiles", [job for job in jobs if not job.tune]),
        ("tuned", [job for job in jobs if job.tune]),
    )
    counts = [
        f"{len(group)} {what}, at most {group[0].limit_s / 60:.1f} minutes each"
        for what, group in groups
        if group
    ]
    if not counts:
        return []
    ends = list(itertools.accumulate(job.limit_s / 60 for job in jobs))
    fits = sum(end <= minutes for end in ends)
    name = lambda job: f"{job.contest.name}{', tuned' * job.tune}"
    text = "all fit" if fits == len(jobs) else f"{fits} fit"
    text = {0: "none fits", 1: "1 fits"}.get(fits, text) + f" in {minutes:.1f} minutes"
    if fits == 1:
        text += f": {name(jobs[0])}"
    elif 1 < fits < len(jobs):
        text += f", the first {name(jobs[0])}, the last {name(jobs[fits - 1])}"
    return [f"plan: {'; '.join(counts)}; {ends[-1]:.1f} minutes in all", f"at these limits {text}"]
