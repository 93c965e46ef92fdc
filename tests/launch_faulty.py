"""Runs the trainer; on SIGUSR2, its process causes the fault that /tmp/fault names."""

import runpy
import signal
import time
from pathlib import Path


def fail(number, frame):
    fault = Path("/tmp/fault").read_text().strip()
    if fault == "memory":
        blocks = [bytearray(1 << 20) for _ in range(4096)]
        raise AssertionError(f"the memory limit allowed {len(blocks)} MiB")
    time.sleep(1e6)  # blocks Python; JAX's own threads and their heartbeats continue


signal.signal(signal.SIGUSR2, fail)
runpy.run_module("jaxtrain.train", run_name="__main__", alter_sys=True)
