import os

# Before jax. Every test sees 8 devices; a mesh takes as many as it asks for. Laws hold at any
# optimisation level, and most of the suite's time is compilation: level 0 is 3.7 times faster.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config):
    if config.option.markexpr == "gpu" and jax.default_backend() != "gpu":
        raise pytest.UsageError(
            f"-m gpu needs a GPU; got {jax.default_backend()}. Set JAX_PLATFORMS=cuda."
        )
