"""Times JAX's collectives over all processes of a job that launch.run starts.

    python -m launch.run --hosts=hosts.toml --module=launch.collectives -- --mib=1,16
    ... --module=launch.collectives -- --cases=all_reduce:4096,all_gather:16384

Process 0 prints one JSON line for each collective and size, with the bandwidths that nccl-tests
defines: algbw is bytes over time; busbw is what each link carries, algbw times 2(n-1)/n for an
all-reduce and (n-1)/n for the others.
Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.distributed.cluster import detect_world
from jaxtrain.distributed.heartbeat import beat
from jaxtrain.distributed.runtime import exit_together, join_processes
from jaxtrain.metrics.network import INTERFACE, NetworkCounters

REPEATS, WARM_UP = 9, 2
# Bytes that each device sends, in units of (n-1)/n times the array's bytes.
PASSES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}


def build(kind: str, mesh: jax.sharding.Mesh) -> tuple[Callable, P]:
    """Returns a jitted collective of a float32 [N] over mesh axis "all", and its input's spec."""
    bodies = {
        "all_reduce": (lambda x: jax.lax.psum(x, "all"), P(), P()),
        "all_gather": (lambda x: jax.lax.all_gather(x, "all", tiled=True), P("all"), P()),
        "reduce_scatter": (lambda x: jax.lax.psum_scatter(x, "all", tiled=True), P(), P("all")),
    }
    body, before, after = bodies[kind]
    mapped = jax.shard_map(body, mesh=mesh, in_specs=before, out_specs=after, check_vma=False)
    return jax.jit(mapped), before


def measure(kind: str, size_bytes: int, mesh: jax.sharding.Mesh, interface: str) -> dict:
    """Returns the median seconds, the bandwidths and the network bytes of one collective.

    Args:
        interface: the network interface whose bytes are counted; "" for all except loopback.

    Raises:
        ValueError: the size is less than one float32 per device.
    """
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
    ideal = PASSES[kind] * (n - 1) / n * 4 * count
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
    """Times each case and prints it from process 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", default="1,16", help="sizes in MiB for every collective")
    parser.add_argument("--cases", default="", help="KIND:BYTES,... instead of --mib")
    parser.add_argument("--interface", default="", help="the training network's interface")
    args = parser.parse_args()
    beat("start")
    join_processes(detect_world(os.environ))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    cases = [case.split(":") for case in args.cases.split(",") if case] or [
        (kind, float(size) * 2**20) for size in args.mib.split(",") for kind in PASSES
    ]
    for kind, size in cases:
        beat("eval")
        found = measure(kind, int(size), mesh, args.interface or os.environ.get(INTERFACE, ""))
        if jax.process_index() == 0:
            print(json.dumps(found), flush=True)
    exit_together(0)


if __name__ == "__main__":
    main()
