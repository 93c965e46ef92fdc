"""What a job does next, decided in one place: the supervisor of the first host.

Pure: reports go in with the time, wishes come out. Every wish is a state that hosts bring about,
so one that is lost or comes twice does no harm.
"""

import dataclasses
import statistics

from launch.host.exit_codes import PREEMPTED, STOPPED
from launch.host.root_cause import SURE, Cause, find_cause

NOW = "now"  # the reason of a stop that does not wait for a save, whatever was asked before
PHASE_LIMIT_S = {"train": None, "save": 600.0, "eval": 1800.0}  # None: Policy.stall_s
SETTLE_S = 1.5  # for the evidence of the other hosts
DUMP_S = 2.0  # for stacks to reach the log


@dataclasses.dataclass(frozen=True)
class Policy:
    """When a job gives up, waits or starts again. Times in seconds."""

    restarts: int = 3  # attempts after the first
    backoff_s: float = 2.0  # before the first restart; doubles up to 5 minutes
    on_loss: str = "wait"  # a host that stays away: wait for it, go on with "fewer", or "stop"
    wait_s: float = 3600.0  # how long to wait for hosts, and for the leader
    stall_s: float = 20.0  # without a step, and 5 times the usual step
    start_s: float = 1800.0  # from start to the first step
    lost_s: float = 12.0  # of silence, until a host counts as lost
    grace_s: float = 120.0  # from SIGTERM to SIGKILL: a save fits in
    lease_s: float = 0.0  # the job ends when no operator is attached for this long; 0: detached


class Leader:
    """One job's course: gather -> run -> (settle -> kill -> pause -> gather)* -> end.

    Args:
        names: of the hosts, by index; 0 is the leader's own.
        new_coordinator: gives `address:port` for an attempt, never the port of the last.
        say: takes a line for the log.
    """

    def __init__(self, policy: Policy, names, new_coordinator, say, attempt=0, now=0.0):
        self.policy, self.names, self._new_coordinator = policy, names, new_coordinator
        self._say = say
        self.reports: dict[int, dict] = {}
        self._heard_at: dict[int, float] = dict.fromkeys(range(len(names)), now)
        self.attempt, self.restarts = attempt + 1, attempt
        self.state, self._since, self._not_before = "gather", now, now
        self.world: dict = {}
        self.cause: Cause | None = None
        self.outcome: dict | None = None
        self._stop: str | None = None
        self._stop_at = 0.0
        self._failures: set[tuple] = set()

    def hear(self, report: dict, now: float) -> None:
        self.reports[report["host"]] = report
        self._heard_at[report["host"]] = now
        stop = report.get("stop")
        if stop and (not self._stop or (stop == NOW and self._stop != NOW)):
            self._ask_stop(stop, now)

    def _ask_stop(self, why: str, now: float):
        self._stop, self._stop_at = why, now
        self._say(f"stopping: {why}")

    def decide(self, now: float) -> dict:
        """Takes the next step of the job's course; returns what all hosts shall do."""
        self._check_lease(now)
        getattr(self, f"_{self.state}")(now)
        do = {"gather": "kill", "pause": "kill", "settle": "run", "dump": "dump"}
        do = do.get(self.state, self.state)
        if self.state == "run" and self._stop:
            do = "kill" if self._stop == NOW or not self._can_save() else "term"
        return {"attempt": self.attempt, "do": do, "world": self.world, "outcome": self.outcome}

    def _go(self, state: str, now: float):
        self.state, self._since = state, now

    def _check_lease(self, now: float):
        leases = [report["lease_age_s"] for report in self.reports.values()]
        if self.policy.lease_s and leases and min(leases) > self.policy.lease_s and not self._stop:
            self._ask_stop("no operator is attached, and the run is not a detached one", now)

    def _can_save(self) -> bool:
        steps = [rank["step"] for report in self._members() for rank in report["ranks"]]
        beating = [rank["beats"] for report in self._members() for rank in report["ranks"]]
        return None in beating or any(steps)  # a program that does not beat may know SIGTERM

    def _members(self) -> list[dict]:
        hosts = self.world.get("members", [])
        return [self.reports[host] for host in hosts if host in self.reports]

    def _silent_s(self, now: float, hosts) -> dict:
        return {host: now - self._heard_at[host] for host in hosts}

    def _present(self, now: float) -> list[int]:
        silent = self._silent_s(now, range(len(self.names)))
        return [host for host in self.reports if silent[host] < self.policy.lost_s / 2]

    # --- the states

    def _gather(self, now: float):
        """Waits until every host is there with nothing of the job running.

        A host with a process that cannot be killed is as one that is away.
        """
        if self._stop:
            return self._end(now, STOPPED, self._stop)
        present = sorted(self._present(now))
        free = [host for host in present if self.reports[host]["clean"]]
        missing = sorted(set(range(len(self.names))) - set(free))
        waited = now - self._since
        if missing and waited > self.policy.wait_s:
            unclean = [self.names[host] for host in missing if host in present]
            away = [self.names[host] for host in missing if host not in present]
            why = f"{', '.join(away)} did not come" if away else ""
            if unclean:
                why += f"{' and ' * bool(why)}nothing could kill what runs on {', '.join(unclean)}"
            return self._end(now, 113, f"{why} within {self.policy.wait_s:.0f} s")
        patience = 2 * self.policy.lost_s
        fewer = self.policy.on_loss == "fewer" and waited > patience and self.attempt > 1
        if now < self._not_before or (missing and not fewer) or 0 in missing:
            return None
        self.world = {"members": free, "coordinator": self._new_coordinator()}
        self._say(f"attempt {self.attempt}: {' '.join(self.names[host] for host in free)}")
        self.cause = None
        return self._go("run", now)

    def _run(self, now: float):
        if self._stop and now - self._stop_at > self.policy.grace_s:
            self._say(f"no end within {self.policy.grace_s:.0f} s of being asked: killing")
            return self._end(now, STOPPED, self._stop)
        members = self._members()
        current = [r for r in members if r["attempt"] == self.attempt]
        codes = [rank["code"] for report in current for rank in report["ranks"]]
        all_here = len(current) == len(self.world["members"]) and None not in codes and codes
        if all_here and set(codes) == {0}:
            return self._end(now, 0, "done")
        if all_here and self._stop:
            saved = set(codes) <= {0, PREEMPTED}
            return self._end(now, PREEMPTED if saved else STOPPED, self._stop)
        if all_here and set(codes) <= {0, PREEMPTED}:
            return self._again(now, "preempted by a signal that was not ours", PREEMPTED)
        self.cause = self._find_cause(now)
        if self.cause:
            self._say(f"noticed: {self.cause.text.splitlines()[0]}")
            self._go("dump" if self.cause.kind == "stuck" else "settle", now)
        return None

    def _find_cause(self, now: float):
        hosts = self.world["members"]
        reports = {h: r for h in hosts if (r := self.reports[h])["attempt"] == self.attempt}
        silent = self._silent_s(now, hosts)
        stalls = {
            (host, rank["rank"]): rank["age_s"]
            for host, report in reports.items()
            for rank in report["ranks"]
            if rank["code"] is None and self._is_stalled(rank)
        }
        return find_cause(reports, silent, self.names, self.policy.lost_s, stalls)

    def _is_stalled(self, rank) -> bool:
        if rank["age_s"] is None:
            return False
        limit = PHASE_LIMIT_S.get(rank["phase"], self.policy.start_s)
        usual = [r["step_s"] for report in self._members() for r in report["ranks"]]
        return rank["age_s"] > (limit or max(self.policy.stall_s, 5 * statistics.median(usual)))

    def _dump(self, now: float):
        if now - self._since > DUMP_S:
            self._conclude(now)

    def _settle(self, now: float):
        """Looks on for a surer cause: a silent host is known as lost only after lost_s."""
        self.cause = min(self.cause, self._find_cause(now) or self.cause, key=lambda c: c.order)
        quiet = max(self._silent_s(now, self.world["members"]).values()) > SETTLE_S
        waiting = self.cause.order > SURE and quiet
        if now - self._since > SETTLE_S and not waiting:
            self._conclude(now)

    def _conclude(self, now: float):
        cause = self.cause
        self._say(f"ROOT CAUSE {cause.text}")
        mark = (cause.kind, cause.rank, cause.step)
        same = cause.kind in ("error", "memory") and mark in self._failures
        self._failures.add(mark)
        if self._stop:
            return self._end(now, cause.code, self._stop)
        if not cause.retry:
            return self._end(now, cause.code, cause.text)
        if same:
            text = f"the same failure at the same step twice: {cause.text}"
            return self._end(now, cause.code, text)
        if cause.kind == "lost" and self.policy.on_loss == "stop":
            return self._end(now, cause.code, cause.text)
        return self._again(now, cause.text, cause.code)

    def _again(self, now: float, why: str, code: int):
        """A restart; where none is left, the job's end with this code."""
        if self.restarts >= self.policy.restarts:
            return self._end(now, code, f"{why}\nno restart left of {self.policy.restarts}")
        pause = min(300.0, self.policy.backoff_s * 2**self.restarts)
        self.restarts += 1
        self.attempt += 1
        self._not_before = now + pause
        which = f"restart {self.restarts} of {self.policy.restarts}"
        self._say(f"{which} in {pause:.0f} s: {why.splitlines()[0]}")
        return self._go("gather", now)

    def _end(self, now: float, code=None, why=""):
        """Ends the job; hosts kill what is left of it. Once ended, it stays so."""
        if self.outcome:
            return
        self.outcome = {"code": code, "why": why, "attempts": self.attempt}
        self._say(f"END code {code}: {why.splitlines()[0]}")
        self._go("end", now)
