"""Decides what a job does next. Only the first host's supervisor, the leader, does this.

It is pure: reports and the time go in, a target state comes out. Hosts act until they match the
target, so a target that is lost or arrives twice does no harm.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from launch.host.channel import UNKNOWN
from launch.host.exit_codes import PREEMPTED, STOPPED, UNREACHABLE
from launch.host.log import LIMIT_MIB
from launch.host.root_cause import SURE, Cause, find_cause

NOW = "now"  # the reason for a stop that does not wait for a save; it overrides earlier stops
# Longest time without a heartbeat, by phase. None: Policy.stall_s; other phases: Policy.start_s.
PHASE_LIMIT_S = {"train": None, "save": 600.0, "eval": 1800.0}
SETTLE_S = 1.5  # time for the other hosts' evidence to arrive
DUMP_S = 2.0  # time for stacks to reach the log
MAX_PAUSE_S = 300.0  # before a restart
Report = dict[str, Any]  # what launch.host.supervise.Supervisor.report returns


@dataclasses.dataclass(frozen=True)
class Policy:
    """When a job gives up, waits or restarts, and how much it logs. Times are in seconds."""

    restarts: int = 3  # attempts after the first
    backoff_s: float = 2.0  # before the first restart; doubles up to MAX_PAUSE_S
    on_loss: str = "wait"  # if a host stays away: "wait" for it, go on with "fewer", or "stop"
    wait_s: float = 3600.0  # how long to wait for hosts, and for the leader
    stall_s: float = 20.0  # without a step until a rank is stuck; at least 5 usual steps
    start_s: float = 1800.0  # from a rank's start to its first step
    lost_s: float = 12.0  # of silence until a host counts as lost
    stopped_s: float = 20.0  # that a rank may be stopped by a signal, as by a debugger
    grace_s: float = 120.0  # from SIGTERM to SIGKILL; must be long enough for a save
    lease_s: float = 0.0  # the job ends if no operator is attached for this long; 0: detached
    log_mib: int = LIMIT_MIB  # of log that a host stores, and that an operator's machine copies


class JobController:
    """The state machine of a job: gather -> run -> (settle or dump -> gather -> run)* -> end.

    gather: wait until every host is present and runs nothing of the job. run: watch the ranks.
    settle: something failed; wait for better evidence. dump: a rank is stuck; have all ranks write
    their stacks. end: the outcome is known.

    Args:
        names: the hosts' names, by index; 0 is the leader's own host.
        new_coordinator: returns the `address:port` of a new attempt's JAX coordinator. Each
            attempt needs a new port, as processes of the last one may still connect to the old.
        log: writes a text to the job's log.
        attempt: the number of the job's last attempt; 0 for a new job.
        now: seconds of a monotonic clock.
        alert: called with the event (stuck, restarted, failed, stopped, done) and a text.
    """

    def __init__(
        self,
        policy: Policy,
        names: Sequence[str],
        new_coordinator: Callable[[], str],
        log: Callable[[str], None],
        attempt: int = 0,
        now: float = 0.0,
        alert: Callable[[str, str], None] = lambda event, text: None,
    ):
        self.policy, self.names, self._new_coordinator = policy, names, new_coordinator
        self._log, self._alert = log, alert
        self.reports: dict[int, Report] = {}
        self._heard_at = dict.fromkeys(range(len(names)), now)
        # See LeaderChannel.kernel_state, which replaces it.
        self.kernel_state: Callable[[int, float], str] = lambda host, silent_s: UNKNOWN
        self.attempt, self.restarts = attempt + 1, attempt
        self.state, self._since, self._not_before = "gather", now, now
        self.world: dict[str, Any] = {}
        self.outcome: dict[str, Any] | None = None
        self._cause: Cause | None = None  # in the states settle and dump
        self._stop: str | None = None  # why the job is to stop
        self._stop_at = 0.0
        self._failures: set[tuple] = set()
        self._stopped: dict[tuple[int, int], float] = {}  # {(host, rank): seconds in state T}
        self._frozen_at = -math.inf  # when a rank was last seen stopped

    def take_report(self, report: Report, now: float) -> None:
        """Takes a host's report, and the operator's request to stop if the report carries one."""
        self.reports[report["host"]] = report
        self._heard_at[report["host"]] = now
        stop = report.get("stop")
        if stop and (not self._stop or (stop == NOW and self._stop != NOW)):
            self._begin_stop(stop, now)

    def _begin_stop(self, reason: str, now: float) -> None:
        self._stop, self._stop_at = reason, now
        self._log(f"stopping: {reason}")

    def next_target(self, now: float) -> dict[str, Any]:
        """Advances the state machine, and returns the target of all hosts.

        Returns:
            {"do": "run", "term" (save and stop), "dump" (write stacks), "kill" or "end",
            "attempt", "world": {"members", "coordinator"}, "outcome": None until the end}
        """
        leases = [report["lease_age_s"] for report in self.reports.values()]
        if self.policy.lease_s and leases and min(leases) > self.policy.lease_s and not self._stop:
            self._begin_stop("no operator is attached, and the job was not detached", now)
        if self.state == "gather":
            self._gather(now)
        elif self.state == "run":
            self._watch(now)
        elif self.state == "dump":
            if now - self._since > DUMP_S:
                self._handle_failure(now)
        elif self.state == "settle":
            self._settle(now)
        do = {"gather": "kill", "settle": "run"}.get(self.state, self.state)
        if self.state == "run" and self._stop:
            do = "term"
        return {"attempt": self.attempt, "do": do, "world": self.world, "outcome": self.outcome}

    def _enter(self, state: str, now: float) -> None:
        self.state, self._since = state, now

    def _can_save(self) -> bool:
        """Returns whether SIGTERM may lead to a save.

        It may once a rank has begun a step, and at any time in a program without a heartbeat.
        """
        ranks = [rank for report in self._members() for rank in report["ranks"]]
        return any(rank["beats"] is None or rank["step"] for rank in ranks)

    def _members(self) -> list[Report]:
        hosts = self.world.get("members", [])
        return [self.reports[host] for host in hosts if host in self.reports]

    def silent_s(self, now: float, hosts: Iterable[int]) -> dict[int, float]:
        """Returns {host: seconds since its last report}."""
        return {host: now - self._heard_at[host] for host in hosts}

    def _gather(self, now: float) -> None:
        """Waits until every host is present and runs nothing of the job, then starts an attempt.

        A host with a process that cannot be killed is treated as unreachable.
        """
        if self._stop:
            return self._end(now, STOPPED, self._stop)
        hosts = range(len(self.names))
        silent = self.silent_s(now, hosts)
        present = [h for h in hosts if h in self.reports and silent[h] < self.policy.lost_s / 2]
        free = [host for host in present if self.reports[host]["clean"]]
        missing = sorted(set(hosts) - set(free))
        waited = now - self._since
        if missing and waited > self.policy.wait_s:
            unclean = ", ".join(self.names[host] for host in missing if host in present)
            away = ", ".join(self.names[host] for host in missing if host not in present)
            reasons = [f"{away} did not report"] if away else []
            reasons += [f"nothing could kill what runs on {unclean}"] if unclean else []
            why = f"{' and '.join(reasons)} within {self.policy.wait_s:.0f} s"
            return self._end(now, UNREACHABLE, why)
        patience_s = 2 * self.policy.lost_s
        fewer = self.policy.on_loss == "fewer" and waited > patience_s and self.attempt > 1
        if now < self._not_before or (missing and not fewer) or 0 in missing:
            return
        self.world = {"members": free, "coordinator": self._new_coordinator()}
        self._log(f"attempt {self.attempt}: {' '.join(self.names[host] for host in free)}")
        self._cause, self._stopped = None, {}
        self._enter("run", now)

    def _watch(self, now: float) -> None:
        """Checks a running attempt for its end or a failure."""
        if self._stop and now - self._stop_at > self.policy.grace_s:
            grace = f"{self.policy.grace_s:.0f} s (--grace_s)"
            self._log(f"the ranks did not stop within {grace}: killing them")
            return self._end(now, STOPPED, self._stop)
        current = [report for report in self._members() if report["attempt"] == self.attempt]
        codes = [rank["code"] for report in current for rank in report["ranks"]]
        if codes and len(current) == len(self.world["members"]) and None not in codes:
            if set(codes) == {0}:
                return self._end(now, 0, "done")
            saved = set(codes) <= {0, PREEMPTED}
            if self._stop:
                return self._end(now, PREEMPTED if saved else STOPPED, self._stop)
            if saved:
                why = "preempted by a signal that the launcher did not send"
                return self._restart(now, why, PREEMPTED)
        if self._stop and (self._stop == NOW or not self._can_save()):
            return self._end(now, STOPPED, self._stop)  # what the hosts kill then is no failure
        self._watch_stopped(now)
        self._cause = self._find_cause(now)
        if self._cause:
            self._log(f"noticed: {self._cause.headline}")
            if self._cause.kind == "stuck":
                self._alert("stuck", self._cause.headline)
            self._enter("dump" if self._cause.kind == "stuck" else "settle", now)

    def _watch_stopped(self, now: float) -> None:
        """Logs when a rank is stopped by a signal, and when it goes on."""
        alive = {
            (report["host"], rank["rank"]): rank["stopped_s"]
            for report in self._members()
            for rank in report["ranks"]
            if rank["code"] is None and report["attempt"] == self.attempt
        }
        stopped = {place: seconds for place, seconds in alive.items() if seconds}
        name = lambda place: f"{self.names[place[0]]} rank {place[1]}"
        limit = f"{self.policy.stopped_s:.0f} s (--stopped_s)"
        for place in stopped.keys() - self._stopped.keys():
            self._log(f"{name(place)} is stopped by a signal (state T): waiting for it for {limit}")
        for place in (self._stopped.keys() - stopped.keys()) & alive.keys():
            self._log(f"{name(place)} was stopped for {self._stopped[place]:.0f} s and goes on")
        self._stopped = stopped
        self._frozen_at = now if stopped else self._frozen_at

    def _find_cause(self, now: float) -> Cause | None:
        hosts = self.world["members"]
        reports = {h: r for h in hosts if (r := self.reports[h])["attempt"] == self.attempt}
        stalls = {
            (host, rank["rank"]): rank["age_s"]
            for host, report in reports.items()
            for rank in report["ranks"]
            if rank["code"] is None and self._is_stalled(rank, now)
        }
        silent, policy = self.silent_s(now, hosts), self.policy
        lost = [host for host in hosts if silent[host] > policy.lost_s]
        kernels = {host: self.kernel_state(host, policy.lost_s / 2) for host in lost}
        limits = policy.lost_s, policy.stopped_s
        return find_cause(reports, silent, self.names, *limits, stalls, kernels)

    def _is_stalled(self, rank: dict, now: float) -> bool:
        if rank["age_s"] is None:  # the program writes no heartbeat
            return False
        limit_s = PHASE_LIMIT_S.get(rank["phase"], self.policy.start_s)
        if limit_s is None:
            step_s = [r["step_s"] for report in self._members() for r in report["ranks"]]
            limit_s = max(self.policy.stall_s, 5 * statistics.median(step_s))
        # While one rank is stopped, all others wait for it; afterwards they get their whole time.
        return min(rank["age_s"], now - self._frozen_at) > limit_s

    def _settle(self, now: float) -> None:
        """Waits for better evidence: a silent host is known to be lost only after lost_s."""
        assert self._cause
        self._cause = min(self._cause, self._find_cause(now) or self._cause, key=lambda c: c.order)
        silent = max(self.silent_s(now, self.world["members"]).values()) > SETTLE_S
        if now - self._since > SETTLE_S and not (silent and self._cause.order > SURE):
            self._handle_failure(now)

    def _handle_failure(self, now: float) -> None:
        """Reports the cause, then ends the job or restarts it."""
        assert self._cause
        cause = self._cause
        self._log(f"ROOT CAUSE {cause.text}")
        failure = (cause.kind, cause.rank, cause.step)
        repeated = cause.kind in ("error", "memory") and failure in self._failures
        self._failures.add(failure)
        if self._stop:
            return self._end(now, cause.code, self._stop)
        if repeated:
            why = f"the same failure at the same step twice: {cause.text}"
            return self._end(now, cause.code, why)
        is_lost = cause.kind in ("lost", "silent", "ended")
        if not cause.retry or (is_lost and self.policy.on_loss == "stop"):
            return self._end(now, cause.code, cause.text)
        self._restart(now, cause.text, cause.code)

    def _restart(self, now: float, why: str, code: int) -> None:
        """Starts another attempt; if none is left, ends the job with this exit status."""
        if self.restarts >= self.policy.restarts:
            limit = f"all {self.policy.restarts} restarts are used (--restarts)"
            return self._end(now, code, f"{why}\n{limit}")
        pause_s = min(MAX_PAUSE_S, self.policy.backoff_s * 2**self.restarts)
        self.restarts += 1
        self.attempt += 1
        self._not_before = now + pause_s
        which = f"restart {self.restarts} of {self.policy.restarts}"
        self._log(f"{which} in {pause_s:.0f} s: {why.splitlines()[0]}")
        self._alert("restarted", f"{which} in {pause_s:.0f} s: {why.splitlines()[0]}")
        self._enter("gather", now)

    def _end(self, now: float, code: int, why: str) -> None:
        """Ends the job for good. The hosts kill the processes that are left of it."""
        self.outcome = {"code": code, "why": why, "attempts": self.attempt}
        self._log(f"END code {code}: {why.splitlines()[0]}")
        event = "stopped" if self._stop else "failed" if code else "done"
        self._alert(event, f"ended with code {code} after attempt {self.attempt}: {why}")
        self._enter("end", now)
