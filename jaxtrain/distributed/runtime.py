"""JAX's process-wide settings, made from the config before the first array."""

import dataclasses
import ipaddress
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging

from jaxtrain.distributed import memory
from jaxtrain.distributed.cluster import World, check_world

HEARTBEAT_S = 20  # of silence, until JAX ends all processes; a link may be down for less
JOIN_S = 300  # for all processes to come
PART_S = 1.0  # for the other processes to be gone
SINGLE_PROCESS = World()
DETERMINISTIC_FLAGS = "--xla_gpu_deterministic_ops=true"


def start_runtime(cfg, world=SINGLE_PROCESS) -> None:
    """Sets precision, determinism, memory and the compile cache, and joins the other processes.

    Args:
        cfg: a TrainConfig.
        world: the World that this process is one of.

    Raises:
        ValueError: the world's parts do not fit each other, the user's share of memory is none, or
            JAX finds other devices than stated.
    """
    check_world(world)
    memory.fraction()
    os.environ.update(memory.environment())
    if cfg.deterministic and DETERMINISTIC_FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_FLAGS}".strip()
    jax.config.update("jax_enable_x64", cfg.model.dtype == "float64")
    cache = find_compile_cache(cfg.compile_cache) if uses_compile_cache(world.processes) else None
    if cache:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        # The defaults keep only programs of over 1 s: initialisation alone is 1.7 s of small ones.
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
    """Returns the folder of compiled programs, made if missing; None where there can be none.

    A run is slower to start without it, and otherwise the same: a line says why it is off.
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


def on_cpu() -> bool:
    """Whether JAX was told to take this host's processor; asks for no device, which starts one."""
    return (jax.config.jax_platforms or "").split(",")[0] == "cpu"


def uses_compile_cache(processes: int) -> bool:
    """Whether compiled programs are kept on disk: not by several processes on GPUs.

    They share the autotuning of a program, so that it is the same in all; without that, collectives
    may come in another order and hang (https://github.com/openxla/xla/issues/7716). But JAX writes
    its cache on process 0 alone: at the next start it would read where the others, with caches of
    their own, compile and wait for what it has tuned. Read in JAX's source; not seen on GPUs.
    """
    return processes == 1 or on_cpu()


def bind_address(coordinator: str) -> str | None:
    """Where process 0 listens: on the stated network alone, if an address states it.

    A host's own name is often 127.0.1.1 in its /etc/hosts, where no other host can reach it: None,
    which is all networks.
    """
    host = coordinator.rpartition(":")[0].strip("[]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return None
    return coordinator


def join_processes(world) -> None:
    """Joins the processes of a World, so that the death of one is an error in all, not a hang.

    On CPU gloo raises it within seconds. On GPUs a peer's death ends a NCCL collective in no
    process (XLA's xla_gpu_nccl_terminate_on_error is off): there JAX ends all processes after
    HEARTBEAT_S of a peer's silence, whatever they wait in. That was measured with processes that
    wait on a CPU host, never with NCCL; a peer that hangs alive is left to launch's watch.
    """
    # Where this is off, an error waits at exit for the dead peer until JAX ends all; where it is
    # on, JAX ends none.
    jax.config.update("jax_enable_recoverability", on_cpu())
    jax.distributed.initialize(
        world.coordinator,
        world.processes,
        world.process,
        local_device_ids=world.local_devices,
        cluster_detection_method="deactivate",  # `detect` has decided
        heartbeat_timeout_seconds=HEARTBEAT_S,
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


def exit_together(code: int | None) -> None:
    """Ends this process with a status, all of several processes together.

    JAX's own exit would let process 0 go first, and the others abort when its service is gone.
    """
    if jax.distributed.is_initialized():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("part")
        if jax.process_index() == 0:
            time.sleep(PART_S)
    exit_process(code)


def exit_process(code: int | None) -> None:
    """Exits; one of several processes at once, for in JAX's barrier a dead peer is waited for."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def fit_config_to_world(cfg, world):
    """The config for a world of fewer processes than planned: the same batch, in more parts.

    Raises:
        ValueError: the batch divides over no number of parts that is enough.
    """
    if world.processes >= world.planned:
        return cfg
    least = -(-cfg.accumulation * world.planned // world.processes)
    rows, devices = cfg.data.batch, jax.device_count()
    parts = [n for n in range(least, rows + 1) if rows % (n * devices) == 0]
    if not parts:
        raise ValueError(
            f"data.batch must divide over the {devices} devices that are left of a larger job; got "
            f"{rows}. Set --data.batch to a multiple of {devices}, or wait for all hosts."
        )
    logging.warning(
        "%d of %d planned processes: the same batch in %d parts, not %d",
        world.processes,
        world.planned,
        parts[0],
        cfg.accumulation,
    )
    return dataclasses.replace(cfg, accumulation=parts[0])


def check_same_on_all_processes(name: str, text: str) -> None:
    """Raises ValueError unless all processes hold the same short text (a hash, a fingerprint)."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    mine = np.frombuffer(text.encode().ljust(64)[:64], np.uint8)
    all_texts = multihost_utils.process_allgather(mine)
    texts = [bytes(row).decode().strip() for row in np.atleast_2d(all_texts)]
    if len(set(texts)) > 1:
        raise ValueError(
            f"{name} must be the same on every process; got {dict(enumerate(texts))}. "
            "Start all of them with the same flags, code and data."
        )
