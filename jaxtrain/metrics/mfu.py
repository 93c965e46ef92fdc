"""What one step has to do, by mathematics and by the compiled program, and what a chip can do."""

from typing import NamedTuple

import jax

from jaxtrain.metrics.flops import training_flops
from jaxtrain.metrics.hlo_collectives import Collective, find_collectives
from jaxtrain.ops.routes import chip_name
from pallas_kernels.chip import CHIPS, Chip
from pallas_kernels.hlo import Program

# Type of the operands on the tensor cores; XLA makes float32 products as TF32 unless told not to.
PEAK_OF = {"bfloat16": "bfloat16", "float32": "tf32"}


class Roofline(NamedTuple):
    """Of one step on one device, every instruction at the datasheet's peak, none overlapping."""

    flops: float  # executed: recomputation and the optimizer too
    hbm_bytes: float
    seconds: float  # sum over instructions of the slower of computing and moving
    compute_s: float  # of those that compute longer than they move


def roofline(program, chip) -> Roofline:
    flops = moved = seconds = compute_s = 0.0
    for work in program.work():
        one = chip.seconds(work.hbm_bytes, work.flops, work.dtype)
        flops += work.times * work.flops
        moved += work.times * work.hbm_bytes
        seconds += work.times * one
        compute_s += work.times * one * (one > work.hbm_bytes / chip.hbm_bytes_per_s)
    return Roofline(flops, moved, seconds, compute_s)


class StepWork(NamedTuple):
    """FLOPs are of all devices, bytes of one."""

    tokens: int
    parameters: int
    flops_6n: float  # weights that multiply a token, no attention
    flops_causal: float  # and attention, of the keys that a query sees
    flops_full: float  # and attention, of all keys: PaLM's
    hbm_bytes: float | None  # None where the program could not be read
    roofline_s: float | None  # without a chip there is none
    collectives: tuple[Collective, ...]
    devices: int
    dtype: str  # of the products
    problem: str = ""  # why the program could not be read
    counted: tuple[str, ...] = ()  # what is counted though it is masked or no token

    @property
    def payload_bytes(self) -> int:
        return sum(c.times * c.payload_bytes for c in self.collectives)

    @property
    def sent_bytes(self) -> float:
        """What a host sends to others, by the ring's count: the least that the wire must carry."""
        return sum(c.host_bytes for c in self.collectives)

    def by_kind(self) -> dict[tuple, dict]:
        """{(kind, axis, inter_host): {"bytes", "count"}}: payload and number a step."""
        rows = {}
        for c in self.collectives:
            key = c.kind, "+".join(c.axes), c.crosses_hosts
            row = rows.setdefault(key, {"bytes": 0, "count": 0})
            row["bytes"] += c.times * c.payload_bytes
            row["count"] += c.times
        return rows

    def as_dict(self) -> dict:
        """For config.json."""
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
        """{"comm/all_reduce_bytes": payload of a device and step, ...}"""
        figures = {}
        for (kind, _, _), row in self.by_kind().items():
            name = f"comm/{kind.replace('-', '_')}_bytes"
            figures[name] = figures.get(name, 0) + row["bytes"]
        return figures

    def utilisation(self, chip: Chip | None, step_time_s: float) -> dict[str, float]:
        """MFU in both conventions and MBU of a step that takes step_time_s; {} without a peak."""
        if chip is None or self.dtype not in PEAK_OF:
            return {}
        peak = chip.peak_flops[PEAK_OF[self.dtype]] * self.devices
        figures = {
            "perf/mfu": self.flops_causal / step_time_s / peak,
            "perf/mfu_6n": self.flops_6n / step_time_s / peak,
        }
        if self.hbm_bytes is not None:
            figures["perf/mbu"] = self.hbm_bytes / step_time_s / chip.hbm_bytes_per_s
        return figures


def build_work(run, compiled, hosts=None) -> StepWork:
    """Of a Run's compiled step.

    Args:
        hosts: name of each process's host.
    """
    cfg, tokens = run.cfg, run.cfg.data.batch * run.cfg.data.seq_len
    causal = training_flops(cfg.model, cfg.data.seq_len, causal=True)
    full = training_flops(cfg.model, cfg.data.seq_len)
    return StepWork(
        tokens=tokens,
        parameters=run.parameters,
        flops_6n=tokens * causal.matrices,
        flops_causal=tokens * causal.total,
        flops_full=tokens * full.total,
        devices=run.mesh.size,
        dtype=cfg.model.dtype,
        counted=_counted(cfg.data),
        **_read_program(compiled, run.mesh, hosts),
    )


def _counted(data) -> tuple[str, ...]:
    """What a DataConfig's batches hold that figures do not tell apart, in words."""
    lines = ()
    if data.document_mask:
        lines += ("documents: mfu counts keys as if a row were one, more than a query sees",)
    if data.pack:
        lines += ("packing: tokens/s, mfu and mfu_6n count the padding of a row as tokens",)
    return lines


def _read_program(compiled, mesh, hosts) -> dict:
    """What StepWork holds of the program; a form that is not known says so and stops no run."""
    chip = find_device_chip(mesh.devices.flat[0])
    try:
        program = Program(compiled.as_text())
        return {
            "hbm_bytes": sum(work.times * work.hbm_bytes for work in program.work()),
            "roofline_s": roofline(program, chip).seconds if chip else None,
            "collectives": tuple(find_collectives(program, mesh, hosts)),
        }
    except (ValueError, KeyError, IndexError, TypeError) as error:
        nothing = {"hbm_bytes": None, "roofline_s": None, "collectives": ()}
        return nothing | {"problem": f"{type(error).__name__}: {error}"[:300]}


def find_device_chip(device) -> Chip | None:
    """The chip table's entry of a jax device; None of any other."""
    return CHIPS.get(chip_name(device))


def chip_dict(chip: Chip | None) -> dict | None:
    """For config.json: what utilisation is measured by."""
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


def describe_utilisation(work: StepWork, chip: Chip | None, device) -> list[str]:
    """What MFU and MBU mean here, or why there is none: lines for the start of a run."""
    lines = []
    if chip is None:
        lines.append(
            f"no MFU, no MBU: {device.device_kind!r} has no peak in pallas_kernels/chip.py, and "
            "none is guessed"
        )
    elif work.dtype not in PEAK_OF:
        lines.append(f"no MFU, no MBU: the table has no peak of {chip.name} for {work.dtype}")
    else:
        name = PEAK_OF[work.dtype]
        lines += [
            f"mfu of {work.devices} x {chip.peak_flops[name] / 1e12:g} TFLOP/s ({name}, dense): "
            "6N and attention's products, once, of the keys that a query sees; mfu_6n: 6N alone",
            f"mbu of {chip.hbm_bytes_per_s / 1e9:g} GB/s: what the compiled step's instructions "
            f"read and write; peaks: {chip.source}",
        ]
    lines += work.counted
    if work.problem:
        lines.append(f"unknown bytes and collectives of the compiled step: {work.problem}")
    return lines


def memory_metrics() -> dict[str, int]:
    """Bytes that the allocators of this process's devices hold and have held, the fullest's; {}
    where the backend does not say."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if not all(stats):
        return {}
    return {
        "perf/hbm_bytes": max(s["bytes_in_use"] for s in stats),
        "perf/hbm_peak_bytes": max(s["peak_bytes_in_use"] for s in stats),
    }
