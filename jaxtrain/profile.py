"""Prints a trace as tables: where the devices' time went, when they were idle, what the host did.

    jaxtrain train quickstart --profile.steps=10 --workdir=runs/traced   # make a trace
    jaxtrain profile runs/traced
    jaxtrain profile runs/traced --top=40
    jaxtrain profile DIR/traces --json=profile.jsonl     # traces of jaxtrain bench --suite=gpu

DIR is the folder of a run or any folder with XProf traces (*.xplane.pb). If one process made
several traces, the newest is read. The time of an operation excludes the operations nested in it.
Operations that run simultaneously on several threads or streams can add up to more than the busy
time.
"""

import json
import re
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.config.commands import rewrite_commands
from jaxtrain.file_errors import exit_on_file_error
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.reporting.profile_trace import (
    CAUSES,
    Device,
    HostThread,
    ProfileTrace,
    find_traces,
    read_trace,
)
from jaxtrain.reporting.table import format_table
from pallas_kernels.arguments import Parser

OTHER_PROGRAM = "not in the step's program"
# Libraries' kernels and ours have their own names inside a CUDA graph, not those of the program.
LIBRARY_KERNELS = {
    "attention": re.compile(r"flash_attention|sdpa|fmha", re.I),
    "products": re.compile(r"gemm|nvjet|cutlass|xmma|cublas|symmetric|head_scores", re.I),
    "element-wise and reductions, forward": re.compile(r"(add_norm|bias_gelu|qk_rope)_forward"),
    "element-wise and reductions, backward": re.compile(r"(add_norm|bias_gelu|qk_rope)_backward"),
}


def read_causes(trace: Path) -> dict[str, str]:
    """Returns {operation: cause} from the causes.json of a trace's folder; {} if it has none."""
    path = trace.parents[3] / CAUSES
    return json.loads(path.read_text()) if path.exists() else {}


def time_by_cause(device: Device, causes: Mapping[str, str]) -> dict[str, float]:
    """Returns {cause: seconds} of a device's operations, the longest first."""
    # XLA names a kernel as its instruction, with underscores.
    plain_name = lambda name: re.sub(r"[.-]", "_", name)
    known = {plain_name(name): cause for name, cause in causes.items()}
    seconds: defaultdict[str, float] = defaultdict(float)
    for row in device.by_op():
        guesses = (kind for kind, names in LIBRARY_KERNELS.items() if names.search(row.op))
        cause = known.get(plain_name(row.op)) or next(guesses, OTHER_PROGRAM)
        seconds[cause] += row.own_s
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def as_row(path: Path, device: Device, causes: Mapping[str, str]) -> dict[str, Any]:
    """Returns the figures of one device of the trace in a file, in seconds."""
    return {
        "trace": path.parents[3].name,
        "device": device.name,
        "span_s": device.span_s,
        "busy_s": device.busy_s,
        "idle_s": device.span_s - device.busy_s,
        "by_cause_s": time_by_cause(device, causes),
    }


def describe(
    trace: ProfileTrace, top: int, causes: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yields a trace as lines and tables, with the `top` longest operations of the first device.

    Args:
        causes: {operation: cause}; with it there is a table of the time by cause.
    """
    yield f"planes read: {', '.join(trace.read)}; skipped: {', '.join(trace.skipped) or 'none'}"
    for device in trace.devices:
        idle = device.idle_share
        yield (
            f"{device.name}: {device.span_s * 1e3:.2f} ms from first operation to last, "
            f"{1 - idle:.1%} busy, {idle:.1%} idle, {device.collective_s * 1e3:.2f} ms in "
            "collectives"
        )
    yield _describe_host(trace.host)
    device = trace.devices[0]
    others = f", first of {len(trace.devices)} devices" if len(trace.devices) > 1 else ""
    yield f"longest operations of {device.name}{others}"
    rows = device.by_op()
    total_s = sum(row.own_s for row in rows)
    if causes:
        by_cause = time_by_cause(device, causes).items()
        cells = [(f"{s * 1e3:.3f}", f"{s / total_s:.1%}", cause) for cause, s in by_cause]
        yield format_table(cells, ("own ms", "share", "cause"))
    columns = {
        "own ms": lambda r: f"{r.own_s * 1e3:.3f}",
        "share": lambda r: f"{r.own_s / total_s:.1%}",
        "runs": lambda r: r.count,
        "us per run": lambda r: f"{r.own_s / r.count * 1e6:.1f}",
        "op": lambda r: r.op,
        "program": lambda r: r.module,
    }
    yield format_table(rows[:top], columns)
    rest_s = sum(row.own_s for row in rows[top:])
    yield f"{len(rows[top:])} others: {rest_s / total_s:.1%}"


def _describe_host(host: HostThread) -> str:
    if not host.steps:
        return "host: steps are not annotated: this is not a trace of jaxtrain's training loop"
    steps, parts_s = len(host.steps), host.parts_s()
    busy_s = host.step_s - parts_s.pop("wait", 0.0)
    parts_s["logging and other"] = busy_s - sum(parts_s.values())
    parts = "  ".join(f"{name} {s / steps * 1e3:.3f}" for name, s in parts_s.items())
    return (
        f"host: {steps} steps of {host.step_s / steps * 1e3:.2f} ms, of which the host is busy for "
        f"{busy_s / host.step_s:.1%} and otherwise waits for the device; ms per step: {parts}"
    )


def parse(argv: list[str] | None = None, prog: str = "python -m jaxtrain.profile") -> Namespace:
    """Returns the arguments of the command line."""
    parser = Parser(prog, rewrite_commands(__doc__ or "", prog))
    parser.add_argument("folder", metavar="DIR", help="folder of a run, or of traces")
    parser.add_argument("--top", type=int, default=20, help="operations to print; default: 20")
    parser.add_argument("--json", metavar="FILE", help="write a line of JSON for each device")
    return parser.parse_args(argv)


@exit_on_file_error()
def main(argv: list[str] | None = None, prog: str = "python -m jaxtrain.profile") -> None:
    args = parse(argv, prog)
    try:
        rows = []
        for path in find_traces(args.folder):
            trace, causes = read_trace(path), read_causes(path)
            print(f"trace {path}")
            print("\n".join(describe(trace, args.top, causes)))
            if args.json:
                rows += [as_row(path, device, causes) for device in trace.devices]
        if args.json:
            write_atomic(args.json, "".join(f"{strict_json(row)}\n" for row in rows))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
