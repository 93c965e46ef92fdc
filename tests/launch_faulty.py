"""The trainer, with faults that cannot be made from outside: SIGUSR2 does what /tmp/fault says."""

import runpy
import signal
import time
from pathlib import Path


def fail(number, frame):
    fault = Path("/tmp/fault").read_text().strip()
    if fault == "memory":
        held = [bytearray(1 << 20) for _ in range(4096)]
        raise AssertionError(f"the kernel let {len(held)} MiB pass")
    time.sleep(1e6)  # stuck in Python; JAX's own threads, its heartbeat among them, live on


signal.signal(signal.SIGUSR2, fail)
runpy.run_module("jaxtrain.train", run_name="__main__", alter_sys=True)
