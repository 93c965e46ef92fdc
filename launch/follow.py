"""Follows a job: merges the logs of all hosts into one stream and copies each to this machine."""

import collections
import json
import queue
import shlex
import time
from typing import Any

from launch.arguments import print_text
from launch.follower import Follower
from launch.host.log import OWN
from launch.inventory import Host
from launch.job import Job
from launch.ssh import HostError, SshClient
from launch.terminal import note, show, visible

AWAY_S = 20.0  # an unreachable host is reported after this
LINE_BYTES = 1 << 20  # of a longer line only the end is shown
EVENTS = 64  # parts of logs, of at most READ_BYTES each, that wait to be printed
ROOT_CAUSE = "launch: ROOT CAUSE "  # how a supervisor's log line begins


class JobMonitor:
    """Follows all hosts of a job and prints their logs. A context manager.

    A line of a program's output stands after `host | `, a line of the launcher after `host # `.
    Control characters are escaped, except those that choose colours.

    Args:
        as_json: print objects {"host", "from": "program" or "launch", "line"} instead.
        read_only: print the whole log from its first byte; store nothing and start nothing.
        raw: print all characters of the output as they are.
        width: of the column of host names; 0: of the longest name.
    """

    def __init__(
        self,
        client: SshClient,
        job: Job,
        as_json: bool = False,
        read_only: bool = False,
        raw: bool = False,
        width: int = 0,
    ):
        self.client, self.job = client, job
        self._json, self._read_only, self._raw = as_json, read_only, raw
        self.events: queue.Queue[tuple[Host, bytes | Exception]] = queue.Queue(EVENTS)
        options = (self.events, self._may_revive, read_only)
        self.followers = [Follower(client, job, host, *options) for host in job.hosts]
        self._rests = dict.fromkeys(job.hosts, b"")  # what has come of each host's last line
        self._lines: collections.deque[tuple[Host, bytes]] = collections.deque()  # to be printed
        self._width = width or max(len(host.name) for host in job.hosts)
        self._away: set[Host] = set()
        self._causes: collections.deque[str] = collections.deque(maxlen=8)

    def __enter__(self) -> "JobMonitor":
        for follower in self.followers:
            follower.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for follower in self.followers:
            follower.close()

    def run(self) -> dict[str, Any]:
        """Prints the job's log until it ends; returns its outcome {"code", "why", ...}."""
        while not (outcome := self.print_new()):
            pass
        return outcome

    def print_new(self, wait_s: float = 0.5) -> dict[str, Any] | None:
        """Prints what comes within wait_s; returns the outcome if the job has ended.

        Raises:
            HostError: a host cannot be followed, or no host knows how the job ended.
        """
        deadline = time.monotonic() + wait_s
        while (left_s := deadline - time.monotonic()) > 0:
            self._print_lines()  # Ctrl-C may have left some
            if all(f.ended for f in self.followers) and self.events.empty():
                break
            try:
                host, data = self.events.get(timeout=left_s)
            except queue.Empty:
                break
            if isinstance(data, Exception):
                raise HostError(f"{host.name}: cannot be followed: {data!r}") from data
            *lines, rest = (self._rests[host] + data).split(b"\n")
            self._rests[host] = rest[-LINE_BYTES:]
            self._lines.extend((host, line) for line in lines)
            self._print_lines()
        # In this order: a host that has ended sends no more events.
        if self._is_over() and self.events.empty() and (outcome := self._outcome()):
            return outcome
        self.report_absent_hosts()
        return None

    def _stored_record(self) -> dict[str, Any]:
        """Returns the job's record from disk: another terminal may have seen the job's end."""
        return Job(self.job.id).record

    def _may_revive(self, follower: Follower) -> bool:
        """Returns whether a dead supervisor may be restarted: the job began and may still run.

        Other hosts' supervisors need the first host's, so they are restarted only after it.
        """
        record, first = self._stored_record(), self.followers[0]
        if self._read_only or not record.get("begun") or record.get("outcome"):
            return False
        return follower is first or first.supervised

    def _print_lines(self) -> None:
        """Prints the lines that have come. A line that Ctrl-C interrupts is printed again."""
        while self._lines:
            host, line = self._lines[0]
            is_own, text = line.startswith(OWN), line.removeprefix(OWN).decode(errors="replace")
            if self._json:
                source = "launch" if is_own else "program"
                show(json.dumps({"host": host.name, "from": source, "line": text}))
            else:
                place = f"{host.name:{self._width}} {'#' if is_own else '|'} "
                print_text(place + (text if self._raw else visible(text, colours=True)))
            if is_own and text.startswith(ROOT_CAUSE):
                self._causes.append(text.removeprefix(ROOT_CAUSE))
            self._lines.popleft()

    def _is_over(self) -> bool:
        return all(f.ended or self._is_away(f) for f in self.followers)

    def _outcome(self) -> dict[str, Any] | None:
        """Returns the first host's outcome or, if that host was lost, that of another one.

        The latter says that the other host gave up waiting for the first one.
        """
        outcomes = [f.status["outcome"] for f in self.followers if f.status.get("outcome")]
        outcome = outcomes[0] if outcomes else self._stored_record().get("outcome")
        if outcome:
            return outcome | {"causes": list(self._causes)}
        if self.followers[0].ended:
            raise HostError(
                f"no host knows how job {self.job.id} ended: they no longer have its files. "
                f"`cat -v {shlex.quote(str(self.job.folder))}/*.log` shows what was copied of its "
                "log, which can contain control characters."
            )
        return None

    def _is_away(self, follower: Follower) -> bool:
        return time.monotonic() - follower.heard_at > AWAY_S and bool(follower.error)

    def report_absent_hosts(self) -> None:
        """Reports, once each, hosts that have become unreachable from here or have returned."""
        away = {f.host: f.error for f in self.followers if self._is_away(f)}
        for host in away.keys() - self._away:
            # If another host is away, the first host's supervisor reports the consequences.
            first = host == self.followers[0].host and len(away) < len(self.followers)
            mark = "ROOT CAUSE " if first else ""
            note(f"{mark}{host.name}: unreachable from here for {AWAY_S:.0f} s: {away[host]}")
            if len(away) == len(self.followers):
                lease_s = self.job.policy.lease_s
                when = f"{lease_s:.0f} s after all terminals lost contact"
                end = f"ends {when}, unless it was detached" if lease_s else "runs on without it"
                note(f"no host answers: this machine may be offline. The job {end}.")
        for host in self._away - away.keys():
            note(f"{host.name}: reachable again")
        self._away = set(away)
