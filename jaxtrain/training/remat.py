"""Resolves model.remat=auto: the least recomputation whose step fits the device's memory.

It is resolved where a run is built. The run's config keeps "auto", so that the same config and hash
serve every card: another card may choose differently, with the same results to rounding.
"""

import dataclasses

import jax

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.distributed import memory
from jaxtrain.distributed.broadcast import gather_texts
from jaxtrain.distributed.mesh import mesh_sizes
from jaxtrain.ops.cudnn import explain_missing_cudnn
from jaxtrain.ops.routes import choose_routes
from jaxtrain.training.memory_formula import estimate_memory, is_unrolled
from pallas_kernels.chip import chip_of_kind
from pallas_kernels.devices import chip_name, gpu_architecture

AUTO = "auto"
# From the least recomputation to the most. "dots" stores more than "attention" and is no faster:
# its bound is 576,000 tokens/s where attention's is 585,000 (gpt_124m, H100; docs/speed_log.md).
CHOICES = ("none", "attention", "full")
# Above this share of the usable memory XLA recomputes, unasked, to save memory: gpt_1558m
# on an A40 is 17 % slower in 16 micro-batches, which take a share of 0.89, than in 32. The rest
# is also more than the memory formula's error.
TIGHT = 0.8
GIB = 2**30


def resolve_remat(cfg: TrainConfig, mesh: jax.sharding.Mesh) -> tuple[TrainConfig, str]:
    """Returns (cfg with model.remat=auto replaced, the reason for the value) for a run on a mesh.

    Every process must call it.
    """
    if cfg.model.remat != AUTO:
        return cfg, "set by model.remat"
    if mesh.devices.flat[0].platform == "cpu":
        return with_remat(cfg, "none"), "cpu: auto recomputes nothing"
    # All processes must choose alike: the least memory decides.
    usable_bytes = min(map(int, gather_texts(str(usable_bytes_on(mesh)))))
    arch, chip = gpu_architecture(mesh.devices.flat[0]), chip_name(mesh.devices.flat[0])
    return choose_remat(cfg, mesh.size, usable_bytes, arch, chip)


def usable_bytes_on(mesh: jax.sharding.Mesh) -> int:
    """Returns the least memory that training may use on a device of a mesh; 0 if it is unknown.

    For chips of the table it is the figure that plans use. Others are asked for the limit of JAX's
    allocator, which only this process's devices answer.
    """
    chips = [chip_of_kind(kind) for kind in {x.device_kind for x in mesh.devices.flat}]
    known = [memory.usable_bytes(chip.hbm_bytes) for chip in chips if chip]
    if len(known) == len(chips):
        return min(known)
    limits = [(x.memory_stats() or {}).get("bytes_limit", 0) for x in mesh.local_devices]
    return min(limits + known, default=0)


def explain_costly_storing(cfg: TrainConfig, devices: int, arch: str, chip: str) -> str:
    """Returns why a step on a GPU should not store everything even if that fits; "" if it may.

    Args:
        devices, arch, chip: as in choose_remat.
    """
    if not is_unrolled(with_remat(cfg, "none").model):
        # The copies take longer than attention's recomputation: see docs/speed_log.md.
        return f"a scan of {cfg.model.L} layers would copy what it stores"
    replica, fsdp, tensor = mesh_sizes(cfg.mesh, devices)
    rows = cfg.data.batch // cfg.accumulation // replica // fsdp
    attention = choose_routes(
        cfg.model,
        cfg.data.document_mask,
        "gpu",
        False,
        cfg.kernels,
        arch=arch,
        chip=chip,
        tensor=tensor,
        seq_len=cfg.data.seq_len,
        sequences=max(rows, 1),  # a plan may have fewer: its search finds another number
        no_cudnn=explain_missing_cudnn(),
    )["attention"]
    if not (attention.is_fused or attention.implementation == "cudnn"):
        return "attention would store its scores [H,T,T], which the memory formula leaves out"
    return ""


def choose_remat(
    cfg: TrainConfig, devices: int, usable_bytes: int, arch: str = "", chip: str = ""
) -> tuple[TrainConfig, str]:
    """Returns (cfg with the first of CHOICES whose estimate is at most TIGHT, the reason).

    If there is none, it is "full".

    Args:
        devices: those of the mesh that cfg.mesh describes.
        usable_bytes: what training may use on one device; 0 if it is unknown.
        arch, chip: as in choose_routes.
    """
    if not usable_bytes:
        return with_remat(cfg, "attention"), "auto: the device's memory is unknown"
    chosen, peak = cfg, 0.0
    costly = explain_costly_storing(cfg, devices, arch, chip)
    note = f"; with none {costly}" if costly else ""
    for remat in CHOICES[1:] if costly else CHOICES:
        chosen = with_remat(cfg, remat)
        peak = estimate_memory(chosen, devices).peak
        if peak <= TIGHT * usable_bytes:
            break
        note = note or f"; {peak / GIB:.0f} with {remat}"
    reason = f"auto: about {peak / GIB:.0f} of {usable_bytes / GIB:.0f} GiB{note}"
    return chosen, reason


def with_remat(cfg: TrainConfig, remat: str) -> TrainConfig:
    """Returns cfg with another model.remat."""
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat=remat))
