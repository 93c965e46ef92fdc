import os

import xla_flags

# Set before jax is imported. Tests have 8 devices, of which a mesh may use some.
os.environ["XLA_FLAGS"] = xla_flags.flags(devices=8)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

# xdist distributes whole files in this order. If a long one came last, the other worker would idle.
LONGEST = (
    "test_launch_engines.py",
    "test_train.py",
    "test_train_killed.py",
    "test_benchmarks_gpu_training.py",
    "test_kernels_references.py",
    "test_crosscheck_main.py",
    "test_kernels_audit.py",
    "test_launch_run.py",
    "test_model_transformer.py",
    "test_planning_compiled.py",
    "test_plan.py",
    "test_optim_sharded_muon.py",
    "test_study.py",
    "test_benchmarks_suites.py",
    "test_training_diagnostic_step.py",
    "test_kernels_choice.py",
    "test_training_step.py",
    "test_distributed_runtime.py",
    "test_interop_import_export.py",
    "test_crosscheck_faults.py",
    "test_kernels_training.py",
)


@pytest.fixture
def shard_cache(tmp_path, monkeypatch):
    """Stores cached checksums of shards in the test's own folder, not in the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pytest_configure(config):
    if config.option.markexpr == "gpu" and jax.default_backend() != "gpu":
        raise pytest.UsageError(
            f"-m gpu needs a GPU; got {jax.default_backend()}. Set JAX_PLATFORMS=cuda."
        )


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
