"""The share of each GPU's memory that JAX takes at its start, for training and for its plans."""

import os

DEFAULT_FRACTION = (
    0.9  # JAX's own default is 0.75; the rest is the driver's, NCCL's, cuBLAS' and cuDNN's
)
VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)  # JAX refuses both at once


def environment() -> dict[str, str]:
    """The environment variable to set before JAX's first array; none where the user has set one."""
    return (
        {}
        if any(os.environ.get(name) for name in VARIABLES)
        else {VARIABLES[0]: str(DEFAULT_FRACTION)}
    )


def fraction() -> float:
    """The user's share, else SHARE.

    Raises:
        ValueError: the user's is outside (0, 1].
    """
    name = next((name for name in VARIABLES if os.environ.get(name)), "")
    if not name:
        return DEFAULT_FRACTION
    try:
        found = float(os.environ[name])
    except ValueError:
        found = 0.0
    if not 0 < found <= 1:
        raise ValueError(f"{name} must be in (0, 1]; got {os.environ[name]!r}. Unset it.")
    return found
