"""Starts and ends JAX in this process: its settings, compile cache, and connection to others.

`start_runtime` must run before the first array, because JAX reads most of its settings only once.
"""

import dataclasses
import ipaddress
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import jax
from absl import logging

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.distributed import memory
from jaxtrain.distributed.cluster import World, check_world

JOIN_S = 300  # time within which all processes must have started
EXIT_DELAY_S = 1.0  # process 0 exits this much later, because it hosts JAX's coordination service
SINGLE_PROCESS = World()
# xla_gpu_deterministic_ops would exclude the same operations and also turn off autotuning.
DETERMINISTIC_FLAGS = "--xla_gpu_exclude_nondeterministic_ops=true"


def start_runtime(cfg: TrainConfig, world: World = SINGLE_PROCESS) -> None:
    """Sets precision, determinism, memory and the compile cache, and joins the other processes.

    Raises:
        ValueError: `world` is inconsistent, the user's fraction of memory is invalid, or JAX finds
            another number of devices than the inventory states.
    """
    check_world(world)
    memory.fraction()  # raises if it is invalid
    os.environ.update(memory.environment())
    xla_flags = os.environ.get("XLA_FLAGS", "")
    if cfg.deterministic and DETERMINISTIC_FLAGS not in xla_flags:
        os.environ["XLA_FLAGS"] = f"{xla_flags} {DETERMINISTIC_FLAGS}".strip()
    jax.config.update("jax_enable_x64", cfg.model.dtype == "float64")
    if uses_compile_cache(world.processes) and (cache := find_compile_cache(cfg.compile_cache)):
        jax.config.update("jax_compilation_cache_dir", str(cache))
        # By default JAX stores only programs that take over 1 s to compile. But initialisation
        # compiles many small ones, which takes 1.7 s in all.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if world.processes > 1:
        join_processes(world)
    if world.devices and jax.local_device_count() != world.devices:
        raise ValueError(
            f"this process must have the {world.devices} devices that the inventory states; JAX "
            f"finds {jax.local_device_count()}: {jax.local_devices()}. Correct gpus in --hosts."
        )


def find_compile_cache(folder: str) -> Path | None:
    """Returns the folder of compiled programs, created if missing; None if it cannot be used.

    The cache only makes starts faster, so a folder that cannot be used is a warning, not an error.
    """
    if not folder:
        return None
    try:
        cache = Path(folder).expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK | os.X_OK):
            return cache
        reason = f"{cache} cannot be written to"
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home directory
        reason = str(error)
    logging.warning("no compile cache: %s (--compile_cache=%s)", reason, folder)
    return None


def is_set_to_cpu() -> bool:
    """Returns whether JAX's settings choose the CPU. Asking JAX for a device would start it."""
    return (getattr(jax.config, "jax_platforms", None) or "").split(",")[0] == "cpu"


def uses_compile_cache(processes: int) -> bool:
    """Returns whether compiled programs are stored on disk: not with several processes on GPUs.

    Processes on GPUs share autotuning results, so that all compile the same program; otherwise
    collectives may be ordered differently and hang (https://github.com/openxla/xla/issues/7716).
    JAX writes its cache on process 0 only. At the next start process 0 would read the program from
    there, while the others compile it and wait for the autotuning results of process 0. This
    follows from JAX's source; it was not observed on GPUs.
    """
    return processes == 1 or is_set_to_cpu()


def bind_address(coordinator: str) -> str | None:
    """Returns the address on which process 0 listens; None for every network of the host.

    A literal IP address limits it to that network. A host name cannot, because /etc/hosts often
    maps it to 127.0.1.1, which other hosts cannot reach.
    """
    host = coordinator.rpartition(":")[0].strip("[]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return None
    return coordinator


def join_processes(world: World) -> None:
    """Connects this process to the others, so that when one dies, the others fail rather than hang.

    On CPU, gloo raises the error within seconds. On GPUs an NCCL collective does not end when a
    peer dies (XLA's xla_gpu_nccl_terminate_on_error is off); instead JAX ends all processes when
    one has been silent for world.heartbeat_s. That was tested with processes waiting on a CPU host,
    never with NCCL. Only the launcher detects a peer that hangs without dying.
    """
    # With "recoverability" off, JAX ends all processes when one dies, but after an error a process
    # waits for the dead peer when it exits. With it on, JAX ends none.
    jax.config.update("jax_enable_recoverability", is_set_to_cpu())
    jax.distributed.initialize(
        world.coordinator,
        world.processes,
        world.process,
        local_device_ids=world.local_devices,
        cluster_detection_method="deactivate",  # detect_world has done this
        heartbeat_timeout_seconds=world.heartbeat_s,
        initialization_timeout=JOIN_S,
        coordinator_bind_address=bind_address(world.coordinator),
    )
    logging.info(
        "process %d of %d (%s), coordinator %s",
        world.process,
        world.processes,
        world.engine,
        world.coordinator,
    )


def exit_together(status: int | None) -> NoReturn:
    """Exits once all processes have called this.

    JAX's own exit would let process 0 end first; the others would then abort, because the
    coordination service that it hosts is gone.
    """
    if jax.distributed.is_initialized():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("exit")
        if jax.process_index() == 0:
            time.sleep(EXIT_DELAY_S)
    exit_process(status)


def exit_process(status: int | None) -> NoReturn:
    """Exits, skipping JAX's exit barrier among several processes, which would await dead peers."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)


def fit_config_to_world(cfg: TrainConfig, world: World) -> TrainConfig:
    """Returns the config for a job that runs with fewer processes than planned.

    The batch stays the same and is accumulated over more microbatches, so that no device
    needs more memory.

    Raises:
        ValueError: no number of microbatches divides the batch over the devices.
    """
    if world.processes >= world.planned:
        return cfg
    least = -(-cfg.accumulation * world.planned // world.processes)  # rounded up
    rows, devices = cfg.data.batch, jax.device_count()
    sizes = [phase.sequences for phase in cfg.data.sizes.phases]
    divides = lambda n: rows % (n * devices) == 0 and all(size % (rows // n) == 0 for size in sizes)
    microbatches = [n for n in range(least, rows + 1) if divides(n)]
    if not microbatches:
        raise ValueError(
            f"data.batch must divide over the {devices} devices that are left of a larger job; got "
            f"{rows}. Set --data.batch to a multiple of {devices}, or wait for all hosts."
        )
    logging.warning(
        "%d of %d planned processes: the same batch in %d microbatches, not %d",
        world.processes,
        world.planned,
        microbatches[0],
        cfg.accumulation,
    )
    return dataclasses.replace(cfg, accumulation=microbatches[0])
