"""Runs the trainer, with the fault that /tmp/fault names: at once, or on SIGUSR2.

memory    on SIGUSR2, allocates memory until a limit ends the process
nan       on SIGUSR2, makes this process's copy of the weights not finite before its next step
block     on SIGUSR2, blocks Python; JAX's own threads and their heartbeats continue
restore   announces that it restores a checkpoint, and waits before it does
"""

import runpy
import signal
import time
from pathlib import Path

import jax

from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.training.loop import Loop

RESTORE_S = 5.0
real_restore, real_step = Checkpoints.restore, Loop._train_step
poisoned = False


def named_fault() -> str:
    path = Path("/tmp/fault")
    return path.read_text().strip() if path.exists() else ""


def fail(number, frame):
    global poisoned
    fault = named_fault()
    if fault == "memory":
        blocks = [bytearray(1 << 20) for _ in range(4096)]
        raise AssertionError(f"the memory limit allowed {len(blocks)} MiB")
    if fault == "nan":
        poisoned = True
    if fault == "block":
        time.sleep(1e6)


def restore(self, *args, **values):
    if named_fault() == "restore":
        print("faulty: restoring", flush=True)
        time.sleep(RESTORE_S)
    return real_restore(self, *args, **values)


def spoil(x: jax.Array) -> jax.Array:
    """Returns an array whose parts on this process are NaN."""
    parts = [shard.data * float("nan") for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def train_step(self, step):
    global poisoned
    if poisoned:
        poisoned = False
        self.state = self.state._replace(params=jax.tree.map(spoil, self.state.params))
    return real_step(self, step)


signal.signal(signal.SIGUSR2, fail)
Checkpoints.restore, Loop._train_step = restore, train_step
runpy.run_module("jaxtrain.train", run_name="__main__", alter_sys=True)
