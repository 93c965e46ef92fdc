"""Messages between the supervisors of a job: JSON lines over TCP, signed with the job's token.

The leader listens on its training address. It greets with a nonce, so a recorded line is worth
nothing on another connection, and every line carries its number, so none can be played again.
"""

import hashlib
import hmac
import json
import os
import socket
import time

LINE_BYTES = 1 << 20
CONNECT_S = 3.0


class Refused(Exception):
    """A line was not signed with this job's token, or was out of order."""


class Channel:
    """One connection. Sends and takes messages without waiting."""

    def __init__(self, sock, token: str, nonce: str):
        sock.setblocking(False)
        self.sock, self._key, self.nonce = sock, token.encode(), nonce
        self._in, self._out, self._sent, self._taken = b"", b"", 0, 0

    def _sign(self, way: str, number: int, body: str) -> str:
        text = f"{self.nonce}|{way}|{number}|{body}".encode()
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()

    def send(self, message: dict, way: str) -> None:
        """Raises OSError where the other side is gone, or has taken nothing for 1 MiB."""
        body = json.dumps(message)
        self._out += f"{self._sign(way, self._sent, body)} {body}\n".encode()
        self._sent += 1
        if len(self._out) > LINE_BYTES:
            raise OSError("the other side takes nothing")
        try:
            self._out = self._out[self.sock.send(self._out) :]
        except BlockingIOError:
            pass

    def take(self, way: str) -> list[dict]:
        """Messages that have come. Raises OSError at the end of the stream, or Refused."""
        messages = []
        try:
            while data := self.sock.recv(1 << 16):
                self._in += data
            raise OSError("closed")
        except BlockingIOError:
            pass
        except OSError:
            if b"\n" not in self._in:
                raise
        *lines, self._in = self._in.split(b"\n")
        if len(self._in) > LINE_BYTES:
            raise Refused("a line of over 1 MiB")
        for line in lines:
            signature, _, body = line.decode(errors="replace").partition(" ")
            if not hmac.compare_digest(signature, self._sign(way, self._taken, body)):
                raise Refused("a message without this job's signature")
            self._taken += 1
            messages.append(json.loads(body))
        return messages

    def close(self) -> None:
        self.sock.close()


class Listener:
    """The leader's side: {host: latest report} from those who hold the token."""

    def __init__(self, address: str, port: int, token: str):
        self.token = token
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.socket(family, socket.SOCK_STREAM)
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._server.bind((address, port))
        self._server.listen(256)
        self._server.setblocking(False)
        self._channels: dict[Channel, int | None] = {}

    def reports(self) -> list[dict]:
        """What hosts have said since the last call."""
        self._accept()
        heard = []
        for channel in list(self._channels):
            try:
                for report in channel.take("up"):
                    self._channels[channel] = report["host"]
                    heard.append(report)
            except (OSError, Refused, ValueError, KeyError):
                self._drop(channel)
        return heard

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:  # no more, or no descriptor free for one: looked at in the next turn
                return
            nonce = os.urandom(16).hex()
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(f"{nonce}\n".encode())
            except OSError:  # reset already, as by a scan of ports: no host of this job
                sock.close()
                continue
            self._channels[Channel(sock, self.token, nonce)] = None

    def tell(self, wanted: dict) -> None:
        for channel, host in list(self._channels.items()):
            if host is not None:
                try:
                    channel.send(wanted, "down")
                except OSError:
                    self._drop(channel)

    def _drop(self, channel) -> None:
        channel.close()
        self._channels.pop(channel, None)

    def close(self) -> None:
        for channel in list(self._channels):
            self._drop(channel)
        self._server.close()


class Follower:
    """The other hosts' side: connects again whenever the link is gone or says nothing."""

    def __init__(self, address: str, port: int, token: str, silent_s: float = 5.0):
        self.where, self.token, self._silent_s = (address, port), token, silent_s
        self._channel, self._heard_at, self._try_at = None, 0.0, 0.0

    def exchange(self, report: dict) -> dict | None:
        """Sends a report; the leader's newest wish, or None where nothing has come."""
        now = time.monotonic()
        if self._channel is None:
            if now < self._try_at or not self._connect():
                return None
        wishes = []
        try:  # first what has come: a leader that ended may have left its last wish and a reset
            wishes = self._channel.take("down")
            self._channel.send(report, "up")
        except (OSError, Refused, ValueError):
            self.close()
        if wishes:
            self._heard_at = now
        elif now - self._heard_at > self._silent_s:
            self.close()
        return wishes[-1] if wishes else None

    def _connect(self) -> bool:
        self._try_at = time.monotonic() + 1.0
        try:
            sock = socket.create_connection(self.where, timeout=CONNECT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nonce = b""
            while not nonce.endswith(b"\n"):
                byte = sock.recv(1)
                if not byte:
                    raise OSError("closed")
                nonce += byte
        except OSError:
            return False
        self._channel = Channel(sock, self.token, nonce.decode().strip())
        self._heard_at = time.monotonic()
        return True

    def close(self) -> None:
        if self._channel:
            self._channel.close()
        self._channel = None


def endpoint(address: str, port: int) -> str:
    """`address:port`; an IPv6 address stands in brackets. Source: RFC 3986, 3.2.2."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def free_port(address: str) -> int:
    """A port of this address that nothing listens on now."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
