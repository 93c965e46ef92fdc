"""Checks the devices that JAX finds, in a separate process, which a broken driver may hang or kill.

    python -m jaxtrain.doctor.devices

prints one line of JSON.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from jaxtrain.doctor.check import PROBLEM, WARNING, Check, kill_program, start_program

MARK = "jaxtrain devices: "  # prefix of the line of JSON; libraries may print other lines


def find_devices() -> dict[str, Any]:
    """Starts JAX as training does, multiplies two matrices, and returns what it found."""
    import jax
    import jax.numpy as jnp

    from jaxtrain import WANTS_GPU
    from jaxtrain.distributed import memory
    from jaxtrain.ops.cudnn import cudnn_version
    from jaxtrain.ops.devices import cpu_multiplies_bf16

    os.environ.update(memory.environment())
    # JAX must not preallocate memory, because another program may be training on the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    devices = jax.local_devices()
    first = devices[0]
    on_cpu = first.platform == "cpu"
    x = jnp.ones((256, 256), jnp.bfloat16)
    return {
        "platform": first.platform,
        "kinds": [device.device_kind for device in devices],
        "product": float((x @ x).astype(jnp.float32).sum()) == 256.0**3,
        "wants_gpu": WANTS_GPU and on_cpu,
        "bf16": cpu_multiplies_bf16() if on_cpu else None,
        "capability": str(getattr(first, "compute_capability", "")),
        "cudnn": cudnn_version() if first.platform == "gpu" else None,
    }


class DevicesProcess:
    """A process that finds the devices, while the doctor checks other things."""

    def __init__(self):
        self.started_s = time.monotonic()
        # Makes the process import the jaxtrain of this process, not one in the current folder.
        root = str(Path(__file__).resolve().parent.parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        argv = [sys.executable, "-P", "-m", "jaxtrain.doctor.devices"]
        self.process = start_program(argv, os.environ | {"PYTHONPATH": path})

    def wait(self, seconds: float) -> tuple[dict[str, Any], str]:
        """Returns (devices, ""), or ({}, reason) if there are none `seconds` after the start."""
        left_s = max(0.0, seconds - (time.monotonic() - self.started_s))
        try:
            out, err = self.process.communicate(timeout=left_s)
        except subprocess.TimeoutExpired:
            kill_program(self.process)
            return {}, f"JAX did not find its devices within {seconds:g} s"
        found = [line for line in out.splitlines() if line.startswith(MARK)]
        if found:
            return json.loads(found[-1].removeprefix(MARK)), ""
        status = self.process.returncode
        end = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        lines = [line.strip() for line in err.splitlines() if line.strip()]
        return {}, f"JAX ended with {end}: {lines[-1][:160] if lines else 'it printed nothing'}"


def count_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_devices(found: dict[str, Any], reason: str, has_gpu: bool) -> list[Check]:
    """Checks that the devices are the intended ones, compute correctly, and are fast.

    Args:
        found: the result of find_devices; {} if there is none.
        reason: why there is none.
        has_gpu: whether the machine has a GPU.
    """
    if not found:
        fix = "JAX_PLATFORMS=cpu jaxtrain doctor   # shows whether the GPU is the cause"
        return [Check("devices", reason, PROBLEM, fix if has_gpu else "")]
    counts = Counter(found["kinds"])
    text = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
    devices = Check("devices", text)
    if found["platform"] == "cpu":
        text += f", {count_cores()} cores"
        devices = Check("devices", text)
        if has_gpu and os.environ.get("JAX_PLATFORMS") == "cpu":
            text += "; JAX_PLATFORMS=cpu hides the GPU"
            devices = Check("devices", text, WARNING, "unset JAX_PLATFORMS")
        elif has_gpu:
            devices = Check("devices", f"{text}; FALLBACK: JAX does not use the GPU", PROBLEM)
    checks = [devices]
    if not found["product"]:
        checks.append(Check("devices", "a test product of two matrices is wrong", PROBLEM))
    return [*checks, _check_bf16(found), *_check_cudnn(found)]


def _check_bf16(found: dict[str, Any]) -> Check:
    if found["platform"] == "cpu":
        fast = "fast: this CPU has AMX, AVX512-BF16 or Arm's BF16 instructions"
        slow = "this CPU has no bf16 instructions; --model.dtype=float32 is faster"
        return Check("bf16", fast if found["bf16"] else slow)
    capability = tuple(int(part) for part in found["capability"].split(".") if part.isdigit())
    if capability and capability < (8, 0):
        text = f"compute capability {found['capability']} has no bf16 instructions; 8.0 has"
        return Check("bf16", text, WARNING, "jaxtrain train CONFIG --model.dtype=float32")
    return Check("bf16", f"fast: compute capability {found['capability'] or 'unknown'}")


def _check_cudnn(found: dict[str, Any]) -> list[Check]:
    if found["platform"] != "gpu":
        return []
    if found["cudnn"] is None:
        text = "JAX does not find it, so attention uses slower kernels of XLA"
        return [Check("cudnn", text, WARNING, "pip install nvidia-cudnn-cu12")]
    version = found["cudnn"]
    return [Check("cudnn", f"{version // 10_000}.{version // 100 % 100}.{version % 100}")]


if __name__ == "__main__":
    print(f"{MARK}{json.dumps(find_devices())}", flush=True)
