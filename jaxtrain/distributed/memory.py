"""The fraction of each GPU's memory that JAX reserves at its start, for training and planning."""

import os

# JAX's own default is 0.75. The rest is for the driver, NCCL, cuBLAS and cuDNN.
DEFAULT_FRACTION = 0.9
# JAX raises an error if both are set.
VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def environment() -> dict[str, str]:
    """Returns the environment to set before JAX's first array; {} if the user has set it."""
    if any(os.environ.get(name) for name in VARIABLES):
        return {}
    return {VARIABLES[0]: str(DEFAULT_FRACTION)}


def usable_bytes(hbm_bytes: int) -> int:
    """Returns how many of a device's bytes training may allocate."""
    return int(fraction() * hbm_bytes)


def fraction() -> float:
    """Returns the fraction that the user has set, or else DEFAULT_FRACTION.

    Raises:
        ValueError: the user's fraction is outside (0, 1].
    """
    name = next((name for name in VARIABLES if os.environ.get(name)), "")
    if not name:
        return DEFAULT_FRACTION
    try:
        value = float(os.environ[name])
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1]; got {os.environ[name]!r}. Unset it.")
    return value
