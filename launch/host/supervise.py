"""Supervises a job on one host: owns its processes, its log and its status.

A supervisor is two processes: the keeper, launch.host.keeper, and the worker, which is here.
"""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from launch.host import processes
from launch.host.channel import FollowerChannel, LeaderChannel
from launch.host.exit_codes import LOST_LEADER
from launch.host.files import read_json, write_json
from launch.host.interfaces import endpoint, free_port, interface_of
from launch.host.log import SEGMENTS, Log, own_lines
from launch.host.ranks import MARGIN_S, LocalRanks
from launch.host.restart_policy import JobController, Policy
from launch.host.root_cause import lost_hosts
from launch.host.webhook import VARIABLE, Webhook

TURN_S = 0.1
REPORT_S = 0.5
STATUS_S = 2.0
RESERVE, RESERVE_BYTES = "reserve", 1 << 16  # disk space reserved for the outcome
# How long to wait for disk space: without a stored outcome, the next `attach` restarts the job.
OUTCOME_S, RETRY_S = 86_400.0, 1.0
UNKILLABLE_S = 30.0  # a process that survives SIGKILL for this long hangs in the kernel
ALERTS_S = 10.0  # how long the end of the job waits for its alerts to be sent
FAREWELL_S = 10.0  # how long the leader waits for the other hosts to learn the outcome


def oom_kills() -> int:
    """Returns how many processes the kernel has killed for lack of memory. Source: /proc/vmstat."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


class Supervisor:
    """A worker: runs the job on this host until it ends.

    Args:
        folder: the job's folder: job.json, log/, status.json, lease, stop.
        fate: what happened to an earlier worker, such as "was killed"; "" if there was none.
        life: a pipe to the keeper that gets a byte at every report; None without a keeper.
    """

    def __init__(self, folder: Path, fate: str = "", life: int | None = None):
        self.folder, self.job = folder, read_json(folder / "job.json")
        self.policy = Policy(**self.job["policy"])
        self.me = self.job["me"]
        self.log = Log(folder / "log", (self.policy.log_mib << 20) // SEGMENTS)
        self._silent_s = self.policy.stopped_s + MARGIN_S
        self.ranks = LocalRanks(self.job, folder, self.log, self._silent_s)
        self.names = [host["name"] for host in self.job["hosts"]]
        self._fate, self._life, self._oom_kills = fate, life, oom_kills()
        self._paused_s = 0.0  # for which this process did not run, during the attempt
        self._target: dict[str, Any] = {"attempt": 0, "do": "kill", "world": {}, "outcome": None}
        self._target_at = now = time.monotonic()
        self._reported_at = self._written_at = 0.0
        self._outcome_at = self._finished_at = 0.0  # 0: not yet
        self._lease, self._lease_at = 0, now  # its file's time, and when that was new
        with contextlib.suppress(OSError):
            (folder / RESERVE).write_bytes(os.urandom(RESERVE_BYTES))  # random: incompressible
        # The status is an earlier worker's, or from before a power loss. That attempt already ran
        # here and must not be started again.
        self.ranks.attempt = read_json(folder / "status.json").get("attempt", 0)
        self._warnings: list[str] = []  # of the webhook's thread, to be written to the log
        url = self.job.get("env", {}).get(VARIABLE, "") if self.me == 0 else ""
        self.webhook = Webhook(url, f"job {self.job['id']}", self._warnings.append)
        address, port, token = self.job["hosts"][0]["address"], self.job["port"], self.job["token"]
        self.controller = self.followers = self.leader = None
        if self.me == 0:
            new_coordinator = lambda: endpoint(address, free_port(address))
            self.followers = LeaderChannel(address, port, token)
            state = self.write_log, self.ranks.attempt, now, self._alert
            self.controller = JobController(self.policy, self.names, new_coordinator, *state)
            self.controller.kernel_state = self.followers.kernel_state
        else:
            self.leader = FollowerChannel(address, port, token)
        if unclaimed := self.job.get("unclaimed"):
            self.write_log(f"{self.names[self.me]}: {unclaimed}")
        if fate or self.ranks.attempt:
            ended = fate or "ended without an outcome (reboot or power loss?)"
            mark = "ROOT CAUSE " if self.me == 0 else ""  # the leader reports other hosts' causes
            name = self.names[self.me]
            text = f"{name}: its supervisor {ended}; a new one has started"
            self.write_log(f"{mark}{text}")
            self._alert("restarted", text)

    def write_log(self, text: str) -> None:
        """Writes a text to the log, with the time (UTC) at the end of its first line."""
        first, *rest = text.split("\n")
        line = f"{first}  [{time.strftime('%H:%M:%SZ', time.gmtime())}]"
        self.log.write(own_lines("\n".join([line, *rest])))

    def _alert(self, event: str, text: str) -> None:
        """Sends an alert, except those that the trainer sends itself, with its loss."""
        if not (self.job.get("beats") and event in ("stopped", "done")):
            self.webhook.send(event, text, job=self.job["id"])

    def report(self) -> dict[str, Any]:
        """Returns what the leader needs to know about this host."""
        now, living = time.monotonic(), self.ranks.living()
        return {
            "host": self.me,
            "attempt": self.ranks.attempt,
            "ranks": [rank.report(now) for rank in self.ranks.ranks],
            "clean": not living,
            "pids": living[:8],
            "oom_kills": oom_kills() - self._oom_kills,
            "orphaned": self._fate,
            "paused_s": self._paused_s,
            "has_address": self._has_address(),
            "lease_age_s": self._lease_age_s(now),
            "stop": self._stop_reason(),
            "knows": self._target["outcome"] is not None,
        }

    def _has_address(self) -> bool:
        """Returns whether this host has the address that it has in the inventory."""
        try:
            return bool(interface_of(self.job["hosts"][self.me]["address"]))
        except OSError:  # not known
            return True

    def _lease_age_s(self, now: float) -> float:
        """Returns the seconds since an attached operator was last seen to renew the lease.

        The file's time is only compared with its earlier time, so that setting the clock cannot
        end a job.
        """
        try:
            renewed = (self.folder / "lease").stat().st_mtime_ns
        except FileNotFoundError:  # the job was detached
            return 0.0
        if renewed != self._lease:
            self._lease, self._lease_at = renewed, now
        return now - self._lease_at

    def _stop_reason(self) -> str | None:
        try:
            return (self.folder / "stop").read_text().strip() or "the operator asked"
        except FileNotFoundError:
            return None

    def run(self) -> int:
        """Runs until the job has ended and its outcome is stored; returns its exit status."""
        while True:
            self.ranks.poll(TURN_S)
            while self._warnings:
                self.write_log(self._warnings.pop(0))
            now = time.monotonic()
            if now - self._reported_at >= REPORT_S:
                if now - self._reported_at > self._silent_s and self.ranks.all_killed():
                    self._paused_s = now - self._reported_at
                self._reported_at = now
                self._show_life()
                report = self.report()
                if self.controller:
                    self._lead(report, now)
                else:
                    self._follow(report, now)
                self._pursue_target()
                if now - self._written_at >= STATUS_S:
                    self._write_status(report)
            outcome = self._target["outcome"]
            if outcome and self._may_finish(now):
                stored = self._store_outcome(outcome)
                if stored or now - self._finished_at > OUTCOME_S:
                    if self.leader:
                        self.leader.exchange(self.report())  # the leader waits for it
                    self.webhook.close(ALERTS_S)
                    return outcome["code"]
                time.sleep(RETRY_S)

    def _show_life(self) -> None:
        """Shows the keeper and the watcher that this process runs."""
        self.ranks.show_life()
        if self._life is not None:
            with contextlib.suppress(OSError):  # the keeper is stopped and the pipe full
                os.write(self._life, b"\n")

    def _lead(self, report: dict[str, Any], now: float) -> None:
        """Decides the target from all hosts' reports, and sends it to them."""
        assert self.controller and self.followers
        for other in self.followers.receive_reports():
            self.controller.take_report(other, now)
        self.controller.take_report(report, now)
        self._target = self.controller.next_target(now)
        self.followers.send_target(self._target)

    def _follow(self, report: dict[str, Any], now: float) -> None:
        """Takes the leader's target. If the leader stays silent, kills the ranks, then gives up."""
        assert self.leader
        target = self.leader.exchange(report)
        if target:
            self._target, self._target_at = target, now
            return
        silent_s, lost_s = now - self._target_at, self.policy.lost_s + 3
        if silent_s > lost_s and not self._target["outcome"]:
            kernels = {0: self.leader.kernel_state(self.policy.lost_s)}
            [cause] = lost_hosts({0: silent_s}, lost_s, self.names, kernels)
            if self._target["do"] != "kill":
                self.write_log(f"{cause.headline}. Stopping this host's ranks")
            self._target = self._target | {"do": "kill"}
            if silent_s > self.policy.wait_s:
                self._target |= {"outcome": {"code": LOST_LEADER, "why": cause.text}}

    def _pursue_target(self) -> None:
        """Takes the next action towards the target; every action can safely be repeated."""
        do, attempt, world = self._target["do"], self._target["attempt"], self._target["world"]
        if do in ("run", "term", "dump") and attempt > self.ranks.attempt:
            if self.me in world["members"] and not self.ranks.living():
                self._fate, self._paused_s, self._oom_kills = "", 0.0, oom_kills()
                self.ranks.start(attempt, world)
        elif do == "term":
            self.ranks.signal_once(signal.SIGTERM)
        elif do == "dump":
            self.ranks.signal_once(signal.SIGUSR1)  # faulthandler writes the stacks of all threads
        elif do in ("kill", "end"):
            stuck = self.ranks.kill()
            self.ranks.attempt = max(self.ranks.attempt, attempt if do == "end" else 0)
            if stuck:
                pids = " ".join(map(str, stuck))
                self.write_log(f"cannot kill pids {pids}: they hang in the kernel. Reboot the host")

    def _may_finish(self, now: float) -> bool:
        """Returns whether the job's processes are gone and, for the leader, the others know."""
        self._outcome_at = self._outcome_at or now
        if now - self._outcome_at < UNKILLABLE_S and self.ranks.living():
            return False
        self._finished_at = self._finished_at or now
        if not self.controller or now - self._finished_at > FAREWELL_S:
            return True
        others = self.controller.reports.keys() - {self.me}
        silent_s = self.controller.silent_s(now, others)
        heard = [self.controller.reports[h] for h in others if silent_s[h] < self.policy.lost_s]
        return all(r["clean"] and r["knows"] for r in heard)  # else they would wait for wait_s

    def _store_outcome(self, outcome: dict[str, Any]) -> bool:
        """Writes the outcome, into the reserved space if need be; returns whether it succeeded."""
        stored = self._write_status(self.report(), outcome)
        with contextlib.suppress(OSError):
            (self.folder / RESERVE).unlink(missing_ok=True)
        return stored or self._write_status(self.report(), outcome)

    def _write_status(self, report: dict[str, Any], outcome: dict | None = None) -> bool:
        """Writes status.json; returns whether that succeeded: a full disk must not end the job."""
        status = processes.identify(os.getpid()) | {
            "job": self.job["id"],
            "host": self.names[self.me],
            "attempt": self._target["attempt"],
            "do": self._target["do"],
            "report": report,
            "outcome": outcome,
            "log_lost_bytes": self.log.lost_bytes,
            "written_s": time.monotonic(),  # unlike the file's time, it does not depend on the date
        }
        if self.controller:
            status["hosts"] = {self.names[h]: r for h, r in self.controller.reports.items()}
            status["state"] = self.controller.state
        self._written_at = time.monotonic()
        try:
            write_json(self.folder / "status.json", status)
        except OSError:
            return False
        return True
