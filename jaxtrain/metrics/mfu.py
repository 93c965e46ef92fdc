"""Computes MFU and MBU: a step's FLOPs and HBM bytes as shares of what the chip could do.

Conventions, which the start of a run prints:

- `perf/mfu` counts the 6N FLOPs of the weights and attention's products with the keys that a query
  may see. Recomputation, the optimizer and masked keys are not counted, whatever the program does.
- `perf/mfu_6n` counts the 6N FLOPs only, as many papers do.
- The peak is the data sheet's dense FLOP/s (no structured sparsity) for the type of the products,
  times the devices. An unknown chip gets no MFU: a guessed peak would be off by factors.
- `perf/mbu` counts the bytes that the compiled step's instructions read from and write to HBM.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled
from jax.typing import DTypeLike

from jaxtrain.config.data_section import DataConfig
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.metrics.flops import training_flops
from jaxtrain.metrics.hlo_collectives import Collective, find_collectives
from jaxtrain.metrics.work_kinds import ATTENTION, CLASSES, MEMORY, PRODUCTS, kind_of
from jaxtrain.ops.devices import Device
from pallas_kernels.chip import CHIPS, Chip, explain_unknown, find_chip
from pallas_kernels.devices import chip_name
from pallas_kernels.hlo import Program

# Model dtype -> type of the products on tensor cores. By default XLA computes float32 in TF32.
PEAK_OF = {"bfloat16": "bfloat16", "float16": "float16", "float32": "tf32"}


def mfu(
    flops: float, step_time_s: float, chip: Chip | str, dtype: DTypeLike, devices: int = 1
) -> float:
    """Returns the share of the peak FLOP/s of all devices that a step reached.

    Args:
        flops: of one step on all devices; for a transformer without recomputation 6 x parameters x
            tokens, plus attention (`jaxtrain.metrics.flops`).
        step_time_s: seconds of the step, forward, backward and optimizer.
        chip: an entry of pallas_kernels.chip.CHIPS, or its name, such as "a40" or "h100".
        dtype: of the products' operands: bfloat16, float16 or float32.

    Raises:
        ValueError: the chip or its peak for this type is unknown, or a number is not positive.
    """
    if isinstance(chip, str):
        chip = find_chip(chip)
    try:
        name = jnp.dtype(dtype).name
    except TypeError:  # such as "bf16"
        name = repr(dtype)
    if name not in PEAK_OF:
        raise ValueError(f"dtype must be one of {', '.join(PEAK_OF)}; got {name}.")
    given = {"flops": flops, "step_time_s": step_time_s, "devices": devices}
    for argument, value in given.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{argument} must be positive; got {value}.")
    return flops / step_time_s / (chip.peak_flops[PEAK_OF[name]] * devices)


class Roofline(NamedTuple):
    """Lower bound of a step's time on one device: every instruction at the data sheet's peak."""

    flops: float  # executed, with recomputation and the optimizer
    hbm_bytes: float
    seconds: float  # each instruction takes max(compute, move) time; none overlap
    compute_s: float  # the part of `seconds` in compute-bound instructions
    # `seconds` by class: attention's kernels, other compute-bound instructions, all others
    class_s: dict[str, float]


def roofline(program: Program, chip: Chip) -> Roofline:
    """Returns the roofline of a compiled program on a chip."""
    flops = hbm_bytes = compute_s = 0.0
    class_s: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    for work in program.work():
        instruction_s = chip.seconds(work.hbm_bytes, work.flops, work.dtype)
        flops += work.times * work.flops
        hbm_bytes += work.times * work.hbm_bytes
        computes = instruction_s > work.hbm_bytes / chip.hbm_bytes_per_s
        if computes:
            compute_s += work.times * instruction_s
        kind = ATTENTION if kind_of(work) == ATTENTION else PRODUCTS if computes else MEMORY
        class_s[kind] += work.times * instruction_s
    return Roofline(flops, hbm_bytes, sum(class_s.values()), compute_s, class_s)


class StepWork(NamedTuple):
    """What one step computes (FLOPs of all devices) and moves (bytes of one device)."""

    tokens: int
    parameters: int
    flops_6n: float  # products with weights only
    flops_causal: float  # plus attention over the keys that a query may see
    flops_full: float  # plus attention over all keys, as in PaLM
    hbm_bytes: float | None  # None if the program could not be read
    roofline_s: float | None  # None without a known chip
    collectives: tuple[Collective, ...]
    devices: int
    dtype: str  # of the products
    problem: str = ""  # why the program could not be read
    caveats: tuple[str, ...] = ()  # what the metrics count although it is masked or padding

    @property
    def sent_bytes(self) -> float:
        """Bytes that one host must send to others with ring algorithms, without overhead."""
        return sum(c.host_bytes for c in self.collectives)

    def by_kind(self) -> dict[tuple, dict]:
        """Returns {(kind, axis, inter_host): {"bytes", "count"}}: payload and number per step."""
        rows = {}
        for c in self.collectives:
            key = c.kind, "+".join(c.axes), c.crosses_hosts
            row = rows.setdefault(key, {"bytes": 0, "count": 0})
            row["bytes"] += c.times * c.payload_bytes
            row["count"] += c.times
        return rows

    def as_dict(self) -> dict:
        """Returns the entry `work` of config.json."""
        names = ("kind", "axis", "inter_host")
        return {
            "tokens_per_step": self.tokens,
            "params": self.parameters,
            "flops_6n_per_step": self.flops_6n,
            "flops_causal_per_step": self.flops_causal,
            "flops_full_per_step": self.flops_full,
            "hbm_bytes_per_step": self.hbm_bytes,
            "roofline_s": self.roofline_s,
            "collectives": [
                dict(zip(names, key, strict=True)) | row for key, row in self.by_kind().items()
            ],
            "host_sent_bytes": self.sent_bytes,
        }

    def collective_metrics(self) -> dict[str, int]:
        """Returns {"comm/all_reduce_bytes": payload per device and step, ...}."""
        metrics = {}
        for (kind, _, _), row in self.by_kind().items():
            name = f"comm/{kind.replace('-', '_')}_bytes"
            metrics[name] = metrics.get(name, 0) + row["bytes"]
        return metrics

    def utilisation(self, chip: Chip | None, step_time_s: float) -> dict[str, float]:
        """Returns MFU in both conventions and MBU at a step time; {} if the peak is unknown."""
        if chip is None or self.dtype not in PEAK_OF:
            return {}
        measured = step_time_s, chip, self.dtype, self.devices
        metrics = {
            "perf/mfu": mfu(self.flops_causal, *measured),
            "perf/mfu_6n": mfu(self.flops_6n, *measured),
        }
        if self.hbm_bytes is not None:
            metrics["perf/mbu"] = self.hbm_bytes / step_time_s / chip.hbm_bytes_per_s
        return metrics


def build_work(
    cfg: TrainConfig,
    parameters: int,
    mesh: Mesh,
    compiled: Compiled,
    hosts: Sequence[str] | None = None,
) -> StepWork:
    """Computes the FLOPs, bytes and collectives of a compiled step.

    Args:
        hosts: name of each process's host; None: every process has its own.
    """
    tokens = cfg.data.batch * cfg.data.seq_len
    causal = training_flops(cfg.model, cfg.data.seq_len, causal=True)
    full = training_flops(cfg.model, cfg.data.seq_len)
    return StepWork(
        tokens=tokens,
        parameters=parameters,
        flops_6n=tokens * causal.matrices,
        flops_causal=tokens * causal.total,
        flops_full=tokens * full.total,
        devices=mesh.size,
        dtype=cfg.model.dtype,
        caveats=_caveats(cfg.data),
        **_read_program(compiled, mesh, hosts),
    )


def _caveats(data: DataConfig) -> tuple[str, ...]:
    """Returns sentences on what the metrics count although it is masked or padding."""
    lines = ()
    if data.document_mask:
        lines += (
            "documents: mfu counts keys as if each row were one document, which is more than a "
            "query sees",
        )
    if data.pack:
        lines += ("packing: tokens/s, mfu and mfu_6n count padding as tokens",)
    return lines


def _read_program(compiled: Compiled, mesh: Mesh, hosts: Sequence[str] | None) -> dict:
    """Returns the fields of StepWork that come from the program's text.

    XLA's text form may change; a text that cannot be parsed is reported and does not stop the run.
    """
    chip = find_device_chip(mesh.devices.flat[0])
    try:
        program = Program(compiled.as_text() or "")
        return {
            "hbm_bytes": sum(work.times * work.hbm_bytes for work in program.work()),
            "roofline_s": roofline(program, chip).seconds if chip else None,
            "collectives": tuple(find_collectives(program, mesh, hosts)),
        }
    except (ValueError, KeyError, IndexError, TypeError) as error:
        unknown = {"hbm_bytes": None, "roofline_s": None, "collectives": ()}
        return unknown | {"problem": f"{type(error).__name__}: {error}"[:300]}


def find_device_chip(device: Device) -> Chip | None:
    """Returns the chip table's entry for a device; None if the table has none."""
    return CHIPS.get(chip_name(device))


def chip_dict(chip: Chip | None) -> dict | None:
    """Returns the entry `chip` of config.json: the peaks that define utilisation."""
    if chip is None:
        return None
    return {
        "name": chip.name,
        "kind": chip.kind,
        "peak_flops_per_s": chip.peak_flops,
        "hbm_bytes_per_s": chip.hbm_bytes_per_s,
        "hbm_bytes": chip.hbm_bytes,
        "source": chip.source,
    }


def describe_utilisation(work: StepWork, chip: Chip | None, device: Device) -> list[str]:
    """Returns lines on what MFU and MBU mean in this run, or why they are not reported."""
    lines = []
    if chip is None:
        lines.append(f"no MFU, no MBU: {explain_unknown(device.device_kind)}")
    elif work.dtype not in PEAK_OF:
        missing = f"{work.dtype} peak of {chip.name}"
        lines.append(f"no MFU, no MBU: pallas_kernels/chip.py has no {missing}")
    else:
        name = PEAK_OF[work.dtype]
        lines += [
            f"mfu: share of {work.devices} x {chip.peak_flops[name] / 1e12:g} TFLOP/s ({name}, "
            "dense), counting 6N and causal attention without recomputation; mfu_6n: 6N only",
            f"mbu: share of {chip.hbm_bytes_per_s / 1e9:g} GB/s, counting what the compiled step "
            f"reads and writes; peaks: {chip.source}",
        ]
    lines += work.caveats
    if work.problem:
        lines.append(f"bytes and collectives of the compiled step are unknown: {work.problem}")
    return lines


def memory_metrics() -> dict[str, int]:
    """Returns current and peak allocated bytes, each the maximum over this process's devices.

    Backends without a counting allocator, such as the CPU's, give {}.
    """
    stats = [device.memory_stats() for device in jax.local_devices()]
    if not all(stats):
        return {}
    return {
        "perf/hbm_bytes": max(s["bytes_in_use"] for s in stats),
        "perf/hbm_peak_bytes": max(s["peak_bytes_in_use"] for s in stats),
    }
