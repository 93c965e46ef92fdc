"""Bytes on the wire: the counters of this host's network interfaces and InfiniBand ports.

The kernel counts a large send once, before the card cuts it into packets: on interfaces that take
over that work the bytes of the packets' own headers are counted once a send, not once a packet.
NVLink has no counter here.
"""

import os
import statistics
import time
from pathlib import Path

INTERFACE = "JAXTRAIN_INTERFACE"
TABLE = Path("/proc/self/net/dev")
PORTS = Path("/sys/class/infiniband")
WORD_BYTES = 4  # InfiniBand counts words of 4 bytes
READS = 5  # that say what one takes


class NetworkCounters:
    """The counters of one interface, or of all but loopback, and of every InfiniBand port.

    Args:
        interface: its name; empty is all but loopback.

    Attributes:
        names: what is counted.
        read_s: median seconds of a read.

    Raises:
        ValueError: there is no such interface.
        OSError: the system has no counters.
    """

    def __init__(self, interface: str = ""):
        self._table = os.open(TABLE, os.O_RDONLY)
        self._counted = None  # all, until it is known which
        wanted = lambda name: name == interface.encode() if interface else name != b"lo"
        self._counted = [name for name in self._rows() if wanted(name)]
        if not self._counted:
            os.close(self._table)
            raise ValueError(
                f"{INTERFACE} must name a network interface of this host; got {interface!r}. See "
                "`ip link`."
            )
        ports = sorted(PORTS.glob("*/ports/*/counters"))
        count = lambda name: [os.open(port / name, os.O_RDONLY) for port in ports]
        self._sent, self._received = count("port_xmit_data"), count("port_rcv_data")
        self.names = [name.decode() for name in self._counted] + [port.parts[-4] for port in ports]
        self.read_s = self._time_a_read()

    def _rows(self) -> dict[bytes, list[bytes]]:
        """{interface: its 16 numbers}, as proc(5) has them, of those that are counted."""
        rows = {}
        for line in os.pread(self._table, 1 << 16, 0).splitlines()[2:]:
            name, _, numbers = line.partition(b":")
            name = name.strip()
            if self._counted is None or name in self._counted:
                rows[name] = numbers.split()
        return rows

    def _time_a_read(self) -> float:
        times_s = []
        for _ in range(READS):
            start_s = time.perf_counter()
            self.read()
            times_s.append(time.perf_counter() - start_s)
        return statistics.median(times_s)

    def read(self) -> tuple[int, int]:
        """(sent, received) bytes since the host was started."""
        sent = WORD_BYTES * sum(int(os.pread(port, 32, 0)) for port in self._sent)
        received = WORD_BYTES * sum(int(os.pread(port, 32, 0)) for port in self._received)
        for row in self._rows().values():
            sent, received = sent + int(row[8]), received + int(row[0])
        return sent, received

    def close(self) -> None:
        for number in (self._table, *self._sent, *self._received):
            os.close(number)
