"""Simulates links with delay, jitter, rate and loss between hosts of one machine.

    python tests/relay.py SOCKET

It replaces netem, which many kernels lack. Each host has a TUN device, and this process passes
packets between them. Every directed pair of hosts is a link with its own settings, which can change
at any time. Devices pass TCP's super-packets of up to 64 KiB unsegmented (IFF_VNET_HDR with
segmentation offload), so Python reaches several Gbit/s; a link counts the segments that a real wire
would carry. A super-packet is lost with the probability that any of its segments would be.

Requests are JSON lines on the Unix socket, each answered by one:

    {"do": "add", "name": "h0", "address": "10.0.0.1", "device": "tun0"}  creates a device
    {"do": "link", "from": "h0", "to": "*", "delay_ms": 75.0}             changes only what it names
    {"do": "stats"}                                                       {"h0 > h1": counters}
"""

import errno
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import socket
import struct
import sys
import time
from contextlib import suppress

# linux/if_tun.h
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8
HEADER_BYTES = 10  # struct virtio_net_hdr, before each packet. Source: linux/virtio_net.h
LARGEST = HEADER_BYTES + 65_535
AT_ONCE = 64  # packets read from one device before the next one has its turn
FRAME_BYTES = 14  # Ethernet's header, for the rate and the counters


class Link:
    """One direction between two hosts."""

    def __init__(self):
        self.delay_ms = self.jitter_ms = 0.0
        self.rate_mbit = 0.0  # 0: no limit
        self.queue_bytes = 4 << 20  # the most that waits for the rate limit; the rest is dropped
        self.loss = 0.0  # probability, per segment
        self.up = True
        self.free_at = self.last_at = 0.0
        self.counts = dict.fromkeys(("packets", "segments", "bytes", "dropped", "lost"), 0)

    def change(self, values: dict) -> None:
        known = {"delay_ms", "jitter_ms", "rate_mbit", "queue_bytes", "loss", "up"}
        if unknown := set(values) - known:
            raise ValueError(f"a link has {sorted(known)}; got {sorted(unknown)}")
        vars(self).update(values)

    def release(self, packet: bytes, now: float) -> float | None:
        """Returns when the packet arrives; None if it is lost."""
        segments, size = on_the_wire(packet)
        if not self.up or (self.loss and random.random() > (1 - self.loss) ** segments):
            self.counts["lost"] += segments
            return None
        arrival = now
        if self.rate_mbit:
            start = max(now, self.free_at)
            if (start - now) * self.rate_mbit * 125_000 > self.queue_bytes:
                self.counts["dropped"] += segments
                return None
            arrival = self.free_at = start + size / (self.rate_mbit * 125_000)
        arrival += (self.delay_ms + self.jitter_ms * random.uniform(-1, 1)) / 1e3
        self.last_at = max(arrival, self.last_at, now)  # a wire does not reorder packets
        self.counts["packets"] += 1
        self.counts["segments"] += segments
        self.counts["bytes"] += size
        return self.last_at


def on_the_wire(packet: bytes) -> tuple[int, int]:
    """Returns (segments, bytes with headers) into which a network card would cut a packet."""
    kind, segment_bytes = packet[1], packet[4] | packet[5] << 8  # gso_type, gso_size
    size = len(packet) - HEADER_BYTES
    if not kind or not segment_bytes:
        return 1, size + FRAME_BYTES
    ip_bytes = (packet[HEADER_BYTES] & 15) * 4
    headers = ip_bytes + (packet[HEADER_BYTES + ip_bytes + 12] >> 4) * 4  # TCP's data offset
    segments = -(-(size - headers) // segment_bytes)
    return segments, size + (segments - 1) * headers + segments * FRAME_BYTES


def open_device(name: str) -> int:
    """Creates a TUN device in this process's network namespace; returns its file descriptor."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(device, TUNSETVNETHDRSZ, struct.pack("i", HEADER_BYTES))
    offload = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN
    fcntl.ioctl(device, TUNSETOFFLOAD, offload)
    return device


class Relay:
    """The devices by name, the links by (from, to), and the packets under way."""

    def __init__(self, path: str):
        self.server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.server.bind(path)
        self.server.listen(16)
        self.devices: dict[str, int] = {}
        self.names: dict[int, str] = {}
        self.by_address: dict[bytes, str] = {}
        self.links: dict[tuple[str, str], Link] = {}
        self.clients: set[socket.socket] = set()
        self.under_way: list = []  # heap of (arrival, number, link, to, packet)
        self.numbers = itertools.count()

    def run(self) -> None:
        while True:
            wait_s = self.deliver()
            inputs = [self.server, *self.clients, *self.names]
            ready, _, _ = select.select(inputs, [], [], wait_s)  # to the microsecond
            for source in ready:
                if source in self.names:
                    self.read(source)
                elif source is self.server:
                    self.clients.add(self.server.accept()[0])
                elif source in self.clients:
                    self.answer(source)

    def deliver(self) -> float | None:
        """Delivers the packets that are due; returns the seconds until the next one, or None."""
        while self.under_way:
            arrival, _, _, to, packet = self.under_way[0]
            wait_s = arrival - time.monotonic()
            if wait_s > 0:
                return wait_s
            heapq.heappop(self.under_way)
            self.write(to, packet)
        return None

    def write(self, to: str, packet: bytes) -> None:
        device = self.devices.get(to)
        if device is not None:
            with suppress(OSError):  # the host is down: a wire does not notice
                os.write(device, packet)

    def read(self, device: int) -> None:
        """Reads packets from a device and puts them on their links."""
        name = self.names[device]
        for _ in range(AT_ONCE):
            try:
                packet = os.read(device, LARGEST)
            except OSError as error:
                if error.errno != errno.EAGAIN:  # its host was powered off
                    self.remove(name)
                return
            destination = packet[HEADER_BYTES + 16 : HEADER_BYTES + 20]  # in IPv4's header
            to = self.by_address.get(destination)
            if to is None or to == name:
                continue
            link, now = self.links[name, to], time.monotonic()
            arrival = link.release(packet, now)
            if arrival is not None:
                heapq.heappush(self.under_way, (arrival, next(self.numbers), link, to, packet))
        self.deliver()

    def answer(self, client) -> None:
        line = client.recv(1 << 16)
        if not line:
            self.clients.discard(client)
            client.close()
            return
        try:
            answer = {"ok": self.serve(json.loads(line))}
        except (ValueError, KeyError, OSError, TypeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        client.sendall(json.dumps(answer).encode() + b"\n")

    def serve(self, request: dict) -> object:
        """Returns the answer to a request."""
        do = request.pop("do")
        if do == "add":
            return self.add(**request)
        if do == "link":
            source, to = request.pop("from"), request.pop("to")
            pairs = [(a, b) for a, b in self.links if self.matches(a, b, source, to)]
            return [self.change(a, b, request) for a, b in pairs]
        if do == "stats":
            return {f"{a} > {b}": link.counts for (a, b), link in self.links.items()}
        raise ValueError(f"do must be add, link or stats; got {do!r}")

    def matches(self, a: str, b: str, source: str, to: str) -> bool:
        for name in (source, to):
            if name != "*" and name not in self.by_address.values():
                raise ValueError(f"a host must be one of {sorted(self.devices)} or *; got {name!r}")
        return source in (a, "*") and to in (b, "*")

    def add(self, name: str, address: str, device: str) -> None:
        self.remove(name)
        self.devices[name] = fd = open_device(device)
        self.names[fd] = name
        self.by_address[socket.inet_aton(address)] = name
        for other in set(self.by_address.values()) - {name}:  # links survive a reboot of their host
            self.links.setdefault((name, other), Link())
            self.links.setdefault((other, name), Link())

    def remove(self, name: str) -> None:
        device = self.devices.pop(name, None)
        if device is not None:
            del self.names[device]
            os.close(device)

    def change(self, a: str, b: str, values: dict) -> str:
        link = self.links[a, b]
        link.change(values)
        if not link.up:  # packets that are on a cable when it is cut are lost
            self.under_way = [packet for packet in self.under_way if packet[2] is not link]
            heapq.heapify(self.under_way)
        return f"{a} > {b}"


def ask(path, request: dict):
    """Sends a request to the relay at a socket; returns its answer.

    Raises:
        ValueError: the relay reports an error.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(path))
        sock.sendall(json.dumps(request).encode() + b"\n")
        answer = json.loads(sock.makefile().readline())
    if "error" in answer:
        raise ValueError(f"relay: {answer['error']}")
    return answer["ok"]


if __name__ == "__main__":
    relay = Relay(sys.argv[1])
    print("listening", flush=True)
    relay.run()
