"""JAX's process-wide settings, made from the config before the first array."""

import os
from pathlib import Path

import jax
import numpy as np
from absl import logging

DETERMINISTIC_FLAGS = "--xla_gpu_deterministic_ops=true"


def start_runtime(cfg, coordinator="", processes=1, process=0) -> None:
    """Sets precision, determinism and the compile cache, and joins the other processes.

    Args:
        cfg: a TrainConfig.
        coordinator: `host:port` of process 0, with processes > 1.

    Raises:
        ValueError: processes and coordinator do not fit each other.
    """
    if processes > 1 and not (coordinator and 0 <= process < processes):
        raise ValueError(
            "several processes need the coordinator's host:port and 0 <= process < processes; got "
            f"coordinator={coordinator!r}, processes={processes}, process={process}. "
            "Set --coordinator, --processes, --process."
        )
    if cfg.deterministic and DETERMINISTIC_FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_FLAGS}".strip()
    jax.config.update("jax_enable_x64", cfg.model.dtype == "float64")
    if cfg.compile_cache:
        cache = Path(cfg.compile_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
        # The defaults keep only programs of over 1 s: initialisation alone is 1.7 s of small ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if processes > 1:
        jax.distributed.initialize(coordinator, processes, process)
        logging.info("process %d of %d, coordinator %s", process, processes, coordinator)


def same_everywhere(name: str, text: str) -> None:
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
