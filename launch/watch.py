"""Following a job: every host's log as one stream, on this machine to the last byte."""

import collections
import json
import queue
import sys
import threading
import time

from launch.fleet import HostError
from launch.host.log import Lines

RENEW_S = 2.0
SILENT_S = 12.0  # of a stream that should speak every 2 s
AWAY_S = 20.0  # until an unreachable host is spoken of


class Follower(threading.Thread):
    """One host's stream, opened again where it broke off: the local log's size says where."""

    def __init__(self, fleet, job, host, events):
        super().__init__(daemon=True, name=f"follow {host.name}")
        self.fleet, self.job, self.host, self.events = fleet, job, host, events
        self.status: dict = {}
        self.heard_at, self.ended, self.error = time.monotonic(), False, ""
        self._closing, self._process = threading.Event(), None

    def run(self):
        pause = 0.5
        with open(self.job.log(self.host), "ab") as log:
            while not self._closing.is_set() and not self.ended:
                began = time.monotonic()
                try:
                    self._stream(log)
                except HostError as error:
                    self.error = str(error)
                pause = 0.5 if time.monotonic() - began > 30 else min(8.0, 2 * pause)
                if not self.ended:
                    self._closing.wait(pause)
        self.events.put((self.host, None))

    def _stream(self, log):
        """Until the job or the connection ends. A host that came back gets its supervisor back."""
        # Idempotent: it does nothing while the supervisor lives or once the job has ended.
        self.fleet.call(self.host, self.job.request(self.host), 30.0)
        request = {"op": "follow", "job": self.job.id, "offset": log.tell()}
        process = self._process = self.fleet.open(self.host, request)
        renewal = threading.Thread(target=self._renew, args=(process,), daemon=True)
        renewal.start()
        self.heard_at = time.monotonic()
        try:
            while head := process.stdout.readline():
                self.heard_at, self.error = time.monotonic(), ""
                frame = json.loads(head)
                if "error" in frame:
                    raise HostError(f"{self.host.name}: {frame['error']}")
                if "bytes" in frame:
                    data = process.stdout.read(frame["bytes"])
                    if len(data) < frame["bytes"]:
                        return  # cut short: asked for again from the last whole frame
                    log.write(data)
                    log.flush()
                    self.events.put((self.host, data))
                else:
                    self.status = frame["status"]
                    self.ended = not frame["alive"] and bool(self.status.get("outcome"))
        except (OSError, ValueError) as error:
            raise HostError(f"{self.host.name}: {error}") from None
        finally:
            process.kill()
            process.wait()
        if not self.ended:
            said = process.stderr.read().decode(errors="replace").strip()[-300:]
            raise HostError(f"{self.host.name}: the connection ended: {said or 'nothing said'}")

    def _renew(self, process):
        while process.poll() is None and not self._closing.wait(RENEW_S):
            try:
                process.stdin.write(b"\n")
                process.stdin.flush()
            except OSError:
                return
            if time.monotonic() - self.heard_at > SILENT_S:
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
    """

    def __init__(self, fleet, job, as_json=False):
        self.fleet, self.job, self._json = fleet, job, as_json
        self.events: queue.Queue = queue.Queue()
        self.followers = [Follower(fleet, job, host, self.events) for host in job.hosts]
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
            if data:
                self.show(host, data)

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
        if first.ended and all(f.ended or self._is_away(f) for f in others):
            return first.status["outcome"] | {"causes": list(self._causes)}
        if self._is_away(first) and others and all(f.ended or self._is_away(f) for f in others):
            ended = [f for f in others if f.ended]
            return ended[0].status["outcome"] if ended else None
        return None

    def _is_away(self, follower) -> bool:
        return time.monotonic() - follower.heard_at > AWAY_S and bool(follower.error)

    def _tell_of_absence(self):
        """Says once which hosts are out of reach, or that this machine is offline."""
        away = {f.host for f in self.followers if self._is_away(f)}
        for host in away - self._away:
            reason = next(f.error for f in self.followers if f.host == host)
            if len(away) == len(self.followers):
                note("no host answers: this machine may be offline; the job does not need it")
            else:
                # Of any other host's absence the first host's supervisor says what it means.
                mark = "ROOT CAUSE " if host == self.followers[0].host else ""
                note(f"{mark}{host.name}: out of reach from here for {AWAY_S:.0f} s: {reason}")
        for host in self._away - away:
            note(f"{host.name}: back")
        self._away = away


def note(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
