"""Following a job: every host's log as one stream, on this machine to the last byte."""

import collections
import json
import queue
import sys
import threading
import time

from launch.host.log import TAIL_BYTES, Lines, mark
from launch.job import Job
from launch.log_copy import Mirror
from launch.ssh import HostError

RENEW_S = 2.0
SILENT_S = 12.0  # of a stream that should speak every 2 s
AWAY_S = 20.0  # until an unreachable host is spoken of


GONE = b"launch: %d bytes of this log are gone there, and never came here\n"
LOST = b"launch: this host has lost %d bytes of its log that had come here; it goes on so\n"


class Follower(threading.Thread):
    """One host's stream, opened again where it broke off.

    Args:
        may_revive: says whether a supervisor that is gone shall be started again.
        whole: from the first byte that the host keeps, and nothing of it is stored here.

    Attributes:
        ended: nothing more will come; status: the newest; supervised: whether that was alive.
    """

    def __init__(self, fleet, job, host, events, may_revive, whole=False):
        super().__init__(daemon=True, name=f"follow {host.name}")
        self.fleet, self.job, self.host, self.events = fleet, job, host, events
        self.status: dict = {}
        self.heard_at, self.ended, self.error = time.monotonic(), False, ""
        self.supervised = False
        self._may_revive, self._closing, self._process = may_revive, threading.Event(), None
        self._mirror = None if whole else Mirror(job.log(host))
        self._offset = 0 if whole else self._mirror.end()  # of the next byte, in the host's log
        self._tail = b"" if whole else self._mirror.tail()

    def run(self):
        pause = 0.5
        while not self._closing.is_set() and not self.ended:
            began = time.monotonic()
            try:
                self._stream()
            except (HostError, OSError) as error:
                self.error = str(error)
            except Exception as error:  # of this program: a thread must not die in silence
                self.events.put((self.host, error))
                return
            pause = 0.5 if time.monotonic() - began > 30 else min(8.0, 2 * pause)
            if not self.ended:
                self._closing.wait(pause)
        self.events.put((self.host, b""))

    def _stream(self):
        """Until the job or the connection ends. A host that came back gets its supervisor back."""
        request = {"op": "follow", "job": self.job.id}
        request |= {"offset": self._offset, "tail": mark(self._tail)}
        process = self._process = self.fleet.open(self.host, request)
        self._spoken_at, gone = time.monotonic(), False
        renewal = threading.Thread(target=self._renew, args=(process,), daemon=True)
        renewal.start()
        try:
            while head := process.stdout.readline():
                self._spoken_at = time.monotonic()
                frame = json.loads(head)
                if "error" in frame:
                    raise HostError(f"{self.host.name}: {frame['error']}")
                self.heard_at, self.error = time.monotonic(), ""
                if "bytes" in frame:
                    data = process.stdout.read(frame["bytes"])
                    if len(data) < frame["bytes"]:
                        return  # cut short: asked for again from the last whole frame
                    self._take(frame["at"], data)
                else:
                    gone = self._note(frame)
        except (OSError, json.JSONDecodeError) as error:
            raise HostError(f"{self.host.name}: {error}") from None
        finally:
            process.kill()
            _, said = process.communicate()
        if gone:
            note(f"{self.host.name}: no supervisor is there (power loss?): starting it again")
            try:
                self.fleet.call(self.host, self.job.request(self.host) | {"again": True}, 30.0)
            except HostError as error:
                note(str(error))
        elif not self.ended:
            said = said.decode(errors="replace").strip()[-300:] or "nothing said"
            raise HostError(f"{self.host.name}: the connection ended: {said}")

    def _note(self, frame) -> bool:
        """Whether this host should have a supervisor and has none."""
        self.status, self.supervised = frame["status"], frame["alive"]
        gone = not frame["alive"] and not self.status.get("outcome")
        gone = gone and frame["known"] and self._may_revive(self)
        self.ended = not frame["alive"] and not gone
        return gone

    def _take(self, at: int, data: bytes):
        """Bytes of the log from offset `at` on: they follow on, or a line says why not."""
        line, replaced = b"", at < self._offset
        if at > self._offset:
            line = GONE % (at - self._offset)
        elif replaced:  # the host's log is no longer the one that was read
            same = self._same(at, data)
            at, data = at + same, data[same:]
            if not data:
                return
            line = LOST % (self._offset - at) if at < self._offset else b""
        if line:
            line = line if self._tail[-1:] in (b"", b"\n") else b"\n" + line
            self._tail = b""
        try:
            if self._mirror:
                self._mirror.add(at, data, line, replaced)
        except OSError as error:
            note(f"{self.host.name}: its log is shown, but no longer stored here: {error}")
            self._mirror = None
        self._offset, self._tail = at + len(data), (self._tail + data)[-TAIL_BYTES:]
        self.events.put((self.host, line + data))

    def _same(self, at: int, data: bytes) -> int:
        """How many of the bytes were read before, and are here."""
        held = self._mirror.read(at, self._offset - at) if self._mirror else b""
        pairs = enumerate(zip(held, data, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(held), len(data)))

    def _renew(self, process):
        while process.poll() is None and not self._closing.wait(RENEW_S):
            try:
                process.stdin.write(b"\n")
                process.stdin.flush()
            except (OSError, ValueError):  # its end has closed it
                return
            if time.monotonic() - self._spoken_at > SILENT_S:
                process.kill()  # a link that drops packets ends no connection by itself
                return

    def close(self):
        self._closing.set()
        if self._process:
            self._process.kill()


class Watch:
    """All followers of a job, and what is printed of them; a context, in which they follow.

    Args:
        as_json: prints {"host", "line"} objects in place of prefixed lines.
        whole: the log from its first byte on, to be read: nothing is stored and nothing started.
    """

    def __init__(self, fleet, job, as_json=False, whole=False):
        self.fleet, self.job, self._json, self._whole = fleet, job, as_json, whole
        self.events: queue.Queue = queue.Queue()
        more = (self.events, self._may_revive, whole)
        self.followers = [Follower(fleet, job, host, *more) for host in job.hosts]
        self._lines = {host: Lines(b"") for host in job.hosts}
        self._width = max(len(host.name) for host in job.hosts)
        self._away: set = set()
        self._causes = collections.deque(maxlen=8)

    def __enter__(self):
        for follower in self.followers:
            follower.start()
        return self

    def __exit__(self, *exc):
        for follower in self.followers:
            follower.close()

    def run(self) -> dict:
        """Prints the job until it ends; returns its outcome {"code", "why"}."""
        while True:
            try:
                host, data = self.events.get(timeout=0.5)
            except queue.Empty:
                outcome = self._outcome()
                if outcome:
                    return outcome
                self._tell_of_absence()
                continue
            if isinstance(data, Exception):
                raise HostError(f"{host.name}: cannot be followed: {data!r}") from data
            self.show(host, data)

    def _record(self) -> dict:
        """The job's, as it is now: another terminal may have seen its end."""
        return Job(self.job.id).record

    def _may_revive(self, follower) -> bool:
        """A supervisor is started again for a job that began, and for all that is known lives."""
        record, first = self._record(), self.followers[0]
        live = record.get("begun") and not record.get("outcome") and not self._whole
        return live and (follower is first or first.supervised)

    def show(self, host, data: bytes):
        for line in self._lines[host].feed(data).splitlines():
            text = line.decode(errors="replace")
            if text.startswith("launch: ROOT CAUSE "):
                self._causes.append(text.removeprefix("launch: ROOT CAUSE "))
            if self._json:
                print(json.dumps({"host": host.name, "line": text}), flush=True)
            else:
                print(f"{host.name:{self._width}} | {text}", flush=True)

    def _outcome(self):
        """The first host's; where it is gone for good, another's that gave up waiting."""
        first, *others = self.followers
        if not all(f.ended or self._is_away(f) for f in self.followers):
            return None
        said = [f.status["outcome"] for f in self.followers if f.status.get("outcome")]
        outcome = said[0] if said else self._record().get("outcome")
        if outcome:
            return outcome | {"causes": list(self._causes)}
        if first.ended:
            raise HostError(
                f"no host can say how job {self.job.id} ended: what they held of it is gone. "
                f"What came of its log is in {self.job.folder}."
            )
        return None

    def _is_away(self, follower) -> bool:
        return time.monotonic() - follower.heard_at > AWAY_S and bool(follower.error)

    def _tell_of_absence(self):
        """Says once which hosts are out of reach, or that this machine is offline."""
        away = {f.host: f.error for f in self.followers if self._is_away(f)}
        for host in away.keys() - self._away:
            # Of any other host's absence the first host's supervisor says what it means.
            first = host == self.followers[0].host and len(away) < len(self.followers)
            cause = "ROOT CAUSE " if first else ""
            note(f"{cause}{host.name}: out of reach from here for {AWAY_S:.0f} s: {away[host]}")
            if len(away) == len(self.followers):
                note("no host answers: this machine may be offline; the job does not need it")
        for host in self._away - away.keys():
            note(f"{host.name}: back")
        self._away = set(away)


def note(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
