"""Stops jobs, and detaches from them."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

from launch.answers import COUNT, check
from launch.host.restart_policy import NOW
from launch.inventory import Host
from launch.job import Job
from launch.ssh import HostError, SshClient, errors_in
from launch.terminal import note

ASK_S = 30.0  # for a host to answer


def connect(job: Job) -> SshClient:
    """Returns a client for the job's hosts."""
    return SshClient(job.hosts, job.ssh_config)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores Ctrl-C, also in the ssh processes that are started meanwhile and inherit this."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def detach(jobs: Sequence[Job]) -> None:
    """Lets jobs go on without an operator.

    Raises:
        HostError: no host of a job answered. The other jobs are detached all the same.
    """
    errors = []
    for job in jobs:
        try:
            _send_to_all(connect(job), {"op": "detach", "job": job.id}, {}, "detached")
        except HostError as error:
            errors.append(f"{job.id}: {error}")
    if errors:
        raise HostError("\n".join(errors))


def stop_request(job: Job, why: str, kill: bool) -> dict[str, Any]:
    """Returns the request that stops a job on a host; `kill` does not wait for a save."""
    return {"op": "stop", "job": job.id, "why": why, "kill": kill}


def ask_to_stop(job: Job, why: str, kill: bool) -> tuple[list[str], list[str]]:
    """Asks every host to stop a job, so that an unreachable one does not keep it alive.

    Returns:
        (names of the hosts that do not have the job, texts about processes that survived)

    Raises:
        HostError: no host answered.
    """
    shape = {"known": bool, "left": [COUNT]}
    answers = _send_to_all(connect(job), stop_request(job, why, kill), shape, "stopped")
    left = [
        f"{host.name}: pids {' '.join(map(str, answer['left']))} of job {job.id} cannot be killed. "
        "They hang in the kernel: reboot the host"
        for host, answer in answers.items()
        if answer["left"]
    ]
    return [host.name for host, answer in answers.items() if not answer["known"]], left


def stop(jobs: Sequence[Job], now: bool) -> int:
    """Stops jobs, also those that another terminal is about to start.

    Raises:
        HostError: no host of a job answered, or processes cannot be killed. The other jobs are
            stopped all the same.
    """
    errors, why = [], NOW if now else "the operator asked"
    for job in jobs:
        try:
            job.change(stopped=why)  # first: who starts the job asks the hosts and then reads it
        except OSError as error:
            note(f"{job.folder}: the stop is not recorded here, but the hosts are asked: {error}")
        try:
            unknown, left = ask_to_stop(job, why, kill=False)
        except HostError as error:
            errors.append(f"{job.id}: {error}")
            continue
        errors += left
        if unknown:
            note(f"{' '.join(unknown)}: job {job.id} is not there, so nothing was stopped there")
        if not job.record.get("begun"):
            note(f"job {job.id} has not started. A terminal that is about to start it ends instead")
    if errors:
        raise HostError("\n".join(errors))
    return 0


def _send_to_all(
    client: SshClient, request: dict[str, Any], shape: Any, done: str
) -> dict[Host, Any]:
    """Sends a request to every host. One answer is enough: that host informs the first one.

    Args:
        shape: of an answer, see launch.answers; {} if it contains nothing to read.

    Returns:
        {host: its answer}, of those that answered.

    Raises:
        HostError: no host answered without an error.
    """

    def ask(host: Host) -> Any:
        answer = client.call(host, request, ASK_S)
        return check(host, answer, shape) if shape else answer

    answers = client.map(ask)
    errors = errors_in(answers)
    for error in errors:
        note(error)
    if len(errors) == len(answers):
        raise HostError(f"no host confirmed that the job was {done}. Try again.")
    return {host: a for host, a in answers.items() if not isinstance(a, HostError)}
