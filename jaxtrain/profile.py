"""A trace as tables: where a device's time went, where it was idle, what the host did meanwhile.

    jaxtrain train quickstart --profile.steps=10 --workdir=runs/traced   # make a trace
    jaxtrain profile runs/traced
    jaxtrain profile runs/traced --top=40

DIR is a run's folder or any folder with XProf traces (*.xplane.pb); of several made by one process
the newest is read. GPU planes are read stream by stream; a CPU's operations stand among the host's
threads and are found by their name in the program. Times of an operation are its own, without
those inside of it; on several threads or streams at once they add up to more than the busy time.
"""

import re
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData

from jaxtrain.config.commands import rewrite_commands
from jaxtrain.file_errors import exit_on_file_error
from jaxtrain.reporting.table import format_table
from jaxtrain.reporting.tracing import MARK
from pallas_kernels.arguments import Parser

GPU = re.compile(r"/device:(?!CUSTOM)")
STREAM = "Stream"  # lines of a GPU's plane; others repeat them by module, step, source
HOST = "/host:CPU"
NS = 1e-9
COLLECTIVE = re.compile(
    r"(all-?reduce|all-?gather|reduce-?scatter|all-?to-?all|collective-?permute|nccl)", re.I
)


class Op(NamedTuple):
    """An operation's run; seconds since the trace began."""

    name: str
    module: str
    start_s: float
    end_s: float
    own_s: float  # without the operations inside of it


class Device(NamedTuple):
    name: str
    ops: tuple[Op, ...]
    paused_s: float = 0.0  # between the first and the last, that are no step's

    @property
    def span_s(self) -> float:
        whole_s = max(op.end_s for op in self.ops) - min(op.start_s for op in self.ops)
        return whole_s - self.paused_s

    def without(self, pauses) -> "Device":
        """Without the pauses between steps, and what ran in them."""
        ops = tuple(op for op in self.ops if not _within(op.start_s, pauses))
        first, last = min(op.start_s for op in ops), max(op.end_s for op in ops)
        paused_s = sum(end - start for start, end in pauses if first <= start and end <= last)
        return Device(self.name, ops, paused_s)

    @property
    def busy_s(self) -> float:
        """Time in which some operation ran."""
        busy_s, until_s = 0.0, 0.0
        for op in sorted(self.ops, key=lambda op: op.start_s):
            busy_s += max(op.end_s - max(op.start_s, until_s), 0.0)
            until_s = max(until_s, op.end_s)
        return busy_s

    @property
    def collective_s(self) -> float:
        return sum(op.own_s for op in self.ops if COLLECTIVE.search(op.name))

    def by_op(self) -> list[dict]:
        """{"op", "module", "count", "own_s"} of each operation, the longest first."""
        rows = defaultdict(lambda: [0, 0.0])
        for op in self.ops:
            rows[op.name, op.module][0] += 1
            rows[op.name, op.module][1] += op.own_s
        named = [
            {"op": name, "module": module, "count": count, "own_s": own_s}
            for (name, module), (count, own_s) in rows.items()
        ]
        return sorted(named, key=lambda row: -row["own_s"])


class Host(NamedTuple):
    """What the loop marked of itself; (start, end) in seconds since the trace began."""

    steps: tuple[tuple, ...] = ()
    parts: tuple[tuple, ...] = ()  # (name, (start, end))

    @property
    def pauses(self) -> list[tuple]:
        return [span for name, span in self.parts if name == "pause"]

    @property
    def step_s(self) -> float:
        return sum(end - start for start, end in self.steps)

    def parts_s(self) -> dict[str, float]:
        """{part: seconds} of those inside of steps."""
        found = Counter()
        for name, span in self.parts:
            if _within(span[0], self.steps):
                found[name] += span[1] - span[0]
        return dict(found)


def _within(at_s, spans) -> bool:
    return any(start <= at_s < end for start, end in spans)


class Trace(NamedTuple):
    devices: tuple[Device, ...]
    host: Host
    read: tuple[str, ...]  # names of planes
    left: tuple[str, ...]


def own_times(spans: list[tuple]) -> list[float]:
    """Of each (start, end), what the spans nested in it leave; sorted by start, longest first."""
    own, open_spans = [end - start for start, end in spans], []
    for i, (start, end) in enumerate(spans):
        while open_spans and spans[open_spans[-1]][1] <= start:
            open_spans.pop()
        if open_spans:
            own[open_spans[-1]] -= min(end, spans[open_spans[-1]][1]) - start
        open_spans.append(i)
    return [max(s, 0.0) for s in own]


def _ops(events, default_module="") -> list[Op]:
    """Operations of one line: (name, module, start, end) in any order."""
    events = sorted(events, key=lambda event: (event[2], -event[3]))
    own = own_times([event[2:] for event in events])
    return [Op(*event, own_s) for event, own_s in zip(events, own, strict=True)]


def _interval(event):
    return event.start_ns * NS, (event.start_ns + event.duration_ns) * NS


def _gpu(plane) -> Device | None:
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith(STREAM)] or lines
    ops = []
    for line in streams:
        found = []
        for event in line.events:
            stats = dict(event.stats)
            name = stats.get("hlo_op", event.name)
            found.append((str(name), str(stats.get("hlo_module", "")), *_interval(event)))
        ops += _ops(found)
    return Device(plane.name, tuple(ops)) if ops else None


def _host(plane) -> tuple[list[Device], Host]:
    """A CPU's devices, and what the loop marked, of the host's threads."""
    devices, steps, parts = defaultdict(list), [], []
    for line in plane.lines:
        found = defaultdict(list)
        for event in line.events:
            if event.name == f"{MARK}step":
                steps.append(_interval(event))
            elif event.name.startswith(MARK):
                parts.append((event.name.removeprefix(MARK), _interval(event)))
            elif not event.name.startswith("end: "):
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    op = str(stats["hlo_op"]), str(stats.get("hlo_module", ""))
                    found[stats.get("device_ordinal", 0)].append((*op, *_interval(event)))
        for ordinal, events in found.items():
            devices[ordinal] += _ops(events)
    named = [Device(f"{plane.name} device {i}", tuple(ops)) for i, ops in sorted(devices.items())]
    return named, Host(tuple(steps), tuple(parts))


def read_trace(path: Path) -> Trace:
    """The planes of a trace file that hold operations.

    Raises:
        ValueError: it holds none.
    """
    with warnings.catch_warnings():
        # jax 0.11.2 makes a type in the midst of it, whose warning as an error would abort Python.
        warnings.simplefilter("ignore", DeprecationWarning)
        return _read_trace(path)


def _read_trace(path):
    devices, host, read, left = [], Host(), [], []
    data = ProfileData.from_file(str(path))  # named: its planes may not keep it alive
    for plane in data.planes:
        found = []
        if GPU.match(plane.name):
            found = [device] if (device := _gpu(plane)) else []
        elif plane.name == HOST:
            found, host = _host(plane)
        devices += found
        (read if found or (plane.name == HOST and host.steps) else left).append(plane.name)
    if not devices:
        raise ValueError(
            f"a trace must hold operations of a device; got none in {path}: planes "
            f"{', '.join(left)}. Trace more steps: --profile.steps."
        )
    devices = tuple(device.without(host.pauses) for device in devices)
    return Trace(devices, host, tuple(read), tuple(left))


def find_traces(folder: str | Path) -> list[Path]:
    """The newest trace of each process below a folder.

    Raises:
        ValueError: there is none.
    """
    newest = {}
    for path in sorted(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime):
        newest[path.parents[3], path.name] = path
    if not newest:
        raise ValueError(
            f"DIR must hold a trace (*.xplane.pb); got {folder}. Make one: --profile.steps=10."
        )
    return list(newest.values())


def describe(trace: Trace, top: int):
    """Lines of tables."""
    yield f"planes read: {', '.join(trace.read)}; left: {', '.join(trace.left) or 'none'}"
    for device in trace.devices:
        busy = device.busy_s / device.span_s if device.span_s else 1.0
        yield (
            f"{device.name}: {device.span_s * 1e3:.2f} ms from first operation to last, "
            f"{busy:.1%} busy, {1 - busy:.1%} idle, {device.collective_s * 1e3:.2f} ms in "
            "collectives"
        )
    yield from _host_lines(trace.host)
    for device in trace.devices[:1]:
        also = f", first of {len(trace.devices)} devices" if len(trace.devices) > 1 else ""
        yield f"top operations of {device.name}{also}"
        rows = device.by_op()
        total_s = sum(row["own_s"] for row in rows)
        yield _table(rows[:top], total_s)
        rest_s = sum(row["own_s"] for row in rows[top:])
        yield f"{len(rows[top:])} others: {rest_s / total_s:.1%}"


def _host_lines(host):
    if not host.steps:
        yield "host: its steps are not marked: this trace is not of jaxtrain's loop"
        return
    steps, parts = len(host.steps), host.parts_s()
    waited_s = parts.pop("wait", 0.0)
    busy_s = host.step_s - waited_s
    parts["log and else"] = busy_s - sum(parts.values())
    shown = "  ".join(f"{name} {s / steps * 1e3:.3f}" for name, s in parts.items())
    yield (
        f"host: {steps} steps of {host.step_s / steps * 1e3:.2f} ms; overhead "
        f"{busy_s / host.step_s:.1%} of it, ms a step: {shown}; the rest waits for the device"
    )


def _table(rows, total_s) -> str:
    return format_table(
        rows,
        {
            "own ms": lambda r: f"{r['own_s'] * 1e3:.3f}",
            "share": lambda r: f"{r['own_s'] / total_s:.1%}",
            "runs": lambda r: str(r["count"]),
            "us a run": lambda r: f"{r['own_s'] / r['count'] * 1e6:.1f}",
            "op": lambda r: r["op"],
            "program": lambda r: r["module"],
        },
    )


def parse(argv=None, prog="python -m jaxtrain.profile"):
    parser = Parser(prog, rewrite_commands(__doc__, prog))
    parser.add_argument("folder", metavar="DIR", help="of a run, or of traces")
    parser.add_argument("--top", type=int, default=20, help="operations to show; default: 20")
    return parser.parse_args(argv)


@exit_on_file_error()
def main(argv=None, prog="python -m jaxtrain.profile") -> None:
    args = parse(argv, prog)
    try:
        for path in find_traces(args.folder):
            print(f"trace {path}")
            print("\n".join(describe(read_trace(path), args.top)))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
