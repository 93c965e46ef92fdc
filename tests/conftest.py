import gc
import os
import shutil
import sys
import tempfile

import xla_flags

from jaxtrain import keep_freed_memory

keep_freed_memory()  # as in the commands, which most tests run within this process

# Some machines set this. Each of the tests' many processes would compile our sources again: 0.4 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Set before jax is imported. Tests have 8 devices, of which a mesh may use some.
os.environ["XLA_FLAGS"] = xla_flags.flags(devices=8)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Half of a short run is the compilation of its step, and many tests compile the same one. xdist's
# workers and the tests' child processes inherit this folder, which lasts as long as pytest runs.
OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxtrain-tests-xla-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax  # noqa: E402
import pytest  # noqa: E402

# Tracing creates many objects, few of which are garbage: with Python's own thresholds a tenth of
# the time to trace and lower the step of configs/debug.py goes into collections (jax 0.10.2).
gc.set_threshold(100_000, 20, 20)

# xdist distributes whole files in this order. If a long one came last, the other worker would idle.
LONGEST = (
    "test_launch_engines.py",
    "test_train.py",
    "test_kernels_audit.py",
    "test_crosscheck_main.py",
    "test_train_killed.py",
    "test_crosscheck_rounding.py",
    "test_study.py",
    "test_planning_compiled.py",
    "test_docs_find_a_fault.py",
    "test_plan.py",
    "test_model_transformer.py",
    "test_benchmarks_gpu_training.py",
    "test_kernels_references.py",
    "test_crosscheck_optimizers.py",
    "test_launch_run.py",
    "test_launch_sites.py",
    "test_optim_sharded_muon.py",
    "test_benchmarks_collectives.py",
    "test_benchmarks_suites.py",
    "test_training_diagnostic_step.py",
    "test_kernels_choice.py",
    "test_training_step.py",
    "test_optim_parametrisation.py",
    "test_distributed_runtime.py",
    "test_interop_import_export.py",
    "test_crosscheck_faults.py",
    "test_crosscheck_acceptance.py",
    "test_kernels_training.py",
    "test_training_stragglers.py",
)

# Further files that take over 2 s or import torch. All others are the fast subset:
# python -m pytest -m fast
SLOW = """
benchmarks_child benchmarks_first_day benchmarks_gpu_tests benchmarks_optimizer benchmarks_transfer
branching checkpoint_broken checkpoint_integrity checkpoint_manager checkpoint_processes
config_command_line crosscheck_batches crosscheck_causes crosscheck_loops crosscheck_optimizer_check
crosscheck_pretrained crosscheck_reordering crosscheck_torch_data crosscheck_torch_model
crosscheck_trace data_encode data_encoding_cut_points data_encoding_formats data_encoding_journal
data_encoding_pipeline data_encoding_roundtrip data_loader data_mixture data_tokenizer
data_vocabulary distributed_mesh distributed_preemption docs docs_minimal doctor evaluate generate
interop_configs interop_export interop_families_transformers interop_hf interop_hf_tokenizer
interop_nanochat interop_run_weights interop_text_model interop_training interop_vocabulary
kernels_ampere kernels_attention_steps kernels_bench kernels_bench_inputs kernels_key_blocks
kernels_mosaic kernels_nonfinite kernels_query_blocks kernels_quiet kernels_validation ladder
launch_answers launch_compare launch_follow launch_host_channel launch_host_keeper
launch_host_process launch_host_supervise launch_network launch_operate launch_prepare launch_ray
launch_report_power launch_slo launch_summary launch_sync_code metrics_mfu metrics_stragglers
model_activations model_layer_kinds model_layer_scan model_loss ops_fused ops_precision ops_routes
optim_acceleration optim_build optim_build_acceleration optim_build_restart optim_build_state
optim_default_axes optim_diagnostics optim_lmo optim_muon optim_muown optim_newton_schulz
optim_noise optim_normuon optim_owners optim_precision optim_rate_step optim_recipes optim_soap
optim_tail_average profile relay reporting_loss_curve reporting_run_logger run_directory_lock
sites_attack sites_exchange sites_fragments sites_lost sites_rounds study_plan study_scaling
study_work track3 train_command_line train_run_directory train_together training_loop
training_mixture training_phases training_programs training_startup training_tasks webhook
"""
SLOW_FILES = {*LONGEST, *(f"test_{name}.py" for name in SLOW.split())}


@pytest.fixture(autouse=True, scope="module")
def old_x64_setting():
    """Restores JAX's x64 setting, which a float64 run changes for its whole process."""
    wide = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", wide)


@pytest.fixture
def shard_cache(tmp_path, monkeypatch):
    """Stores cached checksums of shards in the test's own folder, not in the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


LEAVE_OUT_LONG = "JAXTRAIN_TESTS_LEAVE_OUT_LONG"  # for xdist's workers, which inherit it


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # not a worker
        chosen = config.args_source is config.ArgsSource.ARGS or config.option.markexpr
        os.environ[LEAVE_OUT_LONG] = "" if chosen else "1"
    if config.option.markexpr == "gpu" and jax.default_backend() != "gpu":
        raise pytest.UsageError(
            f"-m gpu needs a GPU; got {jax.default_backend()}. Set JAX_PLATFORMS=cuda."
        )


def pytest_ignore_collect(collection_path, config):
    """Leaves out files that have no test of the subset, so that they need not be imported.

    Some of those without a test for a GPU need 8 devices when they are imported.
    """
    if collection_path.suffix != ".py":
        return None
    if config.option.markexpr == "fast" and collection_path.name in SLOW_FILES:
        return True
    if config.option.markexpr == "gpu" and "pytest.mark.gpu" not in collection_path.read_text():
        return True
    return None


def pytest_unconfigure():
    if OWN_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_collection_finish():
    gc.freeze()  # a collection need not visit imported modules


def pytest_terminal_summary(terminalreporter):
    if os.environ[LEAVE_OUT_LONG]:
        terminalreporter.write_line("left out: the long tests, which -m long runs")


def pytest_collection_modifyitems(config, items):
    if os.environ[LEAVE_OUT_LONG]:
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
    for item in items:
        if item.path.name not in SLOW_FILES and not item.get_closest_marker("long"):
            item.add_marker("fast")
