"""Finds the host and rank that caused a failure, which is rarely the one that noticed it first."""

import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from launch.host.channel import CLOSED, RUNNING, UNKNOWN
from launch.host.exit_codes import KILLED, PREEMPTED, REFUSED, STOPPED, STUCK, UNREACHABLE

# What a rank prints when another one has gone: gloo, NCCL and JAX's coordination service.
SECONDARY = re.compile(
    r"[Gg]loo|NCCL|nccl|[Cc]onnection (closed|reset|refused)|Socket closed"
    r"|[Cc]oordination ?[Ss]ervice|heartbeat timeout|distributed service detected"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED|Broken pipe"
)
ABORTED = 128 + signal.SIGABRT  # how JAX ends a process when its cluster is broken
SURE = 5  # causes up to this order need no further evidence
ADVICE = {  # what the operator can do, by kind of cause
    "lost": "Check that host's power and network.",
    "moved": "Correct its address in the inventory. If it is the first host, start the job again.",
    "silent": "Look for a `kill -STOP`, a debugger, a disk that does not answer, or a lack of CPU "
    "or memory on that host.",
    "ended": "See on that host whether it was rebooted (`last -x reboot`). If not, and if nobody "
    "killed it, look for the out-of-memory killer in `dmesg`. `attach JOB` starts it again.",
    "supervisor": "If nobody killed it, look for the out-of-memory killer in that host's `dmesg`.",
    "stopped": "Look for a debugger or a `kill -STOP` on that host.",
    "memory": "Use less host memory per process, or a host with more.",
    "signal": "If nobody sent it, look in that host's `dmesg`.",
    "refused": "The job is not restarted: correct what it reports, then start a new one.",
    "error": "`logs JOB` shows this rank's whole output.",
    "noticed": "Every rank blames another one: read the logs of all hosts.",
    "stuck": "`logs JOB` shows the stack of every rank at that moment.",
}


class Cause(NamedTuple):
    """A possible cause of a failure.

    Attributes:
        order: plausibility; the lowest value is the likeliest.
        kind: a key of ADVICE.
        headline: host, rank, step and what happened, in one line.
        output: the lines of the rank's output that name an error.
        code: the job's exit status if it ends because of this.
        retry: a restart may succeed.
    """

    order: float
    kind: str
    host: int
    rank: int | None
    step: int | None
    headline: str
    code: int
    retry: bool = True
    output: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Returns the headline, the output and what to do, for the operator."""
        return "\n    ".join([self.headline, *self.output, f"What to do: {ADVICE[self.kind]}"])


def find_cause(
    reports: Mapping[int, Mapping[str, Any]],
    silent_s: Mapping[int, float],
    names: Sequence[str],
    lost_s: float,
    stopped_s: float,
    stalls: Mapping[tuple[int, int], float],
    kernels: Mapping[int, str],
) -> Cause | None:
    """Returns the likeliest cause of what has gone wrong; None if nothing has.

    Args:
        reports: {host: its newest report}, for the members of the attempt.
        silent_s: {host: seconds since its last report}.
        names: the hosts' names, by index.
        lost_s: seconds of silence after which a host counts as lost.
        stopped_s: seconds after which a rank that a signal has stopped is a cause.
        stalls: {(host, rank): seconds without progress}, for ranks that are past their limit.
        kernels: {host: its kernel_state, see launch.host.channel}, for the hosts that are lost.
    """
    causes = [*lost_hosts(silent_s, lost_s, names, kernels), *_stuck_rank(reports, stalls, names)]
    for host, report in reports.items():
        if fate := report.get("orphaned"):
            headline = f"{names[host]}: its supervisor {fate}"
            kind = "silent" if fate.startswith(("hung", "was stopped")) else "supervisor"
            causes.append(Cause(1, kind, host, None, None, headline, KILLED))
        if paused_s := report.get("paused_s"):
            headline = f"{names[host]}: its supervisor did not run for {paused_s:.0f} s, so its "
            headline += "ranks were ended"
            causes.append(Cause(1, "silent", host, None, None, headline, KILLED))
        for rank in report["ranks"]:
            if silent_s.get(host, 0.0) <= lost_s:
                causes += _failures_of_rank(host, rank, report, names[host], stopped_s)
    if causes:
        causes += _moved_hosts(reports, names)
    return min(causes, key=lambda cause: (cause.order, cause.step or 0), default=None)


def _moved_hosts(reports, names) -> Iterator[Cause]:
    """Yields hosts without the address at which others reach them; alone that ends no job."""
    for host, report in reports.items():
        if not report.get("has_address", True):
            # The first host is the one that all others connect to.
            headline = f"{names[host]}: no longer has its address of the inventory"
            order = -1.0 if host == 0 else 4.8
            yield Cause(order, "moved", host, None, None, headline, UNREACHABLE)


def lost_hosts(
    silent_s: Mapping[int, float],
    lost_s: float,
    names: Sequence[str],
    kernels: Mapping[int, str],
) -> Iterator[Cause]:
    """Yields a cause for each host that has been silent for longer than lost_s; see find_cause."""
    for host, seconds in silent_s.items():
        if seconds <= lost_s:
            continue
        kind, what = {
            UNKNOWN: ("lost", f"unreachable for {seconds:.0f} s (power, network or sleep)"),
            RUNNING: ("silent", f"its supervisor sent nothing for {seconds:.0f} s; the host is up"),
            # A shutdown closes connections, and so does a kernel that has started again.
            CLOSED: (
                "ended",
                f"its supervisor ended and is not back after {seconds:.0f} s (killed, or the host "
                "was shut down or rebooted)",
            ),
        }[kernels[host]]
        yield Cause(0, kind, host, None, None, f"{names[host]}: {what}", UNREACHABLE)


def _failures_of_rank(host, rank, report, name, stopped_s) -> Iterator[Cause]:
    where, code = f"{name} rank {rank['rank']} at step {rank['step'] or 0}", rank["code"]
    output = tuple(rank["lines"])

    def cause(order, kind, happened, retry=True):
        headline, status = f"{where}: {happened}", code or STOPPED
        return Cause(order, kind, host, rank["rank"], rank["step"], headline, status, retry, output)

    if rank["stopped_s"] > stopped_s:
        happened = f"stopped by a signal (state T) for over {stopped_s:.0f} s (--stopped_s)"
        yield cause(2, "stopped", happened)
    if not code or code == PREEMPTED:
        return
    if code == KILLED and report.get("oom_kills"):
        yield cause(2, "memory", "killed by the kernel, out of memory")
    elif code > 128 and code != ABORTED:
        yield cause(3, "signal", f"ended by {signal_name(code - 128)}")
    elif code == REFUSED:
        # If one process has a problem, all may exit with its text, which names that process. So a
        # rank whose text names another process is not the cause.
        named = re.findall(r"\bprocess (\d+):", "\n".join(output))
        order = 4.5 if named and str(rank["rank"]) not in named else 4
        yield cause(order, "refused", f"refused to go on (exit {code})", retry=False)
    elif any(SECONDARY.search(line) for line in output):
        yield cause(7, "noticed", f"exit {code}, because of another rank")
    else:
        yield cause(4 if code != ABORTED else 6, "error", f"exit {code}")


def _stuck_rank(reports, stalls, names) -> Iterator[Cause]:
    """Yields the rank with the least progress, as all others wait for it."""
    if not stalls:
        return
    ranks = [(host, rank) for host, report in reports.items() for rank in report["ranks"]]
    ranks = [(host, rank) for host, rank in ranks if rank["code"] is None]
    host, rank = min(ranks, key=lambda pair: (pair[1]["beats"] or 0, pair[1]["rank"]))
    where = f"in {rank['phase']}; its stack is in the log"
    if not rank["beats"]:
        where = "before its first sign of life (in its imports?)"
    place, seconds = f"{names[host]} rank {rank['rank']}", max(stalls.values())
    headline = f"{place} at step {rank['step'] or 0}: stuck for {seconds:.0f} s {where}"
    yield Cause(5, "stuck", host, rank["rank"], rank["step"], headline, STUCK)


def signal_name(number: int) -> str:
    """Returns a signal's name, such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
