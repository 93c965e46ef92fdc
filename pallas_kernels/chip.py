"""Peaks and sizes of each supported GPU, from its datasheet; no other file contains such numbers.

Peaks are dense (no sparsity), for products that accumulate in float32. On the A40 and the RTX A6000
these run at the full rate; only GeForce cards halve it.
"""

import difflib
from dataclasses import dataclass
from typing import Any

import jax

GB = 10**9


@dataclass(frozen=True)
class Chip:
    """One GPU model."""

    name: str
    kind: str  # jax's Device.device_kind; variants (PCIe, NVL) have other kinds and other peaks
    compute_capability: tuple[int, int]
    peak_flops: dict[str, float]  # FLOP/s by operand type
    hbm_bytes_per_s: float
    hbm_bytes: int  # as the driver reports it if that is known, else nominal
    sms: int
    clock_ghz: float  # boost
    shared_bytes_per_block: int  # the maximum, after opting in
    shared_bytes_per_sm: int
    threads_per_sm: int
    l2_bytes: int
    nvlink_bytes_per_s: float  # both directions together; 0 means none
    pcie_bytes_per_s: float  # one direction
    source: str
    nvlink_switched: bool = False  # NVLink joins all GPUs of a host, not pairs
    tensor_ghz: float = 0.0  # the boost clock while tensor cores run; 0: clock_ghz

    @property
    def arch(self) -> str:
        """The compute capability as NVIDIA's compilers write it, such as "sm_86"."""
        return f"sm_{self.compute_capability[0]}{self.compute_capability[1]}"

    @property
    def capability(self) -> int:
        """The compute capability times 10."""
        return 10 * self.compute_capability[0] + self.compute_capability[1]

    @property
    def tensor_clock_ghz(self) -> float:
        """The clock of the tensor cores' peak: Hopper boosts less while they run."""
        return self.tensor_ghz or self.clock_ghz

    def seconds(self, hbm_bytes: float, flops: float, dtype: str = "bfloat16") -> float:
        """Returns the roofline: the least time to move the bytes and do the FLOPs."""
        return max(hbm_bytes / self.hbm_bytes_per_s, flops / self.peak_flops[dtype])


def _peaks(half, tf32, single):
    """Returns peak_flops, given TFLOP/s in bfloat16 and float16, in TF32 and in float32."""
    return {
        "bfloat16": half * 1e12,
        "float16": half * 1e12,
        "tf32": tf32 * 1e12,
        "float32": single * 1e12,
    }


_AMPERE_86: dict[str, Any] = {
    "compute_capability": (8, 6),
    "shared_bytes_per_block": 101_376,
    "shared_bytes_per_sm": 102_400,
    "threads_per_sm": 1_536,
    "pcie_bytes_per_s": 32 * GB,
}
_ADA_89: dict[str, Any] = _AMPERE_86 | {"compute_capability": (8, 9)}
_A100: dict[str, Any] = {
    "compute_capability": (8, 0),
    "peak_flops": _peaks(312, 156, 19.5),
    "sms": 108,
    "clock_ghz": 1.41,
    "shared_bytes_per_block": 166_912,
    "shared_bytes_per_sm": 167_936,
    "threads_per_sm": 2_048,
    "l2_bytes": 40 << 20,
    "nvlink_bytes_per_s": 600 * GB,
    "nvlink_switched": True,
    "pcie_bytes_per_s": 32 * GB,
    "source": "NVIDIA A100 datasheet, nvidia-a100-datasheet-us-nvidia-1758950-r4-web",
}
_HOPPER: dict[str, Any] = {
    "compute_capability": (9, 0),
    "shared_bytes_per_block": 232_448,
    "shared_bytes_per_sm": 233_472,
    "threads_per_sm": 2_048,
    "l2_bytes": 50 << 20,
    "pcie_bytes_per_s": 64 * GB,
}
_H100_SXM: dict[str, Any] = _HOPPER | {
    "peak_flops": _peaks(989.4, 494.7, 66.9),
    "sms": 132,
    "clock_ghz": 1.98,
    "tensor_ghz": 1.83,  # H100 whitepaper v1.04, table 3
    "nvlink_bytes_per_s": 900 * GB,
    "nvlink_switched": True,
}

# Compute capability, shared memory and threads are from the CUDA C++ Programming Guide, table of
# technical specifications per compute capability. SMs, clocks and bandwidths are from XLA's target
# descriptions (a6000, a100, h100_sxm, h100_pcie, h200) and from the datasheets.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="a40",
            kind="NVIDIA A40",
            peak_flops=_peaks(149.7, 74.8, 37.4),
            hbm_bytes_per_s=696 * GB,
            hbm_bytes=47_697_362_944,  # 48 GB minus ECC, from users' out-of-memory errors
            sms=84,
            clock_ghz=1.74,
            l2_bytes=6 << 20,
            nvlink_bytes_per_s=112.5 * GB,
            source="NVIDIA A40 datasheet, 2022-06; bf16 149.7 TFLOP/s dense",
            **_AMPERE_86,
        ),
        Chip(
            name="a6000",
            kind="NVIDIA RTX A6000",
            peak_flops=_peaks(154.8, 77.4, 38.7),
            hbm_bytes_per_s=768 * GB,
            hbm_bytes=48 << 30,
            sms=84,
            clock_ghz=1.8,
            l2_bytes=6 << 20,
            nvlink_bytes_per_s=112.5 * GB,
            source="NVIDIA RTX A6000 datasheet, 2021; NVIDIA GA102 whitepaper v2.1",
            **_AMPERE_86,
        ),
        Chip(
            name="a10",
            kind="NVIDIA A10",
            peak_flops=_peaks(125.0, 62.5, 31.2),
            hbm_bytes_per_s=600 * GB,
            hbm_bytes=24 * GB,
            sms=72,
            clock_ghz=1.695,
            l2_bytes=6 << 20,
            nvlink_bytes_per_s=0.0,
            source="NVIDIA A10 datasheet, 2021-03; NVIDIA GA102 whitepaper v2.1 for the cache",
            **_AMPERE_86,
        ),
        Chip(
            name="a100_40gb",
            kind="NVIDIA A100-SXM4-40GB",
            hbm_bytes_per_s=1_555 * GB,
            hbm_bytes=40 << 30,
            **_A100,
        ),
        Chip(
            name="a100_80gb",
            kind="NVIDIA A100-SXM4-80GB",
            hbm_bytes_per_s=2_039 * GB,
            hbm_bytes=80 << 30,
            **_A100,
        ),
        Chip(
            name="l40",
            kind="NVIDIA L40",
            peak_flops=_peaks(181.05, 90.5, 90.5),
            hbm_bytes_per_s=864 * GB,
            hbm_bytes=48 << 30,
            sms=142,
            clock_ghz=2.49,
            l2_bytes=96 << 20,
            nvlink_bytes_per_s=0.0,
            source="NVIDIA L40 datasheet, 2023-01; NVIDIA Ada whitepaper for the cache",
            **_ADA_89,
        ),
        Chip(
            name="l40s",
            kind="NVIDIA L40S",
            peak_flops=_peaks(362.05, 183.0, 91.6),
            hbm_bytes_per_s=864 * GB,
            hbm_bytes=48 << 30,
            sms=142,
            clock_ghz=2.52,
            l2_bytes=96 << 20,
            nvlink_bytes_per_s=0.0,
            source="NVIDIA L40S datasheet, 2023-08; NVIDIA Ada whitepaper for the cache",
            **_ADA_89,
        ),
        Chip(
            name="h100_pcie",
            kind="NVIDIA H100 PCIe",
            peak_flops=_peaks(756.0, 378.0, 51.2),
            hbm_bytes_per_s=2_039 * GB,
            hbm_bytes=80 << 30,
            sms=114,
            clock_ghz=1.755,
            tensor_ghz=1.62,
            nvlink_bytes_per_s=600 * GB,
            source="NVIDIA H100 datasheet, 2023; NVIDIA H100 whitepaper v1.04",
            **_HOPPER,
        ),
        Chip(
            name="h100_nvl",
            kind="NVIDIA H100 NVL",
            peak_flops=_peaks(835.5, 417.5, 60.0),
            hbm_bytes_per_s=3_938 * GB,
            hbm_bytes=94 * GB,
            sms=132,
            clock_ghz=1.785,
            tensor_ghz=1.545,  # from the peak
            nvlink_bytes_per_s=600 * GB,
            source="NVIDIA H100 datasheet, 2024; NVIDIA H100 NVL product brief PB-11773-001",
            **_HOPPER,
        ),
        Chip(
            name="h100",
            kind="NVIDIA H100 80GB HBM3",
            hbm_bytes_per_s=3_352 * GB,
            hbm_bytes=84_942_979_072,
            source="NVIDIA H100 datasheet, 2023; NVIDIA H100 whitepaper v1.04",
            **_H100_SXM,
        ),
        Chip(
            name="h200",
            kind="NVIDIA H200",
            hbm_bytes_per_s=4_800 * GB,
            hbm_bytes=141 * GB,
            source="NVIDIA H200 datasheet, 2024",
            **_H100_SXM,
        ),
        Chip(
            name="gh200",
            kind="NVIDIA GH200 480GB",  # 480 GB are the CPU's
            hbm_bytes_per_s=4_000 * GB,
            hbm_bytes=96 * GB,
            source="NVIDIA GH200 datasheet, 2023, with 96 GB of HBM3",
            **_H100_SXM,
        ),
        Chip(
            name="gh200_144gb",
            kind="NVIDIA GH200 144G HBM3e",
            hbm_bytes_per_s=4_900 * GB,
            hbm_bytes=144 * GB,
            source="NVIDIA GH200 datasheet, 2023, with 144 GB of HBM3e",
            **_H100_SXM,
        ),
    )
}


def find_chip(name: str) -> Chip:
    """Returns the chip called `name`. Raises ValueError if the table has none."""
    if name not in CHIPS:
        near = [chip for chip in CHIPS if chip.startswith(name)] if name else []
        near = near or difflib.get_close_matches(name, CHIPS, 1)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"the chip must be one of {', '.join(CHIPS)}; got {name!r}.{hint} To support "
            "another chip, add it, with its source, to pallas_kernels/chip.py."
        )
    return CHIPS[name]


def chip_of_kind(kind: str) -> Chip | None:
    """Returns the chip with a Device.device_kind; None if the table has none."""
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)


def explain_unknown(kind: str) -> str:
    """Returns why a Device.device_kind has no entry in CHIPS, and what to do."""
    if " MIG " in kind:
        return (
            f"{kind!r} is a MIG slice, with a part of a GPU's multiprocessors and bandwidth; "
            "nvidia-smi -mig 0 turns MIG off"
        )
    return f"{kind!r} has no peak in pallas_kernels/chip.py; add it there, with its source"


def detect_chip(device: Any = None) -> Chip:
    """Returns the chip of a jax.Device, by default of the first.

    Raises:
        ValueError: the device is not in the table, so its peaks are unknown.
    """
    kind = (jax.devices()[0] if device is None else device).device_kind
    if chip := chip_of_kind(kind):
        return chip
    raise ValueError(
        f"the device must be a whole GPU of {', '.join(CHIPS)}; got {kind!r}. "
        f"{explain_unknown(kind)}."
    )
