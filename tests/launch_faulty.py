"""Runs the trainer; on SIGUSR2 it does what /tmp/fault names: faults that need its own process."""

import runpy
import signal
import time
from pathlib import Path


def fail(number, frame):
    fault = Path("/tmp/fault").read_text().strip()
    if fault == "memory":
        blocks = [bytearray(1 << 20) for _ in range(4096)]
        raise AssertionError(f"the kernel let {len(blocks)} MiB pass")
    time.sleep(1e6)  # blocks Python; JAX's own threads, with its heartbeat, live on


signal.signal(signal.SIGUSR2, fail)
runpy.run_module("jaxtrain.train", run_name="__main__", alter_sys=True)
