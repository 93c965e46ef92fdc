"""What products this host's CPU computes fast; pallas_kernels/devices.py identifies GPUs."""

import functools
import platform as host
from pathlib import Path
from typing import Any, TypeAlias

Device: TypeAlias = Any  # jax.Device, which jaxlib defines without type stubs


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Returns the words of this host's /proc/cpuinfo; the empty set if it is not Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text().split() if cpuinfo.exists() else ())


def cpu_multiplies_bf16() -> bool:
    """Returns whether this host's CPU multiplies bf16 (with AVX512-BF16, AMX or Arm's BF16)."""
    if not cpu_flags():  # not Linux: Apple's processors do so since the M2
        return host.machine() == "arm64"
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
