"""Reads XProf traces: the operations of each device, and the training loop's annotations.

GPU planes are read stream by stream. A CPU's operations are among the host's threads and are
recognised by their name in the program.
"""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData

from jaxtrain.reporting.tracing import MARK

GPU = re.compile(r"/device:(?!CUSTOM)")
# Prefix of the lines to read in a GPU's plane; other lines repeat them by module, step, source.
STREAM = "Stream"
HOST = "/host:CPU"
CUDA_GRAPH = "command_buffer"  # XLA's name for it
NS = 1e-9
CAUSES = "causes.json"  # in a trace's folder: {operation of the program: what it does}
COLLECTIVE = re.compile(
    r"(all-?reduce|all-?gather|reduce-?scatter|all-?to-?all|collective-?permute|nccl)", re.I
)

Interval = tuple[float, float]  # start and end, seconds since the trace began


class TracedOp(NamedTuple):
    """One execution of an operation; seconds since the trace began."""

    name: str
    module: str
    start_s: float
    end_s: float
    own_s: float  # without the operations nested in it


class OpTime(NamedTuple):
    """All executions of one operation."""

    op: str
    module: str
    count: int
    own_s: float


class Device(NamedTuple):
    """The operations of one device."""

    name: str
    ops: tuple[TracedOp, ...]
    paused_s: float = 0.0  # pauses between the first and the last operation

    @property
    def span_s(self) -> float:
        """Time from the first operation to the last, without pauses."""
        first_s, last_s = min(op.start_s for op in self.ops), max(op.end_s for op in self.ops)
        return last_s - first_s - self.paused_s

    def without(self, pauses: Iterable[Interval]) -> "Device":
        """Returns the device without the loop's pauses and the operations that ran in them.

        Evaluations and saves are not part of a step; their operations would count as busy time.
        """
        ops = tuple(op for op in self.ops if not _is_within(op.start_s, pauses))
        first_s, last_s = min(op.start_s for op in ops), max(op.end_s for op in ops)
        paused_s = sum(end - start for start, end in pauses if first_s <= start and end <= last_s)
        return Device(self.name, ops, paused_s)

    @property
    def busy_s(self) -> float:
        """Time in which at least one operation ran."""
        busy_s, until_s = 0.0, 0.0
        for op in sorted(self.ops, key=lambda op: op.start_s):
            busy_s += max(op.end_s - max(op.start_s, until_s), 0.0)
            until_s = max(until_s, op.end_s)
        return busy_s

    @property
    def idle_share(self) -> float:
        """Share of the span in which no operation ran."""
        return 1 - self.busy_s / self.span_s if self.span_s else 0.0

    @property
    def collective_s(self) -> float:
        """Time in collectives."""
        return sum(op.own_s for op in self.ops if COLLECTIVE.search(op.name))

    def by_op(self) -> list[OpTime]:
        """Returns the operations with their total times, the longest first."""
        counts: Counter[tuple[str, str]] = Counter()
        own_s: defaultdict[tuple[str, str], float] = defaultdict(float)
        for op in self.ops:
            counts[op.name, op.module] += 1
            own_s[op.name, op.module] += op.own_s
        rows = [OpTime(*key, counts[key], own_s[key]) for key in counts]
        return sorted(rows, key=lambda row: -row.own_s)


class HostThread(NamedTuple):
    """The steps and the parts of steps that the training loop annotated on the host."""

    steps: tuple[Interval, ...] = ()
    parts: tuple[tuple[str, Interval], ...] = ()

    @property
    def pauses(self) -> list[Interval]:
        """Evaluations, saves and the like, between steps."""
        return [interval for name, interval in self.parts if name == "pause"]

    @property
    def step_s(self) -> float:
        """Time in steps."""
        return sum(end - start for start, end in self.steps)

    def parts_s(self) -> dict[str, float]:
        """Returns {part: seconds} of the parts inside steps."""
        seconds = defaultdict(float)
        for name, (start, end) in self.parts:
            if _is_within(start, self.steps):
                seconds[name] += end - start
        return dict(seconds)


def _is_within(time_s: float, intervals: Iterable[Interval]) -> bool:
    return any(start <= time_s < end for start, end in intervals)


class ProfileTrace(NamedTuple):
    """The devices and the host of one trace file."""

    devices: tuple[Device, ...]
    host: HostThread
    read: tuple[str, ...]  # names of the planes
    skipped: tuple[str, ...]


def own_times(intervals: Sequence[Interval]) -> list[float]:
    """Returns each interval's length without the intervals nested in it.

    Args:
        intervals: sorted by start, the longest first.
    """
    own = [end - start for start, end in intervals]
    enclosing = []  # indices of the intervals that contain the current one, outermost first
    for i, (start, end) in enumerate(intervals):
        while enclosing and intervals[enclosing[-1]][1] <= start:
            enclosing.pop()
        if enclosing:
            own[enclosing[-1]] -= min(end, intervals[enclosing[-1]][1]) - start
        enclosing.append(i)
    return [max(s, 0.0) for s in own]


def _build_ops(events: Iterable[tuple[str, str, float, float]]) -> list[TracedOp]:
    """Returns the operations of one thread or stream, from (name, module, start, end)."""
    events = sorted(events, key=lambda event: (event[2], -event[3]))
    own = own_times([event[2:] for event in events])
    return [TracedOp(*event, own_s) for event, own_s in zip(events, own, strict=True)]


def _interval(event: Any) -> Interval:
    return event.start_ns * NS, (event.start_ns + event.duration_ns) * NS


def _read_gpu(plane: Any) -> Device | None:
    """Returns the operations of a GPU's plane, stream by stream; None if there are none."""
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith(STREAM)] or lines
    ops = []
    for line in streams:
        events = []
        for event in line.events:
            stats = dict(event.stats)
            name = str(stats.get("hlo_op", event.name))
            # Kernels inside a CUDA graph all carry the graph's name.
            name = event.name if name.startswith(CUDA_GRAPH) else name
            events.append((name, str(stats.get("hlo_module", "")), *_interval(event)))
        ops += _build_ops(events)
    return Device(plane.name, tuple(ops)) if ops else None


def _read_host(plane: Any) -> tuple[list[Device], HostThread]:
    """Returns a CPU's devices and the loop's annotations."""
    devices, steps, parts = defaultdict(list), [], []
    for line in plane.lines:
        events = defaultdict(list)
        for event in line.events:
            if event.name == f"{MARK}step":
                steps.append(_interval(event))
            elif event.name.startswith(MARK):
                parts.append((event.name.removeprefix(MARK), _interval(event)))
            elif not event.name.startswith("end: "):
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    op = str(stats["hlo_op"]), str(stats.get("hlo_module", ""))
                    events[stats.get("device_ordinal", 0)].append((*op, *_interval(event)))
        for ordinal, device_events in events.items():
            devices[ordinal] += _build_ops(device_events)
    named = [Device(f"{plane.name} device {i}", tuple(ops)) for i, ops in sorted(devices.items())]
    return named, HostThread(tuple(steps), tuple(parts))


def read_trace(path: Path) -> ProfileTrace:
    """Returns the devices and the host of a trace file.

    Raises:
        ValueError: the file has no operations of a device.
    """
    devices, host, read, skipped = [], HostThread(), [], []
    with warnings.catch_warnings():
        # jax 0.11.2 warns while it creates a type in C++; as an error this would abort Python.
        warnings.simplefilter("ignore", DeprecationWarning)
        data = ProfileData.from_file(str(path))  # must outlive its planes
        for plane in data.planes:
            plane_devices = []
            if GPU.match(plane.name):
                device = _read_gpu(plane)
                plane_devices = [device] if device else []
            elif plane.name == HOST:
                plane_devices, host = _read_host(plane)
            devices += plane_devices
            was_read = plane_devices or (plane.name == HOST and host.steps)
            (read if was_read else skipped).append(plane.name)
    if not devices:
        raise ValueError(
            f"a trace must contain operations of a device; got none in {path}, which has the "
            f"planes {', '.join(skipped)}. Trace more steps: --profile.steps."
        )
    devices = tuple(device.without(host.pauses) for device in devices)
    return ProfileTrace(devices, host, tuple(read), tuple(skipped))


def find_traces(folder: str | Path) -> list[Path]:
    """Returns the newest trace of each process below a folder.

    Raises:
        ValueError: there is none.
    """
    newest = {}
    for path in sorted(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime):
        newest[path.parents[3], path.name] = path
    if not newest:
        raise ValueError(
            f"DIR must contain a trace (*.xplane.pb); got {folder}. Make one: --profile.steps=10."
        )
    return list(newest.values())
