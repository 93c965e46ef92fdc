"""Compares the processes of a run with each other, and names those that slow the others down.

In synchronous training all processes have equal step times, because each waits in the collectives
for the slowest. So each process measures its own part of the work with its own clock, in three
kinds, and the processes gather the results:

    compute  seconds of a small fixed program without collectives (matrix products, and copies in
             memory), run on all devices of the process between two steps
    data     1 + the share of the time in steps that it waited for batches with idle devices
    host     1 + the share that its Python took otherwise, such as for logging, with idle devices

The program is the same for every model and needs no memory while a step runs. A device at a lower
clock rate, a slow memory and a busy CPU lengthen it. A slowness that comes in slices longer than
the program, such as a CPU quota, shows only in some probes and may not be named.
"""

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.config.run_sections import MeasureConfig
from jaxtrain.distributed.broadcast import gather_texts
from jaxtrain.metrics.names import OWN
from jaxtrain.metrics.step_timer import StepTimer
from jaxtrain.metrics.stragglers import QUORUM, WINDOW, StragglerRule

TIMED_RUNS = 3  # of the program in a probe, of which the median counts
# Width of the matrices, products, numbers copied, copies. It takes 6 ms on a core of a Xeon and, by
# their peaks, 3 ms on an H100 and 17 ms on an A40. The copied numbers exceed the caches of an H100
# (50 MB), and their 128 MB are free between two steps.
PROGRAM = {"gpu": (4096, 8, 1 << 25, 16), "cpu": (512, 1, 1 << 20, 2)}
SENTENCES = {
    "compute": "a fixed computation takes {:.2f} times as long as on the median rank",
    "data": "waits for batches lengthen its steps up to {:.2f} times against the median rank",
    "host": "Python's work between steps lengthens them up to {:.2f} times against the median rank",
}


def build_program(devices: Sequence) -> Callable[[], jax.Array]:
    """Returns program() -> float32 [devices], which computes the same on each device at once."""
    mesh = Mesh(np.array(devices), "device")
    width, products, numbers, copies = PROGRAM.get(devices[0].platform, PROGRAM["gpu"])
    dtype = jnp.float32 if devices[0].platform == "cpu" else jnp.bfloat16

    def run(seed_1):
        square = jnp.sin(seed_1 + jnp.arange(width * width, dtype=jnp.float32))
        square = square.reshape(width, width).astype(dtype)
        square = jax.lax.optimization_barrier(square)  # or XLA would compute the sines repeatedly

        def multiply(_, x):
            y = (x @ square).astype(jnp.float32)
            return (y * jax.lax.rsqrt(jnp.mean(y * y))).astype(dtype)  # or it would overflow

        product = jax.lax.fori_loop(0, products, multiply, square)
        copied = jnp.broadcast_to(product[0, 0].astype(jnp.float32), numbers)
        copied = jax.lax.fori_loop(0, copies, lambda i, x: x * 0.5 + i, copied)
        return copied.sum(keepdims=True)  # of all, or XLA would leave out the others

    seed = jax.device_put(np.ones(len(devices), np.float32), NamedSharding(mesh, P("device")))
    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("device"), out_specs=P("device")))
    return lambda: program(seed)


def time_program(program: Callable[[], jax.Array]) -> tuple[float, int]:
    """Returns the seconds until all devices have run the program, and which of them was last."""
    started_s, ended_s = time.perf_counter(), []
    for shard in program().addressable_shards:
        shard.data.block_until_ready()
        ended_s.append(time.perf_counter() - started_s)
    # These times never decrease. The slowest device is the first that ends as late as the last.
    return ended_s[-1], int(np.argmax(np.array(ended_s) >= 0.98 * ended_s[-1]))


class RankWatch:
    """Compares the processes once in a while, and records which are stragglers.

    Every process must call is_due() and probe() at the same steps: they gather.

    Args:
        hosts: name of each process's host.
        timer: of this process; its late shares become `data` and `host`.
        first: step at which this start of the run begins.

    Attributes:
        found: {"rank", "host", "kind", "ratio", "first_step", "last_step"} of each straggler so
            far; last_step is None while it lasts.
        ratios: {kind: own times of all ranks over the median rank's, float list [ranks]}.
    """

    def __init__(self, cfg: MeasureConfig, hosts: list[str], timer: StepTimer, first: int):
        self._cfg, self._hosts, self._timer = cfg, hosts, timer
        self._due = first + cfg.straggler_every
        self._rule = StragglerRule(len(hosts), len(OWN))
        self._program: Callable[[], jax.Array] | None = None
        self._costs_s = deque(maxlen=WINDOW)
        self._cost_s = 0.0  # of this process's last probe
        self.found: list[dict] = []
        self.ratios: dict[str, list[float]] = {}

    def is_due(self, step: int) -> bool:
        """Returns whether to probe after this step."""
        return step >= self._due

    def probe(self, step: int) -> list[str]:
        """Times the program, gathers all processes' times and judges them.

        No step may be in flight.

        Returns:
            a sentence for each process that has become a straggler, or is none any more.
        """
        if self._program is None:
            self._program = build_program(jax.local_devices())
            time_program(self._program)  # compiles it
        started_s = time.perf_counter()
        runs = [time_program(self._program) for _ in range(TIMED_RUNS)]
        compute_s, device = sorted(runs)[TIMED_RUNS // 2]
        late = self._timer.late_shares()
        own = [compute_s, 1 + late["data"], 1 + late["host"]]
        step_s = self._timer.usual_s()
        mine = {"own": own, "device": device, "cost_s": self._cost_s or compute_s, "step_s": step_s}
        ranks = [json.loads(text) for text in gather_texts(json.dumps(mine))]
        self._cost_s = time.perf_counter() - started_s
        self._rule.add(np.array([rank["own"] for rank in ranks]))
        self.ratios = dict(zip(OWN, self._rule.ratios_RK.T.round(4).tolist(), strict=True))
        # Every process computes the next step from the same gathered numbers.
        self._costs_s.append(max(rank["cost_s"] for rank in ranks))
        all_s = statistics.median(rank["step_s"] for rank in ranks) * self._cfg.straggler_cost
        steps = math.ceil(statistics.median(self._costs_s) / all_s)
        self._due = step + max(self._cfg.straggler_every, steps)
        return self._changes(step, [rank["device"] for rank in ranks])

    def _changes(self, step: int, devices: list[int]) -> list[str]:
        """Updates `found`; returns a sentence for each change."""
        sentences = []
        lasting = {(f["rank"], f["kind"]): f for f in self.found if f["last_step"] is None}
        for rank, kind in np.ndindex(self._rule.is_slow_RK.shape):
            slow, known = self._rule.is_slow_RK[rank, kind], lasting.get((rank, OWN[kind]))
            where = f"straggler: rank {rank} on {self._hosts[rank]}:"
            if slow and not known:
                ratio = self.ratios[OWN[kind]][rank]
                entry = {"rank": rank, "host": self._hosts[rank], "kind": OWN[kind], "ratio": ratio}
                self.found.append(entry | {"first_step": step, "last_step": None})
                what = SENTENCES[OWN[kind]].format(ratio)
                if OWN[kind] == "compute" and jax.local_device_count() > 1:
                    what += f", and its device {devices[rank]} is the slowest"
                sentences.append(
                    f"{where} {what}, in {QUORUM} of the {WINDOW} probes by step {step}"
                )
            elif known and not slow:
                known["last_step"] = step
                sentences.append(
                    f"{where} {OWN[kind]} is like the other ranks' again, by step {step}"
                )
            elif known:
                known["ratio"] = max(known["ratio"], self.ratios[OWN[kind]][rank])
        return sentences

    def slow_kinds(self, rank: int) -> list[str]:
        """Returns the kinds of work in which a rank is a straggler."""
        return [kind for kind, slow in zip(OWN, self._rule.is_slow_RK[rank], strict=True) if slow]
