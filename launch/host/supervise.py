"""The supervisor of a job on one host: owns its processes, its log and its status.

It is two processes. The keeper waits; the worker, its child, runs the job. A worker that is killed
leaves its children to the keeper, which ends them and starts another worker.
"""

import contextlib
import fcntl
import os
import signal
import time
import traceback
from pathlib import Path

from launch.host import processes as tree
from launch.host.channel import Follower, Listener, endpoint, free_port
from launch.host.exit_codes import LOST_LEADER
from launch.host.files import read_json, write_json
from launch.host.log import Log
from launch.host.ranks import Ranks
from launch.host.restart_policy import Leader, Policy

TURN_S = 0.1
REPORT_S = 0.5
STATUS_S = 2.0
KEEPER = "keeper"  # file that the keeper and its worker hold locked
WORKERS = 5  # lives of the worker; a host that kills more of them is not one to run on
FAILED = 71  # exit status of a worker that raised; supervisor.err says what
RESERVE, RESERVE_BYTES = "reserve", 1 << 16  # room for the outcome, should the disk be full
OUTCOME_S, RETRY_S = 86_400.0, 1.0  # to wait for more: who follows starts a job without outcome
UNKILLABLE_S = 30.0  # a process that lives on after SIGKILL sits in the kernel: wait no longer


def oom_kills() -> int:
    """Processes that this kernel has ended for want of memory. Source: /proc/vmstat."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


class Supervisor:
    """One worker's life. `folder` holds job.json, log/, status.json, lease, stop."""

    def __init__(self, folder: Path, orphaned: bool):
        self.folder, self.job = folder, read_json(folder / "job.json")
        self.policy = Policy(**self.job["policy"])
        self.me, self.leads = self.job["me"], self.job["me"] == 0
        self.log = Log(folder / "log")
        self.ranks = Ranks(self.job, folder, self.log)
        self.names = [host["name"] for host in self.job["hosts"]]
        self._orphaned, self._oom = orphaned, oom_kills()
        self._wish = {"attempt": 0, "do": "kill", "world": {}, "outcome": None}
        self._wished_at = time.monotonic()
        self._stuck_pids: list[int] = []
        self._over_at = 0.0
        self._told_at = self._ended_at = self._written_at = 0.0
        with contextlib.suppress(OSError):
            (folder / RESERVE).write_bytes(os.urandom(RESERVE_BYTES))  # that nothing compresses
        first = self.job["hosts"][0]
        former = read_json(folder / "status.json")  # of a worker or a power supply that failed
        self.ranks.attempt = former.get("attempt", 0)  # it is over here, not to be started anew
        if self.leads:
            attempt = former.get("attempt", 0)
            coordinator = lambda: endpoint(first["address"], free_port(first["address"]))
            self.listener = Listener(first["address"], self.job["port"], self.job["token"])
            self.leader = Leader(
                self.policy, self.names, coordinator, self.say, attempt, time.monotonic()
            )
        else:
            self.follower = Follower(first["address"], self.job["port"], self.job["token"])
        if orphaned:
            mark = "ROOT CAUSE " if self.leads else ""
            self.say(f"{mark}{self.names[self.me]}: its supervisor was killed; this is the next")

    def say(self, text: str) -> None:
        """A line of the log, with the time (UTC) at its end; what follows it is indented."""
        first, *rest = text.splitlines()
        line = f"launch: {first}  [{time.strftime('%H:%M:%SZ', time.gmtime())}]"
        self.log.write("\n".join([line, *rest, ""]).encode())

    def report(self) -> dict:
        now, left = time.time(), self.ranks.left()
        return {
            "host": self.me,
            "attempt": self.ranks.attempt,
            "ranks": [rank.report(now) for rank in self.ranks.ranks],
            "clean": not left,
            "pids": left[:8],
            "oom_kills": oom_kills() - self._oom,
            "orphaned": self._orphaned,
            "lease_age_s": self._lease_age_s(),
            "stop": self._stop_asked(),
            "knows": self._wish["outcome"] is not None,
            "time": now,
        }

    def _lease_age_s(self) -> float:
        try:
            return time.time() - (self.folder / "lease").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _stop_asked(self) -> str | None:
        try:
            return (self.folder / "stop").read_text().strip() or "the operator asked"
        except FileNotFoundError:
            return None

    def run(self) -> int:
        """Until the job's end; returns the job's exit status."""
        while True:
            self.ranks.turn(TURN_S)
            now = time.monotonic()
            if now - self._told_at >= REPORT_S:
                self._told_at = now
                report = self.report()
                self._consult(report, now)
                self._obey(now)
                if now - self._written_at >= STATUS_S:
                    self._write_status(report)
            outcome = self._wish["outcome"]
            if outcome and not self._waits_for(now):
                self._ended_at = self._ended_at or now
                if not self.leads or self._all_know() or now - self._ended_at > 10:
                    if self._keep(outcome) or now - self._ended_at > OUTCOME_S:
                        if not self.leads:
                            self.follower.exchange(self.report())  # for this the leader waits
                        return outcome["code"]
                    time.sleep(RETRY_S)

    def _keep(self, outcome: dict) -> bool:
        """Whether the outcome is on disk."""
        kept = self._write_status(self.report(), outcome)
        with contextlib.suppress(OSError):
            (self.folder / RESERVE).unlink(missing_ok=True)
        return kept or self._write_status(self.report(), outcome)

    def _waits_for(self, now: float) -> list[int]:
        """What lives of the job after its end, for as long as it may still die."""
        self._over_at = self._over_at or now
        return self.ranks.left() if now - self._over_at < UNKILLABLE_S else []

    def _consult(self, report: dict, now: float) -> None:
        if self.leads:
            for other in self.listener.reports():
                self.leader.hear(other, now)
            self.leader.hear(report, now)
            self._wish = self.leader.decide(now)
            self.listener.tell(self._wish)
            return
        wish = self.follower.exchange(report)
        if wish:
            self._wish, self._wished_at = wish, now
        elif now - self._wished_at > self.policy.lost_s + 3 and not self._wish["outcome"]:
            if self._wish["do"] != "kill":
                self.say(
                    f"{self.names[0]} is silent for {now - self._wished_at:.0f} s: stopping here"
                )
            self._wish = self._wish | {"do": "kill"}
            if now - self._wished_at > self.policy.wait_s:
                why = f"{self.names[0]} was away for {self.policy.wait_s:.0f} s"
                self._wish = self._wish | {"outcome": {"code": LOST_LEADER, "why": why}}

    def _all_know(self) -> bool:
        """Whether every host that still speaks knows the outcome: else it would wait for us."""
        others = [r for host, r in self.leader.reports.items() if host != 0]
        fresh = [r for r in others if time.time() - r["time"] < self.policy.lost_s]
        return all(r["clean"] and r["knows"] for r in fresh)

    def _obey(self, now: float) -> None:
        """Brings about what the leader wishes."""
        do, attempt, world = self._wish["do"], self._wish["attempt"], self._wish["world"]
        if do in ("run", "term", "dump") and attempt > self.ranks.attempt:
            if self.me in world["members"] and not self.ranks.left():
                self._orphaned, self._oom = False, oom_kills()
                self.ranks.start(attempt, world)
        elif do == "term":
            self.ranks.signal_once(signal.SIGTERM)
        elif do == "dump":
            self.ranks.signal_once(signal.SIGUSR1)  # faulthandler's: stacks of all threads
        elif do in ("kill", "end"):
            self._stuck_pids = self.ranks.end()
            self.ranks.attempt = max(self.ranks.attempt, attempt if do == "end" else 0)
            if self._stuck_pids:
                self.say(f"cannot kill {self._stuck_pids} (in the kernel): reboot this host")

    def _write_status(self, report: dict, outcome=None) -> bool:
        """Whether there was room for it: a full disk must not end the job."""
        status = {
            "job": self.job["id"],
            "host": self.names[self.me],
            "attempt": self._wish["attempt"],
            "do": self._wish["do"],
            "report": report,
            "outcome": outcome,
            "pid": os.getpid(),
            "started": tree.read_stat(os.getpid()).started,
            "boot": tree.boot_id(),
            "log_lost_bytes": self.log.lost_bytes,
        }
        if self.leads:
            status["hosts"] = {self.names[h]: r for h, r in self.leader.reports.items()}
            status["state"] = self.leader.state
        self._written_at = time.monotonic()
        try:
            write_json(self.folder / "status.json", status)
        except OSError:
            return False
        return True


def keep(folder: Path) -> int:
    """The keeper's life; 0 where a worker has brought the job to its end."""
    tree.adopt_orphans()
    for life in range(WORKERS):
        worker = os.fork()
        if worker == 0:
            os._exit(_work(folder, orphaned=life > 0))
        ended = _wait_for(worker)
        tree.end_all(lambda: tree.descendants(os.getpid()))
        if ended == 0:
            break
    return ended


def _wait_for(worker: int) -> int:
    while True:
        pid, status = os.wait()  # orphans of a killed worker come by here too
        if pid == worker:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code


def _work(folder: Path, orphaned: bool) -> int:
    tree.die_with_parent(signal.SIGKILL)
    tree.adopt_orphans()
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        Supervisor(folder, orphaned).run()
        return 0  # whatever the job's: that is in the status, and could be FAILED too
    except BaseException:
        with open(folder / "supervisor.err", "a") as file:
            traceback.print_exc(file=file)
        return FAILED


def start_detached(folder: Path) -> None:
    """Starts the keeper in a session of its own, which no end of a connection reaches."""
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    null, errors = (
        os.open(os.devnull, os.O_RDWR),
        os.open(folder / "supervisor.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
    )
    for number, target in ((0, null), (1, null), (2, errors)):
        os.dup2(target, number)
    os.closerange(3, 256)
    fcntl.flock(os.open(folder / KEEPER, os.O_RDWR | os.O_CREAT, 0o600), fcntl.LOCK_EX)
    os.chdir("/")
    os._exit(keep(folder))
