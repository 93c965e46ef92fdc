"""Commands for a job that was started: follow it, stop it, print its status."""

import contextlib
import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

from launch.answers import COUNT, Range, mismatch
from launch.follow import JobMonitor
from launch.host.exit_codes import INTERRUPTED, PREEMPTED, STOPPED
from launch.inventory import Host
from launch.job import Job, jobs_folder, name_of, read_jobs, sites_of
from launch.log_copy import OUTCOME
from launch.ssh import HostError, SshClient
from launch.stop import connect, detach, stop, uninterrupted
from launch.terminal import indented, note, show, warn

STOPPED_AS_ASKED = (PREEMPTED, STOPPED)  # exit statuses: with a save, without one
GONE_S = 30.0  # time for the last processes to end
OLD_S = 6.0  # a status is written every 2 s; an older one is shown with its age
PIDS_SHOWN = 8  # of the processes that a job has left on a host
SILENT_S = 15.0  # a supervisor whose status is older hangs, or cannot write
STATUS = {"outcome?": (None, OUTCOME), "processes": [COUNT], "alive?": bool}
RANK = {
    "rank": COUNT,
    "step": (COUNT, None),
    "phase": str,
    "ratios?": {str: Range(float, -1e9, 1e9)},
    "slow?": [str],
    "sites?": re.compile("[ -~]{0,200}"),  # who is left out or waited for
}
SHOWN = {  # what `status` prints; only that command refuses another
    "error?": str,
    "stopped?": bool,
    "age_s?": Range(float, 0, 1e9),
    "attempt?": COUNT,
    "report?": {"ranks?": [RANK]},
}


def follow(jobs: Sequence[Job], as_json: bool, read_only: bool = False, raw: bool = False) -> int:
    """Prints the log of a job, or of its job at each site, to the end. Ctrl-C asks what to do.

    Args:
        read_only: print the whole log from its first byte. Ctrl-C then only ends this command.
        raw: print control characters as they are.

    Returns:
        The exit status; of several jobs the first failure, then the first stop.

    Raises:
        ValueError: no job ever started.
        HostError: a job never started, or its outcome cannot be known. The other jobs are followed
            to their end first.
    """
    name, begun = name_of(jobs), [job for job in jobs if job.record.get("begun")]
    errors = [_never_started(job, job.id) for job in jobs if job not in begun]
    if not begun:
        raise ValueError(_never_started(jobs[0], name))
    codes: dict[str, int] = {}
    for error in errors:
        note(error)
    width = max(len(host.name) for job in begun for host in job.hosts)
    monitors = [JobMonitor(connect(j), j, as_json, read_only, raw, width) for j in begun]
    try:
        with contextlib.ExitStack() as stack:
            for monitor in monitors:
                stack.enter_context(monitor)
            while monitors:
                try:
                    _print_new(monitors, codes, errors)
                except KeyboardInterrupt:  # the followers go on and renew the lease meanwhile
                    if read_only or _ask_to_leave(monitors, name):
                        return 0
    except KeyboardInterrupt:  # a second one, before the first was handled
        note(f"interrupted. The job may still run: `launch.run attach {name}` follows it again")
        return INTERRUPTED
    if errors:
        raise HostError("\n".join(errors))
    return min(codes.values(), key=lambda code: (code == 0, code in STOPPED_AS_ASKED))


def _never_started(job: Job, name: str) -> str:
    """Returns why a job, or one of those that `name` stands for, cannot be followed."""
    why = (job.record.get("outcome") or {}).get("why", "there is no log")
    return f"job {name} never started: {why}. `launch.run resume {name}` starts its command."


def _print_new(monitors: list[JobMonitor], codes: dict[str, int], errors: list[str]) -> None:
    """Prints what is new; removes the monitors of jobs that have ended or cannot be followed.

    Args:
        codes: {job: its exit status}, to which those of jobs that have ended are added.
        errors: texts, to which those of jobs that cannot be followed are added.
    """
    for monitor in list(monitors):
        try:
            outcome = monitor.print_new(0.5 / len(monitors))
        except HostError as error:
            errors.append(str(error))
            monitors.remove(monitor)
            continue
        if outcome:
            codes[monitor.job.id] = conclude(monitor.client, monitor.job, outcome)
            monitors.remove(monitor)
            _note_running_sites(monitor.job, outcome, [m.job for m in monitors])


def _note_running_sites(job: Job, outcome: dict[str, Any], others: Sequence[Job]) -> None:
    """Prints what to do if one site's job has ended without success and others go on."""
    if outcome["code"] and others:
        note(f"{' '.join(other.id for other in others)}: still running")
        note(f"to continue this site: python -m launch.run resume {job.id}")
        note(f"to stop the other sites: python -m launch.run stop {job.record['parent']}")


def _ask_to_leave(monitors: Sequence[JobMonitor], name: str) -> bool:
    """Asks whether to detach from the jobs, stop them or go on; returns whether all are detached.

    A failure is printed: the jobs are still followed, and their leases renewed.
    """
    answer = "s"
    if sys.stdin.isatty():
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            question = "\n[d]etach, [s]top after a save, or Enter to go on: "
            answer = input(question).strip().lower()
    try:
        with uninterrupted():
            if answer.startswith("s"):
                stop([monitor.job for monitor in monitors], now=False)
            if answer.startswith("d"):
                detach([monitor.job for monitor in monitors])
                note(f"the job goes on; to follow it again: python -m launch.run attach {name}")
                return True
    except HostError as error:
        warn(f"error: {error}\nThe job is still followed. Ctrl-C asks again.")
    return False


def statuses(client: SshClient, job: Job, timeout_s: float = 20.0) -> dict[Host, Any]:
    """Returns {host: its status of the job, or the HostError in its place}."""
    request = {"op": "status", "job": job.id}

    def ask(host: Host) -> dict[str, Any]:
        answer = client.call(host, request, timeout_s)
        if problem := mismatch(answer, STATUS, "its answer"):
            raise HostError(f"{host.name}: the host sent a status that has no meaning: {problem}")
        return answer

    return client.map(ask)


def conclude(client: SshClient, job: Job, outcome: dict[str, Any]) -> int:
    """Waits until no process of the job is left on any host; prints and records how it ended.

    Returns:
        The job's exit status.
    """
    deadline, living = time.monotonic() + GONE_S, {}
    while time.monotonic() < deadline:
        living = {
            host.name: answer.get("processes")
            for host, answer in statuses(client, job, 15).items()
            if not isinstance(answer, HostError)
        }
        if not any(living.values()):
            break
        time.sleep(0.5)
    unseen = [host.name for host in job.hosts if host.name not in living]
    remaining = {name: pids for name, pids in living.items() if pids}
    job.change(outcome=outcome)
    note(f"job {job.id}: exit {outcome['code']} after {outcome.get('attempts', '?')} attempts")
    note(f"why: {outcome['why']}")
    if remaining:
        alive = "; ".join(f"{name}: {_list_pids(pids)}" for name, pids in remaining.items())
        note(f"STILL ALIVE, {alive}. To kill them: python -m launch.run stop {job.id} --now")
    elif unseen:
        note(f"{' '.join(unseen)}: unreachable, so processes may be left there")
    else:
        note("no process of the job is left on any host")
    return outcome["code"]


def refuse_while_alive(job: Job) -> None:
    """Raises HostError unless every host reports that no process of the job is left there."""
    problems = []
    for host, answer in statuses(connect(job), job).items():
        if isinstance(answer, HostError):
            problems.append(str(answer))
        elif answer.get("alive") or answer["processes"]:
            problems.append(f"{host.name}: the job is still running there")
    if problems:
        text = f"job {job.id} must have ended on every host before it is resumed: two jobs would "
        text += f"write to one run directory. `python -m launch.run stop {job.id}` ends it."
        raise HostError("\n".join([text, *problems]))


def status(jobs: Sequence[Job], as_json: bool) -> int:
    """Prints each host's status of a job, or of its jobs at all sites, each below a title."""
    for job in jobs:
        if len(jobs) > 1 and not as_json:
            show(f"{job.record['site']}: job {job.id}")
        _print_status(job, as_json)
    return 0


def _print_status(job: Job, as_json: bool) -> None:
    for host, answer in statuses(connect(job), job).items():
        answer: dict[str, Any] = {"error": str(answer)} if isinstance(answer, HostError) else answer
        if as_json:
            show(json.dumps(answer | {"host": host.name}))  # never in another host's name
            continue
        problem = mismatch(answer, SHOWN, "its answer")
        text = f"the host sent a status that has no meaning: {problem}" if problem else ""
        text = text or _describe(answer)
        show(f"{host.name:12} {indented(text)}")


def _describe(answer: dict[str, Any]) -> str:
    """Returns a status of the shape SHOWN as text."""
    ranks = answer.get("report", {}).get("ranks", [])
    steps = ", ".join(map(_describe_rank, ranks))
    why = (answer.get("outcome") or {}).get("why")
    state = answer.get("error") or why or steps or "idle"
    alive, age_s = "supervised" if answer.get("alive") else "no supervisor", answer.get("age_s", 0)
    if answer.get("stopped"):
        alive, state = "STOPPED", f"a signal has stopped its supervisor; before that: {state}"
    elif answer.get("alive") and age_s > SILENT_S:
        hint = "its supervisor hangs and will be replaced, or its disk is full"
        alive, state = "SILENT", f"{hint}. `stop --now` ends the job; before that: {state}"
    if why is None and age_s > OLD_S:
        state += f" ({_format_age(age_s)} ago)"
    if (left := answer.get("processes")) and (why is not None or not answer.get("alive")):
        state += f"; STILL ALIVE: {_list_pids(left)}"
    return f"attempt {answer.get('attempt', '-')}  {alive:13}  {state}"


def _list_pids(pids: Sequence[int]) -> str:
    more = " ..." if len(pids) > PIDS_SHOWN else ""
    return f"pids {' '.join(map(str, pids[:PIDS_SHOWN]))}{more}"


def _format_age(age_s: float) -> str:
    """Returns `90 s`, `30 min` or `2 h`."""
    sizes = {"h": 3600, "min": 60}
    unit = next((unit for unit, size in sizes.items() if age_s >= 2 * size), "s")
    return f"{age_s / sizes.get(unit, 1):.0f} {unit}"


def _describe_rank(rank: dict[str, Any]) -> str:
    """Returns `rank 1 step 40 train`, with what is known of other sites and of its slowness."""
    text = f"rank {rank['rank']} step {rank['step']} {rank['phase']}"
    ratios = [f"{kind} {ratio:.2f}x" for kind, ratio in rank.get("ratios", {}).items()]
    slow = [f"STRAGGLER in {kind}" for kind in rank.get("slow", [])]
    notes = "; ".join(filter(None, [rank.get("sites"), *slow, " ".join(ratios)]))
    return f"{text} ({notes})" if notes else text


def list_jobs() -> int:
    """Prints a line per job of this machine."""
    for path in sorted(jobs_folder().iterdir()):
        with contextlib.suppress(ValueError):  # a folder without a record
            if sites_of(path.name):
                ids = [job.id for job in read_jobs(path.name)]
                show(f"{path.name}  stands for {' '.join(ids)}")
                continue
            record = Job(path.name).record
            outcome = record.get("outcome")
            state = "running or not yet seen to end" if record.get("begun") else "never started"
            if outcome:
                ended = f"exit {outcome['code']}" if record.get("begun") else state
                why = outcome["why"].partition("\n")[0]
                state = f"{ended}: {why}"
            show(f"{path.name}  {' '.join(h['name'] for h in record['hosts'])}  {state}")
    return 0
