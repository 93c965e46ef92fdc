"""A plan as text for a person and as JSON for a script."""

from collections import Counter

from jaxtrain.planning.links import seconds_of

GIB = 2**30


def link_times(plan, inside, between) -> dict:
    """{(kind, axes, crosses hosts): [times, payload bytes, wire bytes, seconds]} of a step."""
    found = {}
    for c in plan.collectives:
        row = found.setdefault((c.kind, c.axes, c.crosses_hosts), [0, 0, 0.0, 0.0])
        for i, x in enumerate((c.times, c.times * c.payload_bytes, c.wire_bytes)):
            row[i] += x
        row[3] += seconds_of(c, inside, between)
    return found


def step_seconds(plan, inside, between) -> float:
    """The bound: the roofline's, and all communication after it."""
    return plan.roofline.seconds + sum(row[3] for row in link_times(plan, inside, between).values())


def as_dict(plan, inside, between) -> dict:
    """All figures; seconds, bytes, FLOPs."""
    seconds = step_seconds(plan, inside, between)
    m, peak = plan.memory, plan.chip.peak_flops["bfloat16"] * plan.devices
    return {
        "chip": plan.chip.name,
        "devices": plan.devices,
        "hosts": plan.hosts,
        "parameters": plan.parameters,
        "tokens_per_step": plan.tokens,
        "batch": plan.cfg.data.batch,
        "accumulation": plan.cfg.accumulation,
        "remat": plan.cfg.model.remat,
        "unroll": plan.cfg.model.unroll,
        "seq_len": plan.cfg.data.seq_len,
        "replica": plan.mesh["replica"],
        "fsdp": plan.mesh["fsdp"],
        "tensor": plan.mesh["tensor"],
        "fits": m.fits,
        "memory_bytes": {**m.terms(), "peak": m.peak, "usable": m.usable},
        "flops_per_token": {"causal": plan.causal.total, "full": plan.full.total},
        "flops_executed_per_device": plan.roofline.flops,
        "hbm_bytes_per_device": plan.roofline.hbm_bytes,
        "roofline_s": plan.roofline.seconds,
        "step_s": seconds,
        "tokens_per_s": plan.tokens / seconds,
        "mfu_causal": plan.causal.total * plan.tokens / seconds / peak,
        "collectives": [
            dict(zip(("kind", "axes", "crosses_hosts"), key, strict=True))
            | dict(zip(("times", "payload_bytes", "wire_bytes", "seconds"), row, strict=True))
            for key, row in link_times(plan, inside, between).items()
        ],
        "routes": {op: str(route) for op, route in plan.routes.items()},
        "notes": list(plan.notes),
        "compile_s": plan.compile_s,
    }


def _memory_lines(plan):
    m = plan.memory
    yield "memory of one device, GiB"
    for name, size in m.terms().items():
        yield f"  {name:26} {size / GIB:8.2f}"
    yield (
        f"  {'peak':26} {m.peak / GIB:8.2f} of {m.usable / GIB:.2f} usable "
        f"({m.usable / plan.chip.hbm_bytes:.0%} of {plan.chip.hbm_bytes / GIB:.2f}, what JAX takes "
        "in training: the rest is the driver's, NCCL's and cuBLAS')"
    )


def _work_lines(plan, inside, between):
    seconds, r = step_seconds(plan, inside, between), plan.roofline
    peak = plan.chip.peak_flops["bfloat16"] * plan.devices
    mfu = lambda flops: flops.total * plan.tokens / seconds / peak
    yield (
        f"FLOPs of a token: {plan.causal.total / 1e9:.2f} G with causal attention counted once, "
        f"{plan.full.total / 1e9:.2f} G with it counted full (6N + 12LHKT)"
    )
    yield (
        f"a step on one device: {r.flops / 1e12:,.0f} TFLOP executed (recomputation and optimizer "
        f"included), {r.hbm_bytes / 1e9:,.0f} GB moved"
    )
    yield (
        f"bound: {seconds:.3f} s a step, {plan.tokens / seconds:,.0f} tokens/s, MFU "
        f"{mfu(plan.causal):.1%} (causal) or {mfu(plan.full):.1%} (full); every instruction at the "
        "datasheet's peak, nothing overlapped: not a measurement"
    )
    yield f"  of it {r.compute_s:.3f} s computing, {r.seconds - r.compute_s:.3f} s moving"


def _collective_lines(plan, inside, between):
    rows = link_times(plan, inside, between)
    if not rows:
        return
    yield f"collectives of a step, on {inside.name} inside a host and {between.name} between hosts"
    yield f"  {'kind':18} {'axes':16} {'hosts':7} {'times':>6} {'payload GB':>11} {'s':>8}"
    for (kind, axes, crosses), (times, payload, _, seconds) in rows.items():
        where = "between" if crosses else "inside"
        yield (
            f"  {kind:18} {'+'.join(axes):16} {where:7} {times:6} {payload / 1e9:11.3f} "
            f"{seconds:8.3f}"
        )


def lines(plan, inside, between):
    cfg = plan.cfg
    hosts = f" on {plan.hosts} hosts" if plan.hosts > 1 else ""
    yield (
        f"{plan.devices} x {plan.chip.kind}{hosts}; {plan.parameters:,} parameters; batch "
        f"{cfg.data.batch} x {cfg.data.seq_len} in {cfg.accumulation} parts; remat "
        f"{cfg.model.remat}; compiled in {plan.compile_s:.0f} s"
    )
    yield from (f"  {route}" for route in plan.routes.values())
    yield from (f"  note: {note}" for note in plan.notes)
    yield from _memory_lines(plan)
    yield from _work_lines(plan, inside, between)
    yield from _collective_lines(plan, inside, between)


def verdict(plan, change) -> str:
    """Whether it fits, and if not, the term that is too big and what would do.

    Args:
        change: flags of the smallest change that fits, or nothing.
    """
    m = plan.memory
    if m.fits:
        return f"fits: {1 - m.peak / plan.chip.hbm_bytes:.0%} of the card stays free"
    largest = Counter(m.terms()).most_common(1)[0]
    would = f"{change} would fit" if change else "no micro-batch or remat of it fits: use more GPUs"
    return (
        f"does not fit: {m.peak / GIB:.1f} GiB of {m.usable / GIB:.1f}; the largest term is "
        f"{largest[0]}, {largest[1] / GIB:.1f} GiB; {would}"
    )
