"""model.dtype=auto: bfloat16 where the chip multiplies it fast, else float32.

It is resolved once, before anything is built, so that config.json, the config's hash and all that
reads them hold the type that was trained in.
"""

import dataclasses
from pathlib import Path

from jaxtrain.distributed.broadcast import broadcast_from_process_0, gather_texts
from jaxtrain.ops.routes import cpu_flags
from jaxtrain.run_directory.contents import read_config_json

AUTO = "auto"
FAST = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}  # flag in /proc/cpuinfo -> its name
AMPERE = (8, 0)  # the first compute capability with bfloat16 tensor cores


def resolve_dtype(cfg, device, workdir=None):
    """Returns (the TrainConfig without model.dtype=auto, why its type was chosen or "").

    Every process must call it. A checkpoint in `workdir` decides before the device does: a run goes
    on in the type that it began with.

    Args:
        device: a jax device of the run.
        workdir: folder of the run to resume; None resumes none.
    """
    if cfg.model.dtype != AUTO:
        return cfg, ""
    found = gather_texts(" ".join(choose(device)))
    # One process without fast products would hold up all the others.
    dtype, _, why = next((x for x in found if x.startswith("float32")), found[0]).partition(" ")
    stored = workdir and broadcast_from_process_0(lambda: stored_dtype(Path(workdir)))
    if stored and stored != dtype:
        dtype, why = stored, f"as the run began; {why}, which would take {dtype}"
    return with_dtype(cfg, dtype), f"model.dtype=auto: {why}"


def resolve_dtype_for_chip(cfg, chip):
    """Returns the TrainConfig without model.dtype=auto for an entry of the chip table."""
    if cfg.model.dtype != AUTO:
        return cfg
    return with_dtype(cfg, "bfloat16" if chip.compute_capability >= AMPERE else "float32")


def with_dtype(cfg, dtype: str):
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype=dtype))


def choose(device) -> tuple[str, str]:
    """Returns (bfloat16 or float32, what the device has, in words)."""
    if device.platform == "tpu":
        return "bfloat16", "a TPU"
    if device.platform != "cpu":
        stated = str(getattr(device, "compute_capability", "") or "")
        major, _, minor = stated.partition(".")
        known = major.isdecimal() and minor.isdecimal()
        fast = known and (int(major), int(minor)) >= AMPERE
        return "bfloat16" if fast else "float32", f"compute capability {stated or 'unknown'}"
    names = [name for flag, name in FAST.items() if flag in cpu_flags()]
    if names:
        return "bfloat16", f"this processor has {' and '.join(names)}"
    return "float32", "this processor has neither AVX512-BF16 nor AMX-BF16"


def stored_dtype(workdir: Path) -> str:
    """Returns the type of the run that has a checkpoint in a folder; "" where there is none.

    A config.json that cannot be read is none: it is written again, and what differs from the
    checkpoint's config is printed.
    """
    if not any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*")):
        return ""
    try:
        dtype = read_config_json(workdir)["config"]["model"]["dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return dtype if dtype in ("bfloat16", "float32") else ""
