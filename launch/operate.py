"""What an operator does with a job that is on record: follows it, stops it, asks how it is."""

import contextlib
import json
import sys
import time

from launch.follow import Watch, note
from launch.host.restart_policy import NOW
from launch.job import Job, jobs_folder
from launch.ssh import Fleet, HostError

GONE_S = 30.0  # for the last processes to be seen gone


def follow(job, as_json, whole=False) -> int:
    """The job's log until its end; its exit status. Ctrl-C asks what to do.

    Args:
        whole: the log from its first byte on, as a reader: Ctrl-C ends the reading alone.

    Raises:
        ValueError: the job never started.
    """
    if not job.record.get("begun"):
        raise ValueError(
            f"job {job.id} never started: there is no log of it. `launch.run resume {job.id}` "
            "starts what it was to run."
        )
    fleet = Fleet(job.hosts, job.ssh_config)
    with Watch(fleet, job, as_json, whole) as watch:
        outcome = None
        while not outcome:
            try:
                outcome = watch.run()
            except KeyboardInterrupt:  # the followers live on: they renew the lease meanwhile
                if whole or _asked_to_leave(fleet, job):
                    return 0
    return conclude(fleet, job, outcome)


def _asked_to_leave(fleet, job) -> bool:
    """Detach or stop? True where the operator leaves the job to itself."""
    if not sys.stdin.isatty():
        stop(job, now=False)
        return False
    try:
        answer = input("\n[d]etach, [s]top after a save, or Enter to go on: ").strip().lower()
    except (EOFError, KeyboardInterrupt):
        answer = "s"
    if answer.startswith("s"):
        stop(job, now=False)
    if answer.startswith("d"):
        _tell(fleet, lambda host: fleet.call(host, {"op": "detach", "job": job.id}), "let go")
        note(f"it goes on: python -m launch.run attach {job.id}")
    return answer.startswith("d")


def conclude(fleet, job, outcome) -> int:
    """Sees that nothing of the job is left on any host, and says how it ended."""
    left = {}
    deadline = time.monotonic() + GONE_S
    while time.monotonic() < deadline:
        found = fleet.everywhere(lambda h: fleet.call(h, {"op": "status", "job": job.id}, 15))
        left = {
            h.name: f.get("processes") for h, f in found.items() if not isinstance(f, HostError)
        }
        if not any(left.values()):
            break
        time.sleep(0.5)
    unseen = [host.name for host in job.hosts if host.name not in left]
    alive = {name: pids for name, pids in left.items() if pids}
    job.change(outcome=outcome)
    note(f"job {job.id}: exit {outcome['code']} after {outcome.get('attempts', '?')} attempts")
    note(f"why: {outcome['why']}")
    gone = "no process of it is left on any host" if not unseen else f"not seen: {unseen}"
    note(f"STILL ALIVE {alive}" if alive else gone)
    return outcome["code"]


def ask_stop(fleet, job, host, why, kill):
    return fleet.call(host, {"op": "stop", "job": job.id, "why": why, "kill": kill}, 30)


def stop(job, now: bool) -> int:
    """Asks every host, so that one that is out of reach does not keep the job alive."""
    fleet = Fleet(job.hosts, job.ssh_config)
    why = NOW if now else "the operator asked"
    _tell(fleet, lambda host: ask_stop(fleet, job, host, why, False), "told to stop")
    return 0


def _tell(fleet, function, what: str) -> None:
    """Calls it on every host: one that has heard is enough, as the first host's takes it up."""
    answers = fleet.everywhere(function)
    for answer in answers.values():
        if isinstance(answer, HostError):
            note(str(answer))
    if all(isinstance(answer, HostError) for answer in answers.values()):
        raise HostError(f"no host answered: the job was not {what}. Try again.")


def refuse_while_alive(job) -> None:
    """Raises HostError unless every host says that nothing of the job lives there."""
    fleet, problems = Fleet(job.hosts, job.ssh_config), []
    found = fleet.everywhere(lambda host: fleet.call(host, {"op": "status", "job": job.id}, 20))
    for host, answer in found.items():
        if isinstance(answer, HostError):
            problems.append(str(answer))
        elif answer.get("alive") or answer["processes"]:
            problems.append(f"{host.name}: it still runs there")
    if problems:
        what = f"job {job.id} must have ended on every host before it is resumed: two jobs would "
        what += f"write to one run directory. `python -m launch.run stop {job.id}` ends it."
        raise HostError("\n".join([what, *problems]))


def status(job, as_json) -> int:
    """What each host says of the job."""
    fleet = Fleet(job.hosts, job.ssh_config)
    found = fleet.everywhere(lambda host: fleet.call(host, {"op": "status", "job": job.id}, 20))
    for host, answer in found.items():
        answer = {"error": str(answer)} if isinstance(answer, HostError) else answer
        if as_json:
            print(json.dumps({"host": host.name} | answer))
            continue
        ranks = answer.get("report", {}).get("ranks", [])
        steps = ", ".join(f"rank {r['rank']} step {r['step']} {r['phase']}" for r in ranks)
        state = answer.get("error") or (answer.get("outcome") or {}).get("why") or steps or "idle"
        alive = "supervised" if answer.get("alive") else "no supervisor"
        print(f"{host.name:12} attempt {answer.get('attempt', '-')}  {alive:13}  {state}")
    return 0


def list_jobs() -> int:
    for path in sorted(jobs_folder().iterdir()):
        with contextlib.suppress(ValueError):
            record = Job(path.name).record
            ended = record.get("outcome")
            state = (
                f"exit {ended['code']}: {ended['why'].splitlines()[0]}"
                if ended
                else "not seen to end"
                if record.get("begun")
                else "never started"
            )
            print(f"{path.name}  {' '.join(h['name'] for h in record['hosts'])}  {state}")
    return 0
