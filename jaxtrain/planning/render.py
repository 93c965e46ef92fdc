"""Formats a plan as text for people and as a dict for JSON."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtrain.planning.calibration import Calibration
from jaxtrain.planning.compiled import Plan
from jaxtrain.planning.hardware import collective_seconds
from jaxtrain.reporting.table import format_table

GIB = 2**30


def sum_collectives(plan: Plan) -> list[dict[str, Any]]:
    """Returns a row for each kind of collective and each set of mesh axes, summed over a step."""
    rows = {}
    for c in plan.collectives:
        row = {"kind": c.kind, "axes": c.axes, "crosses_hosts": c.crosses_hosts}
        sums = {"times": 0, "payload_bytes": 0, "wire_bytes": 0.0, "seconds": 0.0}
        row = rows.setdefault(tuple(row.values()), row | sums)
        row["times"] += c.times
        row["payload_bytes"] += c.times * c.payload_bytes
        row["wire_bytes"] += c.wire_bytes
        row["seconds"] += collective_seconds(c, plan.hardware)
    return list(rows.values())


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Returns all figures of a plan, in seconds, bytes and FLOPs."""
    hardware, m, cfg, mesh = plan.hardware, plan.memory, plan.run.cfg, plan.run.mesh.shape
    return {
        "chip": hardware.chip.name,
        "devices": hardware.devices,
        "hosts": hardware.hosts,
        "parameters": plan.run.parameters,
        "tokens_per_step": plan.tokens,
        "batch": cfg.data.batch,
        "accumulation": cfg.accumulation,
        "remat": plan.run.remat,
        "unroll": cfg.model.unroll,
        "seq_len": cfg.data.seq_len,
        "replica": mesh["replica"],
        "fsdp": mesh["fsdp"],
        "tensor": mesh["tensor"],
        "fits": m.fits,
        "memory_bytes": m.all_sizes(),
        "flops_per_token": {"causal": plan.causal_flops.total, "full": plan.flops.total},
        "flops_executed_per_device": plan.roofline.flops,
        "hbm_bytes_per_device": plan.roofline.hbm_bytes,
        "roofline_s": plan.roofline.seconds,
        "class_s": plan.roofline.class_s,
        "step_s": plan.step_s,
        "tokens_per_s": plan.tokens / plan.step_s,
        "mfu_causal": plan.mfu(plan.causal_flops),
        "collectives": sum_collectives(plan),
        "routes": {op: str(route) for op, route in plan.run.routes.items()},
        "notes": list(plan.notes),
        "compile_s": plan.compile_s,
    }


def memory_table(sizes: Mapping[str, float]) -> str:
    """Returns a table of {use: bytes} in GiB."""
    rows = [(use, f"{size / GIB:.2f}") for use, size in sizes.items()]
    return format_table(rows, ("use", "GiB"), indent=2)


def _memory_lines(plan: Plan) -> Iterator[str]:
    m, hbm_bytes = plan.memory, plan.hardware.chip.hbm_bytes
    yield "Memory of one device:"
    yield memory_table(m.all_sizes())
    yield (
        f"  usable is {m.usable / hbm_bytes:.0%} of the {hbm_bytes / GIB:.2f} GiB: training leaves "
        "the rest to the driver, NCCL and cuBLAS"
    )


def _work_lines(plan: Plan) -> Iterator[str]:
    r = plan.roofline
    yield (
        f"FLOPs per token: {plan.causal_flops.total / 1e9:.2f} G with causal attention, "
        f"{plan.flops.total / 1e9:.2f} G with attention over all keys (6N + 12LHKT)"
    )
    yield (
        f"A step on one device executes {r.flops / 1e12:,.0f} TFLOP (recomputation and optimizer "
        f"included) and moves {r.hbm_bytes / 1e9:,.0f} GB"
    )
    tokens_per_s = plan.tokens / plan.step_s
    yield (
        f"A step takes at least {plan.step_s:.3f} s, that is at most {tokens_per_s:,.0f} tokens/s, "
        f"MFU {plan.mfu(plan.causal_flops):.1%} (causal) or {plan.mfu(plan.flops):.1%} (all keys)"
    )
    yield (
        f"  {r.compute_s:.3f} s computing, {r.seconds - r.compute_s:.3f} s waiting for memory, "
        f"{plan.step_s - r.seconds:.3f} s communicating; every instruction at the datasheet's "
        "peak, nothing overlapped: not a measurement"
    )


def _collective_lines(plan: Plan) -> Iterator[str]:
    rows = sum_collectives(plan)
    if not rows:
        return
    link, host_link = plan.hardware.link.name, plan.hardware.host_link.name
    yield f"Collectives of a step, over {link} inside a host and {host_link} between hosts:"
    columns = {
        "kind": lambda r: r["kind"],
        "mesh axes": lambda r: "+".join(r["axes"]),
        "hosts": lambda r: "between" if r["crosses_hosts"] else "inside",
        "times": lambda r: r["times"],
        "payload GB": lambda r: f"{r['payload_bytes'] / 1e9:.3f}",
        "seconds": lambda r: f"{r['seconds']:.3f}",
    }
    yield format_table(rows, columns, indent=2)


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yields a plan as paragraphs of text."""
    cfg, hardware = plan.run.cfg, plan.hardware
    hosts = f" on {hardware.hosts} hosts" if hardware.hosts > 1 else ""
    yield (
        f"{hardware.devices} x {hardware.chip.kind}{hosts}; {plan.run.parameters:,} parameters; "
        f"batch {cfg.data.batch} x {cfg.data.seq_len} in {cfg.accumulation} micro-batches; remat "
        f"{plan.run.remat}; compiled in {plan.compile_s:.0f} s"
    )
    yield from (f"  {route}" for route in plan.run.routes.values())
    yield from (f"  note: {note}" for note in plan.notes)
    yield from _memory_lines(plan)
    yield from _work_lines(plan)
    yield from _collective_lines(plan)


def sizes_dict(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Returns the figures of steps of each size of data.batch_schedule."""
    keys = ("batch", "accumulation", "step_s", "tokens_per_s", "fits")
    rows = [plan_dict(plan) for plan in plans]
    return [{k: row[k] for k in keys} | {"peak": row["memory_bytes"]["peak"]} for row in rows]


def sizes_lines(plans: Sequence[Plan]) -> Iterator[str]:
    """Yields a table of the steps of each size; the first plan is the one printed in full."""
    yield f"The above is a step of {plans[0].run.cfg.data.batch} sequences. All sizes:"
    columns = {
        "sequences": lambda r: r["batch"],
        "micro-batches": lambda r: r["accumulation"],
        "step s": lambda r: f"{r['step_s']:.3f}",
        "tokens/s": lambda r: f"{r['tokens_per_s']:,.0f}",
        "peak GiB": lambda r: f"{r['peak'] / GIB:.2f}",
    }
    yield format_table(sizes_dict(plans), columns, indent=2)


def calibrated_dict(plan: Plan, calibration: Calibration) -> dict[str, Any]:
    """Returns the time of a plan's step at measured efficiencies; communication at its bound."""
    communication_s = plan.step_s - plan.roofline.seconds
    step_s = calibration.seconds(plan.roofline.class_s) + communication_s
    return {
        "step_s": step_s,
        "tokens_per_s": plan.tokens / step_s,
        "mfu_causal": plan.mfu(plan.causal_flops) * plan.step_s / step_s,
        "calibration": calibration._asdict(),
    }


def calibrated_line(plan: Plan, calibration: Calibration) -> str:
    """Returns the predicted time of a step, with the efficiencies that it comes from."""
    figures = calibrated_dict(plan, calibration)
    return (
        f"At measured efficiencies a step takes about {figures['step_s']:.3f} s, that is "
        f"{figures['tokens_per_s']:,.0f} tokens/s, MFU {figures['mfu_causal']:.1%} (causal): "
        f"{calibration.describe()}"
    )


def fit_verdict(plan: Plan, fitting_flags: str) -> str:
    """States whether a plan fits and, if not, the largest use of memory and what to change.

    Args:
        fitting_flags: flags of the smallest change that fits, or "" if there is none.
    """
    m = plan.memory
    if m.fits:
        return f"Fits: {1 - m.peak / plan.hardware.chip.hbm_bytes:.0%} of the GPU's memory is free."
    use, size = max(m.by_use().items(), key=lambda item: item[1])
    remedy = "No micro-batch size or remat setting fits: use more GPUs."
    if fitting_flags:
        remedy = f"These flags fit: {fitting_flags}"
    return (
        f"Does not fit: needs {m.peak / GIB:.1f} GiB of {m.usable / GIB:.1f}. The largest use is "
        f"{use}, {size / GIB:.1f} GiB. {remedy}"
    )
