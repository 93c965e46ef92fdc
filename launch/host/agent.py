"""Round trips and throughput between hosts, by plain TCP on the training network.

Every host listens on its own training address and measures towards its peers when it is told to.
Connections begin with the token of this measurement; others are dropped.
"""

import concurrent.futures
import json
import os
import socket
import statistics
import struct
import sys
import threading
import time
from pathlib import Path

from launch.host import interfaces as nics
from launch.host.facts import in_time

CHUNK = 1 << 18
HEAD = struct.Struct("!32scI")  # token, kind (p ping, s send, r receive), milliseconds


def measure(request: dict, answer, found: dict) -> None:
    """Listens, answers `found` and {"listens_on": port}, then serves a JSON line an order.

    {"do": "measure", "peer": [address, port], "streams": n, "seconds": s, "both": bool} is
    answered by rtt_s (sorted) and bytes per second; {"do": "read", "folder", "nonce"} by
    {"same": bool}, "forget" removes what it reads; {"do": "time"} is answered by {"time": s}. It
    ends with standard input.
    """
    token = request["token"].encode()
    try:
        server = _listen(request["address"])
    except OSError:
        if not found:
            raise
        answer({"ok": found | {"listens_on": None}})  # the facts say what is wrong
    else:
        threading.Thread(target=_serve, args=(server, token), daemon=True).start()
        answer({"ok": found | {"listens_on": server.getsockname()[1]}})
    interface = nics.holder(request["address"])
    for line in sys.stdin:
        order = json.loads(line)
        order["interface"] = order.get("interface") or interface
        try:
            answer({"ok": ORDERS[order["do"]](order, token)})
        except OSError as error:
            answer({"ok": {"error": str(error)}})


def _measure_peer(order: dict, token: bytes) -> dict:
    peer, ms = tuple(order["peer"]), int(order["seconds"] * 1e3)
    found = {"rtt_s": _ping(peer, token, order["pings"])}
    if ms and order["seconds"] >= order["least_trips"] * statistics.median(found["rtt_s"]):
        kinds = [b"s", b"r"] if order.get("both") else [b"s"]
        before = wire_bytes(order.get("interface"))
        streams = [kind for kind in kinds for _ in range(order["streams"])]
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(len(streams)) as pool:
            flow = lambda kind: _flow(peer, token, kind, ms)
            flows = list(pool.map(flow, streams))  # a stream that failed is no slow one: it raises
        found["seconds"] = time.perf_counter() - start
        found["bytes"] = sum(count for count, _ in flows)
        found["bytes_per_s"] = sum(count / max(s, 1e-9) for count, s in flows)
        after = wire_bytes(order.get("interface"))
        found["mtu"] = _mtu(order.get("interface"))
        found["wire_bytes"] = [b - a for a, b in zip(before, after, strict=True)]
    return found


def _read_nonce(order: dict, token: bytes) -> dict:
    """Whether this host reads what the first one wrote."""
    try:
        return {"same": in_time(_nonce_path(order).read_text) == order["nonce"]}
    except TimeoutError:
        raise
    except OSError:
        return {"same": False}


def _forget_nonce(order: dict, token: bytes) -> dict:
    in_time(_nonce_path(order).unlink, True)
    return {}


def _nonce_path(order: dict) -> Path:
    return Path(os.path.expanduser(order["folder"])) / f".shared-{order['nonce']}"


ORDERS = {
    "measure": _measure_peer,
    "read": _read_nonce,
    "forget": _forget_nonce,
    "time": lambda order, token: {"time": time.time()},
}


def _listen(address: str):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.bind((address, 0))
    server.listen(64)
    return server


def _serve(server, token: bytes) -> None:
    while True:
        sock, _ = server.accept()
        threading.Thread(target=_serve_one, args=(sock, token), daemon=True).start()


def _serve_one(sock, token: bytes) -> None:
    with sock:
        sock.settimeout(60)
        try:
            found, kind, ms = HEAD.unpack(_exactly(sock, HEAD.size))
            if found != token:
                return
            if kind == b"p":
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while byte := sock.recv(1):
                    sock.sendall(byte)
            elif kind == b"s":
                count, start, first = 0, time.perf_counter(), None
                while data := sock.recv(CHUNK):
                    first = first or time.perf_counter()
                    count += len(data)
                seconds = time.perf_counter() - (first or start)
                sock.sendall(struct.pack("!Qd", count, seconds))
            else:
                _pour(sock, ms)
        except OSError:
            return


def _pour(sock, ms: int) -> int:
    """Sends for this long; returns the bytes handed over."""
    data, count, deadline = bytes(CHUNK), 0, time.perf_counter() + ms / 1e3
    while time.perf_counter() < deadline:
        count += sock.send(data)
    sock.shutdown(socket.SHUT_WR)
    return count


def _flow(peer, token: bytes, kind: bytes, ms: int) -> tuple[int, float]:
    """(bytes that arrived, seconds from the first of them to the last)."""
    with _connect(peer, token, kind, ms) as sock:
        if kind == b"s":
            _pour(sock, ms)
            return struct.unpack("!Qd", _exactly(sock, 16))
        count, first = 0, None
        while data := sock.recv(CHUNK):
            first = first or time.perf_counter()
            count += len(data)
        if not count:
            raise ConnectionError("the peer sent nothing")
        return count, time.perf_counter() - (first or time.perf_counter())


def _ping(peer, token: bytes, count: int) -> list[float]:
    times = []
    with _connect(peer, token, b"p", 0) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            start = time.perf_counter()
            sock.sendall(b"x")
            _exactly(sock, 1)
            times.append(time.perf_counter() - start)
    return sorted(times)


def _connect(peer, token: bytes, kind: bytes, ms: int):
    sock = socket.create_connection(peer, timeout=10)
    sock.settimeout(60 + ms / 1e3)
    sock.sendall(HEAD.pack(token, kind, ms))
    return sock


def _exactly(sock, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ConnectionError("the peer closed the connection")
        data += more
    return data


def _mtu(interface) -> int | None:
    try:
        return int(Path("/sys/class/net", interface, "mtu").read_text())
    except (OSError, TypeError):
        return None


def wire_bytes(interface) -> list[int]:
    """[sent, received] bytes since boot of an interface, "" for all but loopback, and InfiniBand's.

    Raises OSError where there is no such interface.

    The kernel counts what it hands to the card, before the card cuts it into segments, each with
    headers of its own. RDMA passes by the kernel. Source: proc(5); sysfs-class-infiniband.
    """
    sent = received = found = 0
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        fields = numbers.split()
        if name.strip() == interface or (not interface and name.strip() != "lo"):
            received, sent, found = received + int(fields[0]), sent + int(fields[8]), found + 1
    if interface and not found:
        raise OSError(f"interface must be one of this host; got {interface!r}. Correct --hosts")
    ports = list(Path("/sys/class/infiniband").glob("*/ports/*/counters"))
    sent += sum(4 * int((port / "port_xmit_data").read_text()) for port in ports)  # words of 4
    received += sum(4 * int((port / "port_rcv_data").read_text()) for port in ports)
    return [sent, received]
