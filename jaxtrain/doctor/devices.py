"""What JAX itself finds. A process of its own: a broken driver can hang or end it, not the doctor.

    python -m jaxtrain.doctor.devices

prints one line of JSON.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from jaxtrain.doctor.check import PROBLEM, WARNING, Check, kill, start

MARK = "jaxtrain devices: "


def report() -> dict:
    """Starts JAX as training does, computes a product, and returns what it found."""
    import jax
    import jax.numpy as jnp

    from jaxtrain import WANTS_GPU
    from jaxtrain.distributed import memory
    from jaxtrain.ops.routes import cpu_multiplies_bf16

    os.environ.update(memory.environment() if not _both_set(memory) else {})
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # to look, not to take it all
    devices = jax.local_devices()
    x = jnp.ones((256, 256), jnp.bfloat16)
    total = float((x @ x).astype(jnp.float32).sum())
    first = devices[0]
    found = {
        "platform": first.platform,
        "kinds": [device.device_kind for device in devices],
        "product": total == 256.0**3,
        "wants_gpu": WANTS_GPU and first.platform == "cpu",
        "bf16": cpu_multiplies_bf16() if first.platform == "cpu" else None,
        "capability": str(getattr(first, "compute_capability", "")),
        "cudnn": None,
    }
    if first.platform == "gpu":
        found["cudnn"] = _cudnn()
    return found


def _both_set(memory) -> bool:
    return all(os.environ.get(name) for name in memory.VARIABLES)


def _cudnn() -> int | None:
    """cuDNN's version as 90800; None where it cannot be loaded."""
    try:
        from jax._src.lib import cuda_versions

        return cuda_versions.cudnn_get_version()
    except Exception:  # a private module: absent, or without cuDNN
        return None


class Asked:
    """A process that looks at the devices, while the doctor looks at other things."""

    def __init__(self):
        self.began = time.monotonic()
        # The jaxtrain of this process, whatever the current folder holds.
        root = str(Path(__file__).resolve().parent.parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        argv = [sys.executable, "-P", "-m", "jaxtrain.doctor.devices"]
        self.process = start(argv, os.environ | {"PYTHONPATH": path})

    def answer(self, seconds: float) -> tuple[dict, str]:
        """Returns (what it found, ""), or ({}, why it found nothing)."""
        left = max(0.0, seconds - (time.monotonic() - self.began))
        try:
            out, err = self.process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            kill(self.process)
            return {}, f"JAX did not find its devices within {seconds:g} s"
        lines = [line for line in out.splitlines() if line.startswith(MARK)]
        if lines:
            return json.loads(lines[-1].removeprefix(MARK)), ""
        code = self.process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        said = [line.strip() for line in err.splitlines() if line.strip()]
        return {}, f"JAX ended with {how}: {said[-1][:160] if said else 'it said nothing'}"


def cores() -> int:
    """Cores that this process may use; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_devices(found: dict, why: str, has_gpu: bool) -> list[Check]:
    """The devices, whether they are a fallback, and their bf16 and cuDNN."""
    if not found:
        fix = "JAX_PLATFORMS=cpu jaxtrain doctor   # is it the GPU's side?"
        return [Check("devices", why, PROBLEM, fix if has_gpu else "")]
    kinds = {kind: found["kinds"].count(kind) for kind in found["kinds"]}
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if found["platform"] == "cpu":
        text += f", {cores()} cores"
    checks = [Check("devices", text)]
    if found["platform"] == "cpu" and has_gpu:
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            why, fix = "JAX_PLATFORMS=cpu hides the GPU", "unset JAX_PLATFORMS"
        else:
            why, fix = "FALLBACK: JAX does not use the GPU", ""
        state = WARNING if fix else PROBLEM
        checks = [Check("devices", f"{text}; {why}", state, fix)]
    if not found["product"]:
        checks.append(Check("devices", "a product of two matrices came out wrong", PROBLEM))
    return [*checks, _bf16(found), *_check_cudnn(found)]


def _bf16(found) -> Check:
    if found["platform"] == "cpu":
        fast = "fast: AMX, AVX512-BF16 or Arm's"
        slow = "this processor has no bf16 products: --model.dtype=float32 is faster"
        return Check("bf16", fast if found["bf16"] else slow)
    capability = tuple(int(part) for part in found["capability"].split(".") if part.isdigit())
    if capability and capability < (8, 0):
        text = f"compute capability {found['capability']} has no bf16 products (8.0 has)"
        return Check("bf16", text, WARNING, "jaxtrain train CONFIG --model.dtype=float32")
    return Check("bf16", f"fast: compute capability {found['capability'] or 'unknown'}")


def _check_cudnn(found) -> list[Check]:
    if found["platform"] != "gpu":
        return []
    if found["cudnn"] is None:
        text = "JAX does not find it: attention runs on XLA's own, slower products"
        return [Check("cudnn", text, WARNING, "pip install nvidia-cudnn-cu12")]
    version = found["cudnn"]
    return [Check("cudnn", f"{version // 10_000}.{version // 100 % 100}.{version % 100}")]


if __name__ == "__main__":
    print(f"{MARK}{json.dumps(report())}", flush=True)
