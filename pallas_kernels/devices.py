"""What a jax.Device is: its architecture, and its name in the chip table."""

from typing import Any

from pallas_kernels.chip import chip_of_kind


def gpu_architecture(device: Any) -> str:
    """Returns the architecture of a jax.Device, such as "sm_86"; "" if it is not a GPU."""
    capability = getattr(device, "compute_capability", None)
    return f"sm_{str(capability).replace('.', '')}" if capability else ""


def chip_name(device: Any) -> str:
    """Returns the name of a jax.Device in the chip table; "" if it has none."""
    chip = chip_of_kind(device.device_kind)
    return chip.name if chip else ""
