"""Resolves model.dtype=auto: bfloat16 where the chip has fast bfloat16 products, else float32.

It is resolved once, before anything is built, so that config.json and the config's hash record the
type of the training.
"""

import dataclasses
from pathlib import Path

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.distributed.broadcast import broadcast_from_process_0, gather_texts
from jaxtrain.ops.devices import Device, cpu_flags
from jaxtrain.run_directory.contents import read_config_json
from pallas_kernels.chip import Chip

AUTO = "auto"
FAST_FLAGS = {
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
}  # flag in /proc/cpuinfo -> its name
AMPERE = (8, 0)  # the first compute capability with bfloat16 tensor cores


def resolve_dtype(
    cfg: TrainConfig, device: Device, workdir: str | Path | None = None
) -> tuple[TrainConfig, str]:
    """Returns (cfg with model.dtype=auto replaced, the reason for the type; "" if it was not auto).

    Every process must call it. A checkpoint in `workdir` overrides the device: a run continues in
    the type that it began with.

    Args:
        workdir: folder of the run to resume; None if there is none.
    """
    if cfg.model.dtype != AUTO:
        return cfg, ""
    choices = gather_texts(" ".join(choose_dtype(device)))  # "DTYPE REASON" of each process
    # float32 if one process needs it: all others would wait for its slow bfloat16 products.
    choice = next((text for text in choices if text.startswith("float32")), choices[0])
    dtype, _, reason = choice.partition(" ")
    stored = workdir and broadcast_from_process_0(lambda: stored_dtype(Path(workdir)))
    if stored and stored != dtype:
        reason = f"the type that the run began with; {reason}, for which {dtype} is the default"
        dtype = stored
    return _with_dtype(cfg, dtype), f"model.dtype=auto: {reason}"


def resolve_dtype_for_chip(cfg: TrainConfig, chip: Chip) -> TrainConfig:
    """Returns cfg with model.dtype=auto replaced by the type for an entry of the chip table."""
    if cfg.model.dtype != AUTO:
        return cfg
    return _with_dtype(cfg, "bfloat16" if chip.compute_capability >= AMPERE else "float32")


def _with_dtype(cfg, dtype):
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype=dtype))


def choose_dtype(device: Device) -> tuple[str, str]:
    """Returns (bfloat16 or float32, the property of the device that decided it)."""
    if device.platform == "tpu":
        return "bfloat16", "a TPU"
    if device.platform != "cpu":
        capability = str(getattr(device, "compute_capability", "") or "")
        major, _, minor = capability.partition(".")
        known = major.isdecimal() and minor.isdecimal()
        fast = known and (int(major), int(minor)) >= AMPERE
        return "bfloat16" if fast else "float32", f"compute capability {capability or 'unknown'}"
    extensions = [name for flag, name in FAST_FLAGS.items() if flag in cpu_flags()]
    if extensions:
        return "bfloat16", f"this processor has {' and '.join(extensions)}"
    return "float32", "this processor has neither AVX512-BF16 nor AMX-BF16"


def stored_dtype(workdir: Path) -> str:
    """Returns the type of the run whose checkpoint is in a folder; "" if there is no checkpoint.

    An unreadable config.json also gives "": training rewrites it, and prints what differs from the
    checkpoint's config.
    """
    if not any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*")):
        return ""
    try:
        dtype = read_config_json(workdir)["config"]["model"]["dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return dtype if dtype in ("bfloat16", "float32") else ""
