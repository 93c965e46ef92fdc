"""One connection of a link, what the kernel counts of it, and how many of them a link needs."""

import asyncio
import contextlib
import socket
import struct
from pathlib import Path

from jaxtrain.sites.frames import Key

CLOSE_S = 1.0
MOST_STREAMS = 16
TARGET_BYTES_S = 125e6  # a link's streams offer a window of this rate times the round-trip time
WINDOW_SHARE = 0.7  # of tcp_wmem: 4 MiB carry 159 Mbit/s at 150 ms, measured on tests/relay.py
SEGMENT_HEADERS = 52  # bytes of an IPv4 and a TCP header with timestamps
# Offsets in struct tcp_info. Source: linux/tcp.h
LAST_RECEIVED_MS, RTT_US, BYTES_RECEIVED, SEGMENTS, BYTES_SENT = 52, 68, 128, 136, 200


def choose_streams(rtt_s: float, window_bytes: float) -> int:
    """Returns how many connections a link needs for TARGET_BYTES_S, in [1, MOST_STREAMS]."""
    return int(min(max(-(-TARGET_BYTES_S * rtt_s // window_bytes), 1), MOST_STREAMS))


def read_window_bytes() -> float:
    """Returns what one connection can have under way: a share of the largest send buffer."""
    limits = Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()
    return WINDOW_SHARE * int(limits[2])


class Stream:
    """One connection of a link.

    Attributes:
        wake: set when there may be something to send.
        ping_due: whether a PING is to be sent.
        offered: the messages that the peer was offered on this stream.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer
        self.wake, self.ping_due, self.offered = asyncio.Event(), False, set[Key]()
        # A copy of the descriptor, so that the counters outlive a connection that breaks.
        self._socket = writer.get_extra_info("socket").dup()

    def close(self) -> None:
        """Closes the copy of the descriptor; without it the connection would stay open."""
        self._socket.close()

    def _tcp_info(self) -> bytes:
        """Returns the kernel's counters of this connection; zeros after close()."""
        with contextlib.suppress(OSError):
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            return info.ljust(256, b"\0")  # an old kernel counts less
        return bytes(256)

    def wire_bytes(self) -> tuple[int, int]:
        """Returns the (sent, received) bytes with headers; retransmissions count as sent."""
        info = self._tcp_info()
        (received,) = struct.unpack_from("Q", info, BYTES_RECEIVED)
        (sent,) = struct.unpack_from("Q", info, BYTES_SENT)
        segments_out, segments_in = struct.unpack_from("II", info, SEGMENTS)
        return sent + segments_out * SEGMENT_HEADERS, received + segments_in * SEGMENT_HEADERS

    def silent_s(self) -> float:
        """Returns the seconds since the last byte arrived."""
        return struct.unpack_from("I", self._tcp_info(), LAST_RECEIVED_MS)[0] / 1e3

    def rtt_s(self) -> float:
        """Returns the kernel's estimate of the round-trip time."""
        return struct.unpack_from("I", self._tcp_info(), RTT_US)[0] / 1e6


async def close_writer(writer: asyncio.StreamWriter) -> None:
    """Sends what is buffered if that takes less than CLOSE_S, and closes the connection."""
    with contextlib.suppress(Exception):
        writer.close()
        async with asyncio.timeout(CLOSE_S):
            await writer.wait_closed()
    writer.transport.abort()
