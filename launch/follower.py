"""Follows one host's log of a job, and copies it to this machine."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from launch.host.log import TAIL_BYTES, checksum, own_lines
from launch.host_process import HostProcess
from launch.inventory import Host
from launch.job import Job
from launch.log_copy import LogCopy, read_header
from launch.ssh import HostError, SshClient
from launch.terminal import indented, note

RENEW_S = 2.0  # between renewals of a job's lease
SILENT_S = 12.0  # a stream is killed after this; it sends at least a status every 2 s
STEADY_S = 30.0  # a stream that lasted this long is reopened without a growing pause

DELETED = "%d bytes of this log were deleted on the host before they could be copied here"
LOST = "the host lost the last %d bytes copied from its log; its log goes on below"


class Follower(threading.Thread):
    """Follows one host's log in a thread, and reopens the stream when it breaks.

    Args:
        events: takes (host, bytes of its log), or (host, the exception that ended this thread).
            While it is full, nothing is read from the host, but its job's lease is renewed.
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
                self._put(error)
                return
            lasted_s = time.monotonic() - start
            pause_s = 0.5 if lasted_s > STEADY_S else min(8.0, 2 * pause_s)
            if not self.ended:
                self._closing.wait(pause_s)
        self._put(b"")

    def _stream(self) -> None:
        """Follows until the job or the connection ends. Restarts a supervisor that has died."""
        request = {"op": "follow", "job": self.job.id}
        request |= {"offset": self._offset, "tail": checksum(self._tail)}
        process = self._process = self.client.start(self.host, request)
        gone = False
        threading.Thread(target=self._renew_lease, args=(process,), daemon=True).start()
        try:
            while header := process.readline():
                frame = read_header(header)
                if "error" in frame:
                    raise HostError(f"{self.host.name}: {indented(str(frame['error']))}")
                data = process.read(frame.get("bytes", 0))
                if len(data) < frame.get("bytes", 0):
                    break  # cut short: request again from the last complete frame
                self.heard_at, self.error = time.monotonic(), ""
                if data:
                    self._add(frame["at"], data)
                    continue
                gone = self._take_status(frame)
                if not frame["alive"]:  # the whole log has come
                    break
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
        self._put(gap_line + data)

    def _put(self, event: bytes | Exception) -> None:
        """Waits for room among the events. A host is not silent because nobody reads from it."""
        while not self._closing.is_set():
            try:
                return self.events.put((self.host, event), timeout=RENEW_S)
            except queue.Full:
                self.heard_at = time.monotonic()
                if self._process:
                    self._process.output.heard_at = self.heard_at

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
            if time.monotonic() - process.output.heard_at > SILENT_S:
                process.kill()  # TCP does not notice for minutes that packets are dropped
                return

    def close(self) -> None:
        self._closing.set()
        if self._process:
            self._process.kill()
