"""What a run says of itself at its start: lines for people, config.json for programs."""

import platform
import socket
import sys
from pathlib import Path

import jax

from jaxtrain import config as config_lib
from jaxtrain import memory, tuning
from jaxtrain.kernels import chip_of
from jaxtrain.optim.groups import format_group_table, group_table
from jaxtrain.optim.owners import work_share
from jaxtrain.runtime import keeps_programs
from jaxtrain.work import chip_dict, conventions, find_device_chip, memory_figures


def header(run, corpus, checkpoints, restored):
    """What the run will do, as (name, value) pairs for Report.header.

    Args:
        restored: the checkpoint's step and meta; None at step 0.
    """
    cfg = run.cfg
    tokens = cfg.steps * cfg.data.batch * cfg.data.seq_len
    letters = "  ".join(f"{letter} {getattr(cfg.model, letter)}" for letter in "LDHGKFV")
    shape = "  ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    yield "model", f"{run.parameters:,} parameters  {letters}  {cfg.model.dtype}"
    yield "data", corpus.describe()
    yield "tokens", f"{tokens:,} = {cfg.steps} steps x {cfg.data.batch} x {cfg.data.seq_len}"
    yield "mesh", f"{shape}  of {run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
    for route in run.routes.values():
        yield "route", str(route)
    for choice in _tuning(run):
        yield "tuning", choice
    if run.mesh.devices.flat[0].platform == "gpu":
        yield "memory", f"JAX takes {memory.share():.0%} of each GPU: {memory.NAMES[0]}"
    if not keeps_programs(jax.process_count()):
        yield "cache", "none: of several processes JAX would keep programs on process 0 alone"
    if jax.process_count() > 1:
        where = {"shared": "a folder that all share", "host0": "process 0 gathers and feeds"}
        storage = cfg.checkpoint.storage
        yield "route", f"checkpoint.storage {storage}: {where[storage]}"
    if run.mesh.size > 1 and cfg.optim.name != "adamw" and cfg.optim.geometry == "spectral":
        share = work_share(run.model.axes, run.model.shapes, run.mesh)
        yield "owners", f"whole matrices on each device, {share:.3f} of an even share of the work"
    for line in format_group_table(group_table(cfg.optim, run.model.axes, run.model.shapes)).split(
        "\n"
    ):
        yield "optim", line
    warmup, total = cfg.optim.warmup_steps, cfg.optim.total_steps
    if warmup > total:  # as in the first steps of a longer run: no error
        yield "optim", f"peak rates are not reached: warmup_steps {warmup} of total_steps {total}"
    yield "run", f"{Path(cfg.workdir).resolve()}  config {config_lib.config_hash(cfg)}"
    for step, reason in checkpoints.rejected:
        yield "rejected", f"checkpoint {step}: {reason}"
    if restored is not None:
        yield "resume", f"step {restored.step}"
        for change in config_lib.changes(restored.meta["config"], cfg):
            yield "resumed with", change
    elif cfg.weights:
        yield "weights", f"{Path(cfg.weights).resolve()}"


def _tuning(run) -> list[str]:
    device = run.mesh.devices.flat[0]
    return tuning.describe(device.platform, chip_of(device))


def measured(run, work, measure):
    """What is measured and by what, as (name, value) pairs for Report.header."""
    device = run.mesh.devices.flat[0]
    for line in conventions(work, measure.chip, device):
        yield "measure", line
    if not memory_figures():
        yield "measure", f"no memory in use: {device.platform}'s allocator does not count it"
    if jax.process_count() > 1:
        yield "measure", measure.describe()
    if run.cfg.export.port:
        yield "export", f"http://{run.cfg.export.address}:{run.cfg.export.port}/metrics"
    for (kind, axis, inter_host), row in work.by_kind().items():
        where = "between hosts" if inter_host else "inside a host"
        yield "collect", f"{row['count']} x {kind} over {axis}, {row['bytes']:,} bytes, {where}"


def versions() -> dict:
    """Versions that a result depends on."""
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def stored_config(run, corpus, hosts=None, work=None) -> dict:
    """What config.json holds: all that names this run.

    Args:
        hosts: name of each process's host; None is this one alone.
        work: StepWork of the compiled step; None before there is one.
    """
    device = run.mesh.devices.flat[0]
    return {
        "config": config_lib.to_dict(run.cfg),
        "config_hash": config_lib.config_hash(run.cfg),
        "versions": versions(),
        "command": sys.argv,
        "device": device.device_kind,
        "devices": run.mesh.size,
        "processes": jax.process_count(),
        "hosts": hosts or [socket.gethostname()],
        "chip": chip_dict(find_device_chip(device)),
        "work": work and work.as_dict(),
        "routes": {name: str(route) for name, route in run.routes.items()},
        "tuning": _tuning(run),
        "data": {
            "fingerprint": corpus.fingerprint,
            "tokens": corpus.tokens,
            "tokenizer": corpus.tokenizer_name,
        },
    }
