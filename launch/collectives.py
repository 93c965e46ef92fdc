"""Times JAX's collectives over all processes of a job that launch.run starts.

    python -m launch.run --hosts=hosts.toml --module=launch.collectives -- --mib=1,16
    ... --module=launch.collectives -- --cases=all_reduce:4096,all_gather:16384

Process 0 prints a JSON line per collective and size. Bandwidths are defined as in nccl-tests: algbw
is bytes over time; busbw is what a link carries, algbw times 2(n-1)/n for an all-reduce and (n-1)/n
for the others. Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.distributed.cluster import detect_world
from jaxtrain.distributed.heartbeat import beat
from jaxtrain.distributed.runtime import exit_together, join_processes
from jaxtrain.metrics.network import INTERFACE, NetworkCounters
from launch.arguments import Parser
from launch.probe import SHARE, add_case_flags

REPEATS, WARM_UP = 9, 2


def build(kind: str, mesh: Mesh) -> tuple[Callable[[jax.Array], jax.Array], P]:
    """Returns a jitted collective of a float32 [N] over mesh axis "all", and its input's spec."""
    bodies = {
        "all_reduce": (lambda x: jax.lax.psum(x, "all"), P(), P()),
        "all_gather": (lambda x: jax.lax.all_gather(x, "all", tiled=True), P("all"), P()),
        "reduce_scatter": (lambda x: jax.lax.psum_scatter(x, "all", tiled=True), P(), P("all")),
    }
    body, before, after = bodies[kind]
    mapped = jax.shard_map(body, mesh=mesh, in_specs=before, out_specs=after, check_vma=False)
    return jax.jit(mapped), before


def measure(kind: str, size_bytes: int, mesh: Mesh, interface: str) -> dict[str, Any]:
    """Times a collective; returns its median seconds, bandwidths and wire bytes."""
    function, spec = build(kind, mesh)
    count = size_bytes // 4 if kind == "all_reduce" else size_bytes // 4 // mesh.size * mesh.size
    if not count:
        raise ValueError(
            f"{kind} must have 4 bytes per device; got {size_bytes} for {mesh.size}. Set --cases."
        )
    sharding = NamedSharding(mesh, spec)
    x = jax.jit(partial(jnp.ones, count, jnp.float32), out_shardings=sharding)()
    times, wire = [], NetworkCounters(interface)
    for i in range(WARM_UP + REPEATS):
        if i == WARM_UP:
            before, _ = wire.read()
        start = time.perf_counter()
        jax.block_until_ready(function(x))
        times.append(time.perf_counter() - start)
    sent = wire.read()[0] - before
    wire.close()
    seconds, n = statistics.median(times[WARM_UP:]), mesh.size
    ideal = SHARE[kind] * (n - 1) / n * 4 * count
    return {
        "collective": kind,
        "bytes": 4 * count,
        "processes": jax.process_count(),
        "devices": n,
        "seconds": seconds,
        "spread_s": [min(times[WARM_UP:]), max(times[WARM_UP:])],
        "algbw_bytes_per_s": 4 * count / seconds,
        "busbw_bytes_per_s": ideal / seconds,
        "wire_sent_bytes": sent / REPEATS,
        "ideal_sent_bytes": ideal,
        "interface": interface,
    }


def main() -> None:
    parser = Parser("python -m launch.collectives", __doc__)
    add_case_flags(parser)
    parser.add_argument("--interface", default="", help="network interface whose bytes are counted")
    args = parser.parse_args()
    beat("start")
    join_processes(detect_world(os.environ))
    mesh = Mesh(np.array(jax.devices()), ("all",))
    cases = [case.split(":") for case in args.cases.split(",") if case] or [
        (kind, float(size) * 2**20) for size in args.mib.split(",") for kind in SHARE
    ]
    for kind, size in cases:
        beat("eval")
        row = measure(kind, int(size), mesh, args.interface or os.environ.get(INTERFACE, ""))
        if jax.process_index() == 0:
            print(json.dumps(row), flush=True)
    exit_together(0)


if __name__ == "__main__":
    main()
