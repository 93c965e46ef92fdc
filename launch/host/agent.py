"""Executes the operator's orders on this host: measure the network, read a nonce, read the clock.

Each host listens on its training address; to measure, it opens TCP connections to the peer that an
order names. Each connection begins with this session's token; one without it is closed.
"""

import concurrent.futures
import errno
import hmac
import json
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.host.facts import nonce_path, with_timeout
from launch.host.interfaces import bind_tcp, interface_of

CHUNK_BYTES = 1 << 18
HEADER = struct.Struct("!32scI")  # token; PING, SEND or RECEIVE; milliseconds
RESULT = struct.Struct("!Qd")  # bytes, seconds
STRANGER_S = 10.0  # a connection that is silent for this long, without the token, is closed
PING, SEND, RECEIVE = b"p", b"s", b"r"


def serve_orders(request: dict, answer: Callable[[dict], None], facts: dict) -> None:
    """Listens, answers `facts` with {"listens_on": port} added, then serves one order per line.

    Orders are JSON lines on standard input; the agent ends when that is closed:
        {"do": "measure", "peer": [address, port], "streams": n, "seconds": s, "both": bool, ...}
            is answered by "rtt_s" (sorted) and, if traffic was sent, bytes and bytes per second.
        {"do": "read", "folder", "nonce"} is answered by {"same": whether the nonce was found}.
        {"do": "forget", "folder", "nonce"} deletes the nonce.
        {"do": "time"} is answered by {"time": this host's clock}.
        {"do": "listen", "address", "port"} also accepts peers there.

    Args:
        facts: this host's facts, see launch.host.facts; {} if none were requested.
    """
    token = request["token"].encode()
    try:
        server = bind_tcp(request["address"])
        server.listen(64)
    except OSError:
        if not facts:
            raise
        answer({"ok": facts | {"listens_on": None}})  # the facts show what is wrong
    else:
        threading.Thread(target=_accept_peers, args=(server, token), daemon=True).start()
        answer({"ok": facts | {"listens_on": server.getsockname()[1]}})
    interface = interface_of(request["address"])
    for line in sys.stdin:
        order = json.loads(line)
        order["interface"] = order.get("interface") or interface
        try:
            answer({"ok": ORDERS[order["do"]](order, token)})
        except OSError as error:
            answer({"ok": {"error": str(error)}})


def _measure_peer(order: dict, token: bytes) -> dict[str, Any]:
    peer, milliseconds = tuple(order["peer"]), int(order["seconds"] * 1e3)
    rtt_s = _ping(peer, token, order["pings"])
    result: dict[str, Any] = {"rtt_s": rtt_s}
    # A burst of a few round trips ends within TCP's slow start, so it shows no throughput.
    if milliseconds and order["seconds"] >= order["least_trips"] * statistics.median(rtt_s):
        directions = [SEND, RECEIVE] if order.get("both") else [SEND]
        streams = [direction for direction in directions for _ in range(order["streams"])]
        before, start = wire_bytes(order["interface"]), time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(len(streams)) as pool:
            stream = lambda direction: _stream(peer, token, direction, milliseconds)
            streamed = list(pool.map(stream, streams))  # raises if a stream failed
        result["seconds"] = time.perf_counter() - start
        result["bytes"] = sum(count for count, _ in streamed)
        result["bytes_per_s"] = sum(count / max(s, 1e-9) for count, s in streamed)
        after = wire_bytes(order["interface"])
        result["mtu"] = _mtu(order["interface"])
        result["wire_bytes"] = [b - a for a, b in zip(before, after, strict=True)]
    return result


def _read_nonce(order: dict, token: bytes) -> dict[str, bool]:
    try:
        return {"same": with_timeout(nonce_path(order).read_text) == order["nonce"]}
    except TimeoutError:
        raise
    except OSError:
        return {"same": False}


def _forget_nonce(order: dict, token: bytes) -> dict:
    with_timeout(nonce_path(order).unlink, True)
    return {}


def _listen(order: dict, token: bytes) -> dict:
    """Listens as the job's program will: on all addresses if, behind NAT, none is the given one."""
    try:
        server = bind_tcp(order["address"], order["port"])
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        server = bind_tcp("::" if ":" in order["address"] else "0.0.0.0", order["port"])
    server.listen(64)
    threading.Thread(target=_accept_peers, args=(server, token), daemon=True).start()
    return {}


ORDERS = {
    "listen": _listen,
    "measure": _measure_peer,
    "read": _read_nonce,
    "forget": _forget_nonce,
    "time": lambda order, token: {"time": time.time()},
}


def _accept_peers(server: socket.socket, token: bytes) -> None:
    while True:
        try:
            sock, _ = server.accept()
            threading.Thread(target=serve_peer, args=(sock, token), daemon=True).start()
        except (OSError, RuntimeError):  # no descriptor or no thread is free: strangers hold them
            time.sleep(0.1)


def serve_peer(sock: socket.socket, token: bytes) -> None:
    """Serves one measurement of a peer: echoes its pings, or receives or sends a stream."""
    with sock:
        sock.settimeout(STRANGER_S)
        try:
            given_token, kind, milliseconds = HEADER.unpack(_receive_exactly(sock, HEADER.size))
            if not hmac.compare_digest(given_token, token):
                return
            sock.settimeout(60)
            if kind == PING:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while byte := sock.recv(1):
                    sock.sendall(byte)
            elif kind == SEND:
                sock.sendall(RESULT.pack(*_receive_stream(sock)))
            else:
                _send_stream(sock, milliseconds)
        except OSError:
            return


def _send_stream(sock: socket.socket, milliseconds: int) -> None:
    data, deadline = bytes(CHUNK_BYTES), time.perf_counter() + milliseconds / 1e3
    while time.perf_counter() < deadline:
        sock.send(data)
    sock.shutdown(socket.SHUT_WR)


def _receive_stream(sock: socket.socket) -> tuple[int, float]:
    """Receives until the end; returns (bytes, seconds from the first chunk to the end)."""
    count, first_at = 0, None
    while data := sock.recv(CHUNK_BYTES):
        first_at = first_at or time.perf_counter()
        count += len(data)
    return count, time.perf_counter() - (first_at or time.perf_counter())


def _stream(peer: tuple, token: bytes, direction: bytes, milliseconds: int) -> tuple[int, float]:
    """Sends to a peer, or receives from it; returns (bytes that arrived, seconds)."""
    with _connect(peer, token, direction, milliseconds) as sock:
        if direction == SEND:
            _send_stream(sock, milliseconds)
            return RESULT.unpack(_receive_exactly(sock, RESULT.size))
        count, seconds = _receive_stream(sock)
        if not count:
            raise ConnectionError("the peer sent nothing")
        return count, seconds


def _ping(peer: tuple, token: bytes, count: int) -> list[float]:
    times = []
    with _connect(peer, token, PING, 0) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            start = time.perf_counter()
            sock.sendall(b"x")
            _receive_exactly(sock, 1)
            times.append(time.perf_counter() - start)
    return sorted(times)


def _connect(peer: tuple, token: bytes, kind: bytes, milliseconds: int) -> socket.socket:
    sock = socket.create_connection(peer, timeout=10)
    sock.settimeout(60 + milliseconds / 1e3)
    sock.sendall(HEADER.pack(token, kind, milliseconds))
    return sock


def _receive_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        if not chunk:
            raise ConnectionError("the peer closed the connection")
        data += chunk
    return data


def _mtu(interface: str) -> int | None:
    try:
        return int(Path("/sys/class/net", interface, "mtu").read_text())
    except OSError:
        return None


def wire_bytes(interface: str) -> list[int]:
    """Returns [sent, received] bytes since boot.

    The kernel counts what it hands to the card, before the card cuts it into segments that each
    have their own headers. RDMA traffic bypasses the kernel, so InfiniBand's counters are added.
    Source: proc(5); sysfs-class-infiniband.

    Args:
        interface: its name; "" counts all interfaces but loopback.

    Raises:
        OSError: this host has no such interface.
    """
    sent = received = matches = 0
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        fields = numbers.split()
        if name.strip() == interface or (not interface and name.strip() != "lo"):
            received, sent = received + int(fields[0]), sent + int(fields[8])
            matches += 1
    if interface and not matches:
        raise OSError(f"interface must exist on this host; got {interface!r}. Correct --hosts")
    for port in Path("/sys/class/infiniband").glob("*/ports/*/counters"):  # in words of 4 bytes
        sent += 4 * int((port / "port_xmit_data").read_text())
        received += 4 * int((port / "port_rcv_data").read_text())
    return [sent, received]
