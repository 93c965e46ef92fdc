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
CONNECT_S = 3.0
UP, DOWN = "up", "down"  # directions: to the leader, from the leader


class InvalidMessage(Exception):
    """A line without a valid signature, or one that is too long."""


class Channel:
    """One signed connection. Neither sending nor receiving blocks."""

    def __init__(self, sock: socket.socket, token: str, nonce: str):
        sock.setblocking(False)
        self.sock, self._key, self._nonce = sock, token.encode(), nonce
        self._received, self._unsent = b"", b""
        self._sent_count = self._received_count = 0

    def _sign(self, direction: str, number: int, body: str) -> str:
        text = f"{self._nonce}|{direction}|{number}|{body}".encode()
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()

    def send(self, message: dict[str, Any], direction: str) -> None:
        """Sends as much as the socket takes; the rest follows with the next message.

        Raises:
            OSError: the connection is gone, or 1 MiB waits because the other side does not read.
        """
        body = json.dumps(message)
        self._unsent += f"{self._sign(direction, self._sent_count, body)} {body}\n".encode()
        self._sent_count += 1
        if len(self._unsent) > LINE_BYTES:
            raise OSError("the other side does not read")
        try:
            self._unsent = self._unsent[self.sock.send(self._unsent) :]
        except BlockingIOError:
            pass

    def receive(self, direction: str) -> list[dict[str, Any]]:
        """Returns the messages that have arrived.

        Raises:
            OSError: the connection has ended.
            InvalidMessage: a line's signature is wrong.
        """
        messages = []
        try:
            while data := self.sock.recv(1 << 16):
                self._received += data
            raise OSError("closed")
        except BlockingIOError:
            pass
        except OSError:
            if b"\n" not in self._received:  # else return the lines that arrived before the end
                raise
        *lines, self._received = self._received.split(b"\n")
        if len(self._received) > LINE_BYTES:
            raise InvalidMessage("a line of over 1 MiB")
        for line in lines:
            signature, _, body = line.decode(errors="replace").partition(" ")
            if not hmac.compare_digest(
                signature, self._sign(direction, self._received_count, body)
            ):
                raise InvalidMessage("a message without this job's signature")
            self._received_count += 1
            messages.append(json.loads(body))
        return messages

    def acknowledged_s(self) -> float:
        """Returns the seconds since the other side's kernel last acknowledged something.

        A stopped process acknowledges nothing, but its kernel does. Source: tcp(7), tcp_info.
        """
        try:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
        except OSError:
            return math.inf
        return struct.unpack_from("I", info, 56)[0] / 1e3  # tcpi_last_ack_recv, ms

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

    def receive_reports(self) -> list[dict[str, Any]]:
        """Returns the reports that have arrived since the last call."""
        self._accept()
        reports = []
        for channel in list(self._host_of):
            try:
                for report in channel.receive(UP):
                    self._host_of[channel] = report["host"]
                    reports.append(report)
            except (OSError, InvalidMessage, ValueError, KeyError):
                self._drop(channel)
        return reports

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:  # nothing is waiting, or no file descriptor is free: try next time
                return
            nonce = os.urandom(16).hex()
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
                except OSError:
                    self._drop(channel)

    def acknowledged_s(self, host: int) -> float:
        """Returns the seconds since a host's kernel acknowledged something; inf if there is none.

        A host can have two connections for a moment: one that has broken, and a new one.
        """
        channels = [channel for channel, other in self._host_of.items() if other == host]
        return min((channel.acknowledged_s() for channel in channels), default=math.inf)

    def _drop(self, channel: Channel) -> None:
        channel.close()
        self._host_of.pop(channel, None)

    def close(self) -> None:
        for channel in list(self._host_of):
            self._drop(channel)
        self._server.close()


class FollowerChannel:
    """A follower's side: reconnects whenever the connection is lost or silent."""

    def __init__(self, address: str, port: int, token: str, silent_s: float = 5.0):
        self._leader, self._token, self._silent_s = (address, port), token, silent_s
        self._channel: Channel | None = None
        self._heard_at = self._try_at = 0.0

    def exchange(self, report: dict[str, Any]) -> dict[str, Any] | None:
        """Sends a report; returns the leader's newest target, or None if none has arrived."""
        now = time.monotonic()
        if self._channel is None and now >= self._try_at:
            self._channel = self._connect()
        if self._channel is None:
            return None
        targets = []
        try:
            # Receive first: a leader that has ended may have sent its last target, and sending to
            # it would make the kernel reset the connection and discard that target.
            targets = self._channel.receive(DOWN)
            self._channel.send(report, UP)
        except (OSError, InvalidMessage, ValueError):
            self.close()
        if targets:
            self._heard_at = now
        elif now - self._heard_at > self._silent_s:
            self.close()
        return targets[-1] if targets else None

    def _connect(self) -> Channel | None:
        self._try_at = time.monotonic() + 1.0
        try:
            sock = socket.create_connection(self._leader, timeout=CONNECT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nonce = b""
            while not nonce.endswith(b"\n"):
                byte = sock.recv(1)
                if not byte:
                    raise OSError("closed")
                nonce += byte
        except OSError:
            return None
        self._heard_at = time.monotonic()
        return Channel(sock, self._token, nonce.decode().strip())

    def close(self) -> None:
        if self._channel:
            self._channel.close()
        self._channel = None


def endpoint(address: str, port: int) -> str:
    """Returns `address:port`, with an IPv6 address in brackets. Source: RFC 3986, 3.2.2."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def free_port(address: str) -> int:
    """Returns a port of this address on which nothing listens now."""
    with bind_tcp(address) as probe:
        return probe.getsockname()[1]
