"""What a run says of itself at its start: lines for people, config.json for programs."""

import platform
import socket
import sys
from pathlib import Path

import jax

from jaxtrain.config import train_config as config_lib
from jaxtrain.distributed import memory
from jaxtrain.distributed.runtime import uses_compile_cache
from jaxtrain.metrics.mfu import chip_dict, describe_utilisation, find_device_chip, memory_metrics
from jaxtrain.ops import tuning
from jaxtrain.ops.routes import chip_name, describe_routes
from jaxtrain.optim.param_groups import format_group_table, group_table
from jaxtrain.optim.sharded_muon import load_imbalance


def header(run, corpus, checkpoints, restored, dtype_reason=""):
    """Yields what the run will do, as (name, value) pairs for RunLogger.print_header.

    Args:
        restored: the checkpoint's step and meta; None at step 0.
        dtype_reason: why the run's type was chosen, where the config left it to the device.
    """
    cfg, model = run.cfg, run.cfg.model
    tokens = cfg.steps * cfg.data.batch * cfg.data.seq_len
    heads = f"{model.H} heads" if model.G == model.H else f"{model.H}:{model.G} heads"
    yield (
        "model",
        f"{run.parameters:,} parameters: {model.L} layers of width {model.D}, {heads}, "
        f"vocabulary {model.V:,}",
    )
    yield "data", corpus.describe()
    yield "tokens", f"{tokens:,} in {cfg.steps:,} steps of {cfg.data.batch} x {cfg.data.seq_len}"
    yield "devices", f"{_devices(run.mesh)}, {model.dtype}{dtype_reason and f' ({dtype_reason})'}"
    yield from describe_routes(run.routes)
    warmup, total = cfg.optim.warmup_steps, cfg.optim.total_steps
    if warmup > total:  # as in the first steps of a longer run: no error
        yield "warning", f"peak rates are not reached: warmup_steps {warmup} of total_steps {total}"
    yield "run", f"{Path(cfg.workdir).resolve()}"
    for step, reason in checkpoints.rejected:
        yield "rejected", f"checkpoint {step}: {reason}"
    if restored is not None:
        yield "resume", f"step {restored.step}"
        for change in config_lib.describe_changes(restored.meta["config"], cfg):
            yield "resumed with", change
    elif cfg.weights:
        yield "weights", f"{Path(cfg.weights).resolve()}"
    if cfg.measure.details:
        yield from details(run)


def _devices(mesh) -> str:
    """`1 x cpu`, `8 x NVIDIA A40: replica 2, fsdp 4, 2 processes`."""
    text = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    axes = [f"{name} {size}" for name, size in mesh.shape.items() if size > 1]
    if jax.process_count() > 1:
        axes.append(f"{jax.process_count()} processes")
    return f"{text}: {', '.join(axes)}" if axes else text


def details(run):
    """Yields (name, value) of what the start of a run prints only if measure.details asks for it.

    config.json holds all of it.
    """
    cfg = run.cfg
    yield "config", config_lib.config_hash(cfg)
    for route in run.routes.values():
        yield "route", str(route)
    for choice in _tuning(run):
        yield "tuning", choice
    for note in notes(run):
        yield "note", note
    table = format_group_table(group_table(cfg.optim, run.model.axes, run.model.shapes))
    for line in table.split("\n"):
        yield "optim", line


def notes(run) -> list[str]:
    """Returns what else this machine and mesh mean for a run, in words."""
    cfg, mesh = run.cfg, run.mesh
    found = []
    if mesh.devices.flat[0].platform == "gpu":
        found.append(f"JAX takes {memory.fraction():.0%} of each GPU: {memory.VARIABLES[0]}")
    if not uses_compile_cache(jax.process_count()):
        found.append("no compile cache: of several processes JAX would keep programs on process 0")
    if jax.process_count() > 1:
        where = {"shared": "a folder that all share", "host0": "process 0 gathers and feeds"}
        storage = cfg.checkpoint.storage
        found.append(f"checkpoint.storage {storage}: {where[storage]}")
    if mesh.size > 1 and cfg.optim.name != "adamw" and cfg.optim.geometry == "spectral":
        share = load_imbalance(run.model.axes, run.model.shapes, mesh)
        found.append(f"whole matrices on each device, {share:.3f} of an even share of the work")
    return found


def _tuning(run) -> list[str]:
    device = run.mesh.devices.flat[0]
    return tuning.describe_tuning(device.platform, chip_name(device))


def measured(run, work, measure):
    """Yields what is measured and by what, as (name, value) pairs for RunLogger.print_header."""
    if work.problem:
        yield "warning", f"bytes and collectives of the compiled step are unknown: {work.problem}"
    if run.cfg.export.port:
        yield "export", f"http://{run.cfg.export.address}:{run.cfg.export.port}/metrics"
    if not run.cfg.measure.details:
        return
    for line in measures(run, work, measure):
        yield "measure", line
    for (kind, axis, inter_host), row in work.by_kind().items():
        where = "between hosts" if inter_host else "inside a host"
        yield "collect", f"{row['count']} x {kind} over {axis}, {row['bytes']:,} bytes, {where}"


def measures(run, work, measure) -> list[str]:
    """Returns what the run's figures mean, in words."""
    device = run.mesh.devices.flat[0]
    found = describe_utilisation(work, measure.chip, device)
    if not memory_metrics():
        found.append(f"no memory in use: {device.platform}'s allocator does not count it")
    if jax.process_count() > 1:
        found.append(measure.describe())
    return found


def versions() -> dict:
    """Versions that a result depends on."""
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def stored_config(run, corpus, hosts=None, work=None, measure=None) -> dict:
    """What config.json holds: all that names this run.

    Args:
        hosts: name of each process's host; None is this one alone.
        work: StepWork of the compiled step; None before there is one.
        measure: Collector of this process; likewise.
    """
    device = run.mesh.devices.flat[0]
    groups = group_table(run.cfg.optim, run.model.axes, run.model.shapes)
    return {
        "config": config_lib.to_dict(run.cfg),
        "config_hash": config_lib.config_hash(run.cfg),
        "versions": versions(),
        "command": sys.argv,
        "device": device.device_kind,
        "devices": run.mesh.size,
        "mesh": dict(run.mesh.shape),
        "processes": jax.process_count(),
        "hosts": hosts or [socket.gethostname()],
        "chip": chip_dict(find_device_chip(device)),
        "work": work and work.as_dict(),
        "routes": {name: str(route) for name, route in run.routes.items()},
        "tuning": _tuning(run),
        "notes": notes(run),
        "optimizer_groups": [row._asdict() for row in groups],
        "measures": measure and measures(run, work, measure),
        "data": {
            "fingerprint": corpus.fingerprint,
            "tokens": corpus.tokens,
            "tokenizer": corpus.tokenizer_name,
        },
    }
