"""Messages between a job's supervisors: JSON lines over TCP, signed with the job's token.

The leader (the first host's supervisor) listens on its training address; the others, the followers,
connect to it. The leader greets each connection with a random nonce. A signature covers the nonce,
the direction, the line's number and its text, so a line cannot be forged without the token, nor
replayed on the same connection or on another one.
"""

import hashlib
import hmac
import json
import math
import os
import socket
import struct
import time
from typing import Any

from launch.host.interfaces import bind_tcp

LINE_BYTES = 1 << 20
NONCE_BYTES = 16
CONNECT_S = 3.0  # to connect, and for the greeting to arrive
# Anyone on the training network can connect. Those who have not proved that they have the token are
# disconnected at this age, and the oldest of them if there are more than this number.
STRANGER_S, STRANGERS = 10.0, 64
UP, DOWN = "up", "down"  # directions: to the leader, from the leader
RUNNING, CLOSED, UNKNOWN = "running", "closed", "unknown"  # see LeaderChannel.kernel_state
# The most probes that Linux allows. After the last one without an answer it resets the connection,
# which looks to the other side as if this process had ended.
PROBE_S, PROBES = 2, 127


class InvalidMessage(Exception):
    """A line without a valid signature, or one that is too long."""


class Channel:
    """One signed connection. Neither sending nor receiving blocks."""

    def __init__(self, sock: socket.socket, token: str, nonce: str):
        sock.setblocking(False)
        self.sock, self._key, self._nonce = sock, token.encode(), nonce
        self.opened_at = time.monotonic()
        self._received, self._unsent = b"", b""
        self._sent_count = self._received_count = 0

    def _sign(self, direction: str, number: int, body: bytes) -> bytes:
        text = f"{self._nonce}|{direction}|{number}|".encode() + body
        return hmac.new(self._key, text, hashlib.sha256).hexdigest().encode()

    def send(self, message: dict[str, Any], direction: str) -> None:
        """Sends as much as the socket takes; the rest follows with the next message.

        Raises:
            ConnectionError: the other side's kernel has closed the connection.
            OSError: the connection is broken, or 1 MiB waits as the other side does not read.
        """
        body = json.dumps(message).encode()
        self._unsent += self._sign(direction, self._sent_count, body) + b" " + body + b"\n"
        self._sent_count += 1
        if len(self._unsent) > LINE_BYTES:
            raise OSError("the other side does not read")
        try:
            self._unsent = self._unsent[self.sock.send(self._unsent) :]
        except BlockingIOError:
            pass

    def receive(self, direction: str) -> list[dict[str, Any]]:
        """Returns the messages that have arrived, from at most about 1 MiB a call.

        Raises:
            ConnectionError: the other side's kernel has closed the connection.
            OSError: the connection is broken.
            InvalidMessage: a line is too long, or its signature is wrong.
        """
        try:
            while len(self._received) <= LINE_BYTES:  # one who sends fast must not fill memory
                data = self.sock.recv(1 << 16)
                if not data:
                    raise ConnectionResetError("closed")
                self._received += data
        except BlockingIOError:
            pass
        except OSError:
            if b"\n" not in self._received:  # else return the lines that arrived before the end
                raise
        *lines, self._received = self._received.split(b"\n")
        if len(self._received) > LINE_BYTES:
            raise InvalidMessage("a line of over 1 MiB")
        return [self._verify(line, direction) for line in lines]

    def _verify(self, line: bytes, direction: str) -> dict[str, Any]:
        """Returns a line's message. The line is bytes until its signature is known to be right."""
        signature, _, body = line.partition(b" ")
        expected = self._sign(direction, self._received_count, body)
        if not hmac.compare_digest(signature, expected):
            raise InvalidMessage("a message without this job's signature")
        self._received_count += 1
        return json.loads(body)

    def acknowledged_s(self) -> float:
        """Returns the seconds since the other side's kernel last acknowledged something.

        A stopped process acknowledges nothing, but its kernel does. Source: tcp(7), tcp_info.
        """
        try:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
        except OSError:
            return math.inf
        return struct.unpack_from("I", info, 56)[0] / 1e3  # tcpi_last_ack_recv, ms

    def probe(self) -> None:
        """Makes the kernel ask the other side's, every PROBE_S, to acknowledge that it is up."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        values = {"TCP_KEEPIDLE": PROBE_S, "TCP_KEEPINTVL": PROBE_S, "TCP_KEEPCNT": PROBES}
        for name, value in values.items():
            self.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def close(self) -> None:
        self.sock.close()


class LeaderChannel:
    """The leader's side: receives all followers' reports, and sends them all the same target."""

    def __init__(self, address: str, port: int, token: str):
        self.token = token
        self._server = bind_tcp(address, port)
        self._server.listen(256)
        self._server.setblocking(False)
        self._host_of: dict[Channel, int | None] = {}  # None until its first valid report
        self._closed: set[int] = set()  # hosts that closed their connection and are not back

    def receive_reports(self) -> list[dict[str, Any]]:
        """Returns the reports that have arrived since the last call."""
        self._accept()
        reports = []
        for channel in list(self._host_of):
            try:
                for report in channel.receive(UP):
                    self._host_of[channel] = report["host"]
                    self._closed.discard(report["host"])
                    reports.append(report)
            except (OSError, InvalidMessage, ValueError, KeyError) as error:
                self._drop(channel, error)
        strangers = [channel for channel, host in self._host_of.items() if host is None]
        for i, channel in enumerate(reversed(strangers)):  # the newest first
            if i >= STRANGERS or time.monotonic() - channel.opened_at > STRANGER_S:
                self._drop(channel)
        return reports

    def _accept(self) -> None:
        for _ in range(STRANGERS):  # others wait in the kernel until the next time
            try:
                sock, _ = self._server.accept()
            except OSError:  # nothing is waiting, or no file descriptor is free: try next time
                return
            nonce = os.urandom(NONCE_BYTES).hex()
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(f"{nonce}\n".encode())
            except OSError:  # reset already, for example by a port scan
                sock.close()
                continue
            self._host_of[Channel(sock, self.token, nonce)] = None

    def send_target(self, target: dict[str, Any]) -> None:
        """Sends a target to every host that has proved by a signed report that it has the token."""
        for channel, host in list(self._host_of.items()):
            if host is not None:
                try:
                    channel.send(target, DOWN)
                except OSError as error:
                    self._drop(channel, error)

    def kernel_state(self, host: int, silent_s: float) -> str:
        """Returns what is known of a silent host from its kernel, which answers for its processes.

        Returns:
            RUNNING: it has acknowledged something within silent_s, so the host is up.
            CLOSED: it has closed the last connection, so the supervisor has ended.
            UNKNOWN: neither, as after a loss of power or of the network.
        """
        # A host can have two connections for a moment: one that has broken, and a new one.
        channels = [channel for channel, other in self._host_of.items() if other == host]
        if any(channel.acknowledged_s() < silent_s for channel in channels):
            return RUNNING
        return CLOSED if host in self._closed else UNKNOWN

    def _drop(self, channel: Channel, error: Exception | None = None) -> None:
        """Closes a connection, and notes its host if the error is that the host has closed it."""
        channel.close()
        host = self._host_of.pop(channel, None)
        if host is not None and isinstance(error, ConnectionError):
            if host not in self._host_of.values():
                self._closed.add(host)

    def close(self) -> None:
        for channel in list(self._host_of):
            self._drop(channel)
        self._server.close()


class FollowerChannel:
    """A follower's side: reconnects whenever the connection is lost or silent."""

    def __init__(self, address: str, port: int, token: str, silent_s: float = 5.0):
        self._leader, self._token, self._silent_s = (address, port), token, silent_s
        self._channel: Channel | None = None
        # A silent connection stays open until there is a new one: closing it would tell the leader
        # that this process has ended, while only one direction of the network may be cut.
        self._former: Channel | None = None
        self._heard_at = self._try_at = 0.0
        self._accepted_at = -math.inf  # when the leader's kernel last accepted a connection
        self._closed = False  # it has closed or refused one, and accepted none since

    def exchange(self, report: dict[str, Any]) -> dict[str, Any] | None:
        """Sends a report; returns the leader's newest target, or None if none has arrived."""
        now = time.monotonic()
        if self._channel is None and now >= self._try_at:
            self._channel = self._connect()
            if self._channel and self._former:
                self._former = self._former.close()
        if self._channel is None:
            return None
        targets = []
        try:
            # Receive first: a leader that has ended may have sent its last target, and sending to
            # it would make the kernel reset the connection and discard that target.
            targets = self._channel.receive(DOWN)
            self._channel.send(report, UP)
        except (OSError, InvalidMessage, ValueError) as error:
            self._closed = self._closed or isinstance(error, ConnectionError)
            self.close()
        if targets:
            self._heard_at = now
        elif self._channel and now - self._heard_at > self._silent_s:
            self._former, self._channel = self._channel, None
            self._former.probe()
        return targets[-1] if targets else None

    def _connect(self) -> Channel | None:
        """Returns a new connection; None if the leader does not greet in time."""
        self._try_at = time.monotonic() + 1.0
        try:
            sock = socket.create_connection(self._leader, timeout=CONNECT_S)
        except OSError as error:
            self._closed = self._closed or isinstance(error, ConnectionRefusedError)
            return None
        self._closed, self._accepted_at = False, time.monotonic()
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nonce = _receive_nonce(sock, time.monotonic() + CONNECT_S)
        except (OSError, ValueError) as error:
            self._closed = isinstance(error, ValueError)  # another service has the leader's port
            sock.close()
            return None
        self._heard_at = time.monotonic()
        return Channel(sock, self._token, nonce)

    def kernel_state(self, silent_s: float) -> str:
        """Returns what is known of a silent leader from its kernel, as LeaderChannel does.

        A kernel accepts connections for a process that a signal has stopped, up to a number. So
        the connection on which nothing came is probed, too.
        """
        if self._closed:
            return CLOSED
        channels = [channel for channel in (self._channel, self._former) if channel]
        is_up = any(channel.acknowledged_s() < silent_s for channel in channels)
        accepted_s = time.monotonic() - self._accepted_at
        return RUNNING if is_up or accepted_s < silent_s else UNKNOWN

    def close(self) -> None:
        for channel in (self._channel, self._former):
            if channel:
                channel.close()
        self._channel = self._former = None


def _receive_nonce(sock: socket.socket, deadline: float) -> str:
    """Returns the nonce of a leader's greeting.

    Raises:
        OSError: it has not arrived by the deadline, of the monotonic clock.
        ValueError: what arrived is not a greeting.
    """
    line = b""
    while len(line) < 2 * NONCE_BYTES + 1:
        sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        data = sock.recv(2 * NONCE_BYTES + 1 - len(line))
        if not data:
            raise OSError("closed")
        line += data
    return bytes.fromhex(line.decode("ascii")).hex()
