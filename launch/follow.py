"""Follows a job: merges the logs of all hosts into one stream and copies each to this machine."""

import collections
import json
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from launch.arguments import print_text
from launch.host.log import OWN, TAIL_BYTES, checksum, own_lines
from launch.host_process import HostProcess
from launch.inventory import Host
from launch.job import Job
from launch.log_copy import READ_BYTES, LogCopy, read_header
from launch.ssh import HostError, SshClient
from launch.terminal import indented, note, show, visible

RENEW_S = 2.0  # between renewals of a job's lease
SILENT_S = 12.0  # a stream is killed after this; it sends at least a status every 2 s
AWAY_S = 20.0  # an unreachable host is reported after this
STEADY_S = 30.0  # a stream that lasted this long is reopened without a growing pause

DELETED = "%d bytes of this log were deleted on the host before they could be copied here"
LOST = "the host lost the last %d bytes copied from its log; its log goes on below"
ROOT_CAUSE = "launch: ROOT CAUSE "  # how a supervisor's log line begins


class Follower(threading.Thread):
    """Follows one host's log in a thread, and reopens the stream when it breaks.

    Args:
        events: takes (host, bytes of its log), or (host, the exception that ended this thread).
        may_revive: whether a dead supervisor may be restarted; called with this follower.
        read_only: read the whole log from its first byte, and store nothing.

    Attributes:
        ended: nothing more will come.
        status: the host's newest status.
        supervised: a supervisor was alive at that time.
        error: why the host is unreachable; "" if it is not.
    """

    def __init__(
        self,
        client: SshClient,
        job: Job,
        host: Host,
        events: queue.Queue[tuple[Host, bytes | Exception]],
        may_revive: Callable[["Follower"], bool],
        read_only: bool = False,
    ):
        super().__init__(daemon=True, name=f"follow {host.name}")
        self.client, self.job, self.host, self.events = client, job, host, events
        self.status: dict[str, Any] = {}
        self.heard_at, self.ended, self.error = time.monotonic(), False, ""
        self.supervised = False
        self._may_revive, self._closing = may_revive, threading.Event()
        self._process: HostProcess | None = None
        self._copy = None if read_only else LogCopy(job.log(host), job.policy.log_mib << 20)
        self._offset = self._copy.end() if self._copy else 0  # of the next byte, in the host's log
        self._tail = self._copy.tail() if self._copy else b""

    def run(self) -> None:
        pause_s = 0.5
        while not self._closing.is_set() and not self.ended:
            start = time.monotonic()
            try:
                self._stream()
            except (HostError, OSError) as error:
                self.error = str(error)
            except Exception as error:  # a bug: the main thread must raise it
                self.events.put((self.host, error))
                return
            lasted_s = time.monotonic() - start
            pause_s = 0.5 if lasted_s > STEADY_S else min(8.0, 2 * pause_s)
            if not self.ended:
                self._closing.wait(pause_s)
        self.events.put((self.host, b""))

    def _stream(self) -> None:
        """Follows until the job or the connection ends. Restarts a supervisor that has died."""
        request = {"op": "follow", "job": self.job.id}
        request |= {"offset": self._offset, "tail": checksum(self._tail)}
        process = self._process = self.client.start(self.host, request)
        self._frame_at, gone = time.monotonic(), False
        threading.Thread(target=self._renew_lease, args=(process,), daemon=True).start()
        try:
            while header := process.readline():
                self._frame_at = time.monotonic()
                frame = read_header(header)
                if "error" in frame:
                    raise HostError(f"{self.host.name}: {indented(str(frame['error']))}")
                self.heard_at, self.error = time.monotonic(), ""
                if "bytes" in frame:
                    data = process.read(frame["bytes"])
                    if len(data) < frame["bytes"]:
                        return  # cut short: request again from the last complete frame
                    self._add(frame["at"], data)
                else:
                    gone = self._take_status(frame)
        except (OSError, ValueError) as error:
            raise HostError(f"{self.host.name}: {error}") from None
        finally:
            process.kill()
            process.close()
        if gone:
            note(f"{self.host.name}: its supervisor is gone (power loss?): starting a new one")
            try:
                self.client.call(self.host, self.job.request(self.host) | {"again": True}, 30.0)
            except HostError as error:
                note(str(error))
        elif not self.ended:
            raise process.explain(self.host)

    def _take_status(self, frame: dict[str, Any]) -> bool:
        """Returns whether this host should have a supervisor and has none."""
        self.status, self.supervised = frame["status"], frame["alive"]
        unfinished = not frame["alive"] and not self.status.get("outcome")
        gone = unfinished and frame["known"] and self._may_revive(self)
        self.ended = not frame["alive"] and not gone
        return gone

    def _add(self, offset: int, data: bytes) -> None:
        """Adds log bytes from `offset` on, after an explanation if they do not continue the log."""
        gap_line, replaced = b"", offset < self._offset
        if offset > self._offset:
            gap_line = own_lines(DELETED % (offset - self._offset))
        elif replaced:  # the host sends earlier bytes again, as its log was changed by a power loss
            same = self._count_same(offset, data)
            offset, data = offset + same, data[same:]
            if not data:
                return
            if offset < self._offset:
                gap_line = own_lines(LOST % (self._offset - offset))
        if gap_line:
            ends_line = self._tail[-1:] in (b"", b"\n")
            gap_line = gap_line if ends_line else b"\n" + gap_line
            self._tail = b""
        try:
            if self._copy:
                self._copy.add(offset, data, gap_line, replaced)
        except OSError as error:
            note(f"{self.host.name}: its log is shown but no longer stored here: {error}")
            self._copy = None
        self._offset, self._tail = offset + len(data), (self._tail + data)[-TAIL_BYTES:]
        self.events.put((self.host, gap_line + data))

    def _count_same(self, offset: int, data: bytes) -> int:
        """Returns how many of the first bytes equal those of the copy."""
        here = self._copy.read(offset, self._offset - offset) if self._copy else b""
        pairs = enumerate(zip(here, data, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(here), len(data)))

    def _renew_lease(self, process: HostProcess) -> None:
        """Renews the job's lease every RENEW_S; kills a stream that has become silent."""
        while process.is_running() and not self._closing.wait(RENEW_S):
            if not process.send(b"\n"):  # the stream has ended
                return
            if time.monotonic() - self._frame_at > SILENT_S:
                process.kill()  # TCP does not notice for minutes that packets are dropped
                return

    def close(self) -> None:
        self._closing.set()
        if self._process:
            self._process.kill()


class JobMonitor:
    """Follows all hosts of a job and prints their logs. A context manager.

    A line of a program's output stands after `host | `, a line of the launcher after `host # `.
    Control characters are escaped, but for colours.

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
        self.events: queue.Queue[tuple[Host, bytes | Exception]] = queue.Queue()
        options = (self.events, self._may_revive, read_only)
        self.followers = [Follower(client, job, host, *options) for host in job.hosts]
        self._rests = dict.fromkeys(job.hosts, b"")  # what has come of each host's last line
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
            if all(f.ended for f in self.followers) and self.events.empty():
                break
            try:
                host, data = self.events.get(timeout=left_s)
            except queue.Empty:
                break
            if isinstance(data, Exception):
                raise HostError(f"{host.name}: cannot be followed: {data!r}") from data
            self._print(host, data)
        outcome = self._outcome() if self.events.empty() else None
        if not outcome:
            self.report_absent_hosts()
        return outcome

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

    def _print(self, host: Host, data: bytes) -> None:
        *lines, rest = (self._rests[host] + data).split(b"\n")
        self._rests[host] = rest[-READ_BYTES:]
        for line in lines:
            is_own, text = line.startswith(OWN), line.removeprefix(OWN).decode(errors="replace")
            if is_own and text.startswith(ROOT_CAUSE):
                self._causes.append(text.removeprefix(ROOT_CAUSE))
            if self._json:
                source = "launch" if is_own else "program"
                show(json.dumps({"host": host.name, "from": source, "line": text}))
                continue
            place = f"{host.name:{self._width}} {'#' if is_own else '|'} "
            print_text(place + (text if self._raw else visible(text, colours=True)))

    def _outcome(self) -> dict[str, Any] | None:
        """Returns the outcome once every host has ended or is unreachable.

        It is the first host's or, if that is lost, that of another host, which gave up waiting.
        """
        if not all(f.ended or self._is_away(f) for f in self.followers):
            return None
        outcomes = [f.status["outcome"] for f in self.followers if f.status.get("outcome")]
        outcome = outcomes[0] if outcomes else self._stored_record().get("outcome")
        if outcome:
            return outcome | {"causes": list(self._causes)}
        if self.followers[0].ended:
            raise HostError(
                f"no host knows how job {self.job.id} ended: they no longer have its files. "
                f"The part of its log that was copied is in {self.job.folder}."
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
                note("no host answers: this machine may be offline. The job does not need it.")
        for host in self._away - away.keys():
            note(f"{host.name}: reachable again")
        self._away = set(away)
