"""Which host and rank a failure began with: the one that caused it, not the first that noticed."""

import re
import signal
from typing import NamedTuple

from launch.host.exit_codes import NO_RETRY, PREEMPTED, STOPPED

# What a rank prints when another one has gone: gloo, NCCL and JAX's coordination service.
SECONDARY = re.compile(
    r"[Gg]loo|NCCL|nccl|[Cc]onnection (closed|reset|refused)|Socket closed"
    r"|[Cc]oordination ?[Ss]ervice|heartbeat timeout|distributed service detected"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED|Broken pipe"
)
ABORTED = 128 + signal.SIGABRT  # how JAX ends a process whose cluster is broken


class Cause(NamedTuple):
    """order: 0 is the surest; below SURE nothing more need be waited for."""

    order: float
    kind: str
    host: int
    rank: int | None
    step: int | None
    text: str
    code: int
    retry: bool = True


SURE = 5
STOPPED_S = 3.0  # a debugger that attaches stops a process for less


def find_cause(reports: dict, silent_s: dict, names: list, lost_s: float, stalls) -> Cause | None:
    """The likeliest root of what has gone wrong, or None where nothing has.

    Args:
        reports: {host: newest report}, of the members of the attempt.
        silent_s: {host: seconds since its report}.
        names: of the hosts.
        lost_s: silence after which a host counts as lost.
        stalls: {(host, rank): seconds without a beat} of ranks that are past their limit.
    """
    causes = [*_lost(silent_s, lost_s, names), *_stuck(reports, stalls, names)]
    for host, report in reports.items():
        if report.get("orphaned"):
            text = f"{names[host]}: its supervisor was killed"
            causes.append(Cause(1, "supervisor", host, None, None, text, 137))
        for rank in report["ranks"]:
            if silent_s.get(host, 0.0) <= lost_s:
                causes += _of_rank(host, rank, report, names[host])
    return min(causes, key=lambda cause: (cause.order, cause.step or 0), default=None)


def _lost(silent_s, lost_s, names):
    for host, seconds in silent_s.items():
        if seconds > lost_s:
            text = f"{names[host]}: unreachable for {seconds:.0f} s (power, network or sleep)"
            yield Cause(0, "lost", host, None, None, text, 113)


def _of_rank(host, rank, report, name):
    where, code = f"{name} rank {rank['rank']} at step {rank['step'] or 0}", rank["code"]
    make = lambda order, kind, text, retry=True: Cause(
        order, kind, host, rank["rank"], rank["step"], f"{where}: {text}", code or STOPPED, retry
    )
    said = "".join(f"\n    {line}" for line in rank["lines"])
    if rank["stopped_s"] > STOPPED_S:
        yield make(2, "stopped", "stopped by a signal (state T); it can only be killed")
    if not code or code == PREEMPTED:
        return
    secondary = any(SECONDARY.search(line) for line in rank["lines"])
    if code == 137 and report.get("oom_kills"):
        yield make(2, "memory", "killed by the kernel, out of memory" + said)
    elif code > 128 and code != ABORTED:
        yield make(3, "signal", f"ended by {signal_name(code - 128)}" + said)
    elif code == NO_RETRY:  # said by all where all must know: the process that it names is the one
        named = re.findall(r"\bprocess (\d+):", said)
        order = 4.5 if named and str(rank["rank"]) not in named else 4
        yield make(order, "refused", f"refused to go on (exit {code})" + said, retry=False)
    elif not secondary:
        yield make(4 if code != ABORTED else 6, "error", f"exit {code}" + said)
    else:
        yield make(7, "noticed", f"exit {code}, because of another rank" + said)


def _stuck(reports, stalls, names):
    """The rank that has come least far: all others wait for it."""
    if not stalls:
        return
    ranks = [(host, rank) for host, report in reports.items() for rank in report["ranks"]]
    ranks = [(host, rank) for host, rank in ranks if rank["code"] is None]
    host, rank = min(ranks, key=lambda pair: (pair[1]["beats"] or 0, pair[1]["rank"]))
    seconds = max(stalls.values())
    text = (
        f"{names[host]} rank {rank['rank']} at step {rank['step'] or 0}: stuck for {seconds:.0f} s"
    )
    where = f"in {rank['phase']}; its stack is in the log"
    text += f" {where if rank['beats'] else 'before its first sign of life (in its imports?)'}"
    yield Cause(5, "stuck", host, rank["rank"], rank["step"], text, 124)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
