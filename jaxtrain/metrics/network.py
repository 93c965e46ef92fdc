"""Counts the bytes that this host sends and receives, in total and for each training step.

The kernel counts a large send once, before the network card cuts it into packets. On interfaces
with that offload, packet headers are counted once for each send instead of once for each packet.
Traffic over NVLink does not appear in these counters.
"""

import os
import statistics
import time
from collections.abc import Collection
from pathlib import Path

INTERFACE = "JAXTRAIN_INTERFACE"  # environment variable: the interface to read
TABLE = Path("/proc/self/net/dev")
PORTS = Path("/sys/class/infiniband")
WORD_BYTES = 4  # InfiniBand's data counters count words of 4 bytes
TIMED_READS = 5
MOST_READ_S = 100e-6  # slower reads are made only at logged steps, not after every step


class NetworkCounters:
    """The byte counters of one interface, or of all except loopback, and of InfiniBand ports.

    Args:
        interface: name of the interface; empty means all except loopback.

    Attributes:
        names: the interfaces and InfiniBand devices that are counted.
        read_s: median time of one read.

    Raises:
        ValueError: there is no such interface.
        OSError: the system has no counters.
    """

    def __init__(self, interface: str = ""):
        self._table = os.open(TABLE, os.O_RDONLY)
        names = self._read_table()
        wanted = [interface.encode()] if interface else [name for name in names if name != b"lo"]
        self._counted = [name for name in wanted if name in names]
        if not self._counted:
            os.close(self._table)
            raise ValueError(
                f"{INTERFACE} must name a network interface of this host; got {interface!r}. See "
                "`ip link`."
            )
        # InfiniBand traffic bypasses the kernel's interface table, so its ports are read as well.
        ports = sorted(PORTS.glob("*/ports/*/counters"))
        self._sent = [os.open(port / "port_xmit_data", os.O_RDONLY) for port in ports]
        self._received = [os.open(port / "port_rcv_data", os.O_RDONLY) for port in ports]
        self.names = [name.decode() for name in self._counted] + [port.parts[-4] for port in ports]
        self.read_s = self._time_reads()

    def _read_table(self, only: Collection[bytes] | None = None) -> dict[bytes, list[bytes]]:
        """Returns the 16 numbers of each interface, in the order of proc(5)."""
        rows, table = {}, b""
        # The descriptor stays open: a pread at offset 0 makes the kernel write the table again. A
        # pread returns a page at most, about 30 interfaces; the last pread returns nothing.
        while page := os.pread(self._table, 1 << 16, len(table)):
            table += page
        for line in table.splitlines()[2:]:
            name, _, numbers = line.partition(b":")
            name = name.strip()
            if only is None or name in only:
                rows[name] = numbers.split()
        return rows

    def _time_reads(self) -> float:
        times_s = []
        for _ in range(TIMED_READS):
            start_s = time.perf_counter()
            self.read()
            times_s.append(time.perf_counter() - start_s)
        return statistics.median(times_s)

    def read(self) -> tuple[int, int]:
        """Returns the (sent, received) bytes since the host was started."""
        sent = WORD_BYTES * sum(int(os.pread(port, 32, 0)) for port in self._sent)
        received = WORD_BYTES * sum(int(os.pread(port, 32, 0)) for port in self._received)
        for numbers in self._read_table(self._counted).values():
            sent += int(numbers[8])
            received += int(numbers[0])
        return sent, received

    def close(self) -> None:
        for descriptor in (self._table, *self._sent, *self._received):
            os.close(descriptor)


def open_network_counters(hosts: list[str]) -> NetworkCounters | None:
    """Returns the counters of the training network; None if all processes share one host.

    Args:
        hosts: name of each process's host.

    Raises:
        ValueError: the environment names an interface that does not exist.
    """
    interface = os.environ.get(INTERFACE, "")
    if not interface and len(set(hosts)) == 1:
        return None
    return NetworkCounters(interface)


class StepBytes:
    """Attributes the bytes on the network to steps and excludes those of pauses between steps."""

    def __init__(self, counters: NetworkCounters):
        self.reads_each_step = counters.read_s <= MOST_READ_S
        self._counters = counters
        self._last = counters.read()
        self._step = [0, 0]  # sent, received since the last step ended
        self._window, self._run = [0, 0, 0], [0, 0, 0]  # sent, received, steps

    def exclude(self) -> None:
        """Discards the bytes since the last read: they belong to a pause."""
        self._last = self._counters.read()

    def include(self) -> None:
        """Adds the bytes since the last read to the step that is running."""
        sent, received = self._counters.read()
        for total in (self._step, self._window, self._run):
            total[0] += sent - self._last[0]
            total[1] += received - self._last[1]
        self._last = sent, received

    def end_step(self) -> tuple[int, int] | None:
        """Ends a step; returns its (sent, received), or None if reads are too slow for every step.

        With slow reads the bytes are only known for each window of steps.
        """
        if self.reads_each_step:
            self.include()
        self._window[2] += 1
        self._run[2] += 1
        (sent, received), self._step = self._step, [0, 0]
        return (sent, received) if self.reads_each_step else None

    def window_mean(self) -> tuple[float, float] | None:
        """Returns the mean (sent, received) of the steps since the last call."""
        if not self.reads_each_step:
            self.include()
        window, self._window = self._window, [0, 0, 0]
        return _mean(window)

    def run_mean(self) -> tuple[float, float] | None:
        """Returns the mean (sent, received) of all steps."""
        return _mean(self._run)


def _mean(span: list[int]) -> tuple[float, float] | None:
    sent, received, steps = span
    return (sent / steps, received / steps) if steps else None
