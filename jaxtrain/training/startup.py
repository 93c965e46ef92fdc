"""Describes a run when it starts: lines for the terminal, and config.json for programs."""

import hashlib
import platform
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain.checkpoint.manager import Checkpoints, Restored
from jaxtrain.config import train_config as config_lib
from jaxtrain.data.sources import AnyCorpus, list_corpora
from jaxtrain.distributed import memory
from jaxtrain.distributed.runtime import uses_compile_cache
from jaxtrain.metrics.collector import Collector
from jaxtrain.metrics.mfu import (
    StepWork,
    chip_dict,
    describe_utilisation,
    find_device_chip,
    memory_metrics,
)
from jaxtrain.ops import tuning
from jaxtrain.ops.routes import describe_routes
from jaxtrain.optim.param_groups import format_group_table, group_table
from jaxtrain.optim.preconditioner_cost import ROTATIONS, owner_imbalance
from jaxtrain.optim.sharded_muon import load_imbalance
from jaxtrain.run_directory.lineage import KEY, read_branch, read_lineage
from jaxtrain.training.evaluation import Evaluator
from jaxtrain.training.programs import batch_phases, schedule_lines
from jaxtrain.training.run import Run
from pallas_kernels.devices import chip_name

ROOT = Path(__file__).parents[2]
PACKAGES = ("jaxtrain", "pallas_kernels")  # whose code computes a step
STORAGE_NOTES = {
    "shared": "a folder that all processes share",
    "host0": "process 0 gathers arrays to save and distributes restored ones",
}


def startup_lines(
    run: Run,
    corpus: AnyCorpus,
    checkpoints: Checkpoints,
    restored: Restored | None,
    dtype_reason: str = "",
    evaluator: Evaluator | None = None,
) -> Iterator[tuple[str, str]]:
    """Yields what the run will do, as (name, value) pairs for RunLogger.print_header.

    Args:
        restored: the checkpoint's step and meta; None at step 0.
        dtype_reason: why the dtype was chosen, if the config left it to the device.
        evaluator: its tasks are described.
    """
    cfg, model = run.cfg, run.cfg.model
    tokens, data = cfg.data.tokens_before(cfg.steps), cfg.data
    size = "data.batch_schedule" if data.batch_schedule else data.batch
    heads = f"{model.H} heads" if model.G == model.H else f"{model.H}:{model.G} heads"
    yield (
        "model",
        f"{run.parameters:,} parameters: {model.L} layers of width {model.D}, {heads}, "
        f"vocabulary {model.V:,}",
    )
    yield "data", corpus.describe()
    yield from (("task", line) for line in (evaluator.describe() if evaluator else ()))
    yield "tokens", f"{tokens:,} in {cfg.steps:,} steps of {size} x {data.seq_len}"
    yield from schedule_lines(cfg, restored.step if restored else 0)
    reason = f" ({dtype_reason})" if dtype_reason else ""
    yield "devices", f"{_describe_mesh(run.mesh)}, {model.dtype}{reason}"
    yield from describe_routes(run.routes)
    warmup, total = cfg.optim.warmup_steps, cfg.optim.total_steps
    if warmup > total:  # no error: the first part of a longer run may be trained on its own
        yield "warning", f"peak rates are not reached: warmup_steps {warmup} of total_steps {total}"
    yield "run", f"{Path(cfg.workdir).resolve()}"
    if branch := read_branch(cfg.workdir):
        yield "branch", f"from step {branch['step']} of {branch['parent']}"
    for step, reason in checkpoints.rejected:
        yield "rejected", f"checkpoint {step}: {reason}"
    if restored is not None:
        yield "resume", f"step {restored.step}"
        for change in config_lib.describe_changes(restored.meta["config"], cfg):
            yield "resumed with", change
    elif cfg.weights:
        yield "weights", f"{Path(cfg.weights).resolve()}"
    if cfg.measure.details:
        yield from _detail_lines(run)


def _describe_mesh(mesh: Mesh) -> str:
    """Returns `1 x cpu`, or `8 x NVIDIA A40: replica 2, fsdp 4, 2 processes`."""
    text = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    axes = [f"{name} {size}" for name, size in mesh.shape.items() if size > 1]
    if jax.process_count() > 1:
        axes.append(f"{jax.process_count()} processes")
    return f"{text}: {', '.join(axes)}" if axes else text


def _detail_lines(run: Run) -> Iterator[tuple[str, str]]:
    """Yields the (name, value) pairs of measure.details; config.json always has them."""
    cfg = run.cfg
    yield "config", config_lib.config_hash(cfg)
    for route in run.routes.values():
        yield "route", str(route)
    for choice in _describe_tuning(run):
        yield "tuning", choice
    for note in machine_notes(run):
        yield "note", note
    table = format_group_table(group_table(cfg.optim, run.model.axes, run.model.shapes))
    for line in table.split("\n"):
        yield "optim", line


def machine_notes(run: Run) -> list[str]:
    """Returns sentences on what this machine and mesh mean for the run."""
    cfg, mesh = run.cfg, run.mesh
    notes = []
    if mesh.devices.flat[0].platform == "gpu":
        notes.append(
            f"JAX takes {memory.fraction():.0%} of each GPU's memory: {memory.VARIABLES[0]}"
        )
    if not uses_compile_cache(jax.process_count()):
        notes.append("no compile cache: with several processes JAX writes it on process 0 only")
    if jax.process_count() > 1:
        storage = cfg.checkpoint.storage
        notes.append(f"checkpoint.storage {storage}: {STORAGE_NOTES[storage]}")
    if mesh.size > 1 and (cfg.optim.orthogonalizes or cfg.optim.name in ROTATIONS):
        imbalance = owner_imbalance if cfg.optim.name in ROTATIONS else load_imbalance
        share = imbalance(run.model.axes, run.model.shapes, mesh)
        notes.append(
            f"whole matrices on each device: the busiest does {share:.3f} times an even share"
        )
    return notes


def _describe_tuning(run: Run) -> list[str]:
    device = run.mesh.devices.flat[0]
    return tuning.describe_tuning(device.platform, chip_name(device))


def measurement_lines(run: Run, work: StepWork, collector: Collector) -> Iterator[tuple[str, str]]:
    """Yields what is measured, as (name, value) pairs for RunLogger.print_header."""
    if work.problem:
        yield "warning", f"bytes and collectives of the compiled step are unknown: {work.problem}"
    if run.cfg.export.port:
        yield "export", f"http://{run.cfg.export.address}:{run.cfg.export.port}/metrics"
    if not run.cfg.measure.details:
        return
    for line in describe_measurements(run, work, collector):
        yield "measure", line
    for (kind, axis, inter_host), row in work.by_kind().items():
        where = "between hosts" if inter_host else "within a host"
        yield "collect", f"{row['count']} x {kind} over {axis}, {row['bytes']:,} bytes, {where}"


def describe_measurements(run: Run, work: StepWork, collector: Collector) -> list[str]:
    """Returns sentences on what the run's figures mean."""
    device = run.mesh.devices.flat[0]
    lines = describe_utilisation(work, collector.chip, device)
    if not memory_metrics():
        lines.append(f"no figures of memory in use: {device.platform}'s allocator reports none")
    if jax.process_count() > 1:
        lines.append(collector.describe())
    return lines


def library_versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that a result depends on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def describe_program(root: Path = ROOT) -> str:
    """Returns a hash of the code and the libraries' versions, which processes must share.

    Args:
        root: the folder that contains the project's packages.
    """
    digest = hashlib.sha256()
    for path in sorted(path for name in PACKAGES for path in (root / name).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    versions = library_versions()
    versions["python"] = versions["python"].rpartition(".")[0]  # the patch may differ
    listed = " ".join(f"{name} {version}" for name, version in versions.items())
    return f"code {digest.hexdigest()[:12]}, {listed}"


def build_config_json(
    run: Run,
    corpus: AnyCorpus,
    hosts: list[str] | None = None,
    work: StepWork | None = None,
    collector: Collector | None = None,
    site: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the contents of config.json: everything that identifies this run.

    Args:
        hosts: name of each process's host; None is this process only.
        work: StepWork of the compiled step; None before it is compiled.
        collector: Collector of this process; None before it is created.
        site: this site's name, and the names of all; None if there is only one.
    """
    device = run.mesh.devices.flat[0]
    groups = group_table(run.cfg.optim, run.model.axes, run.model.shapes)
    lineage = read_lineage(run.cfg.workdir)  # written when a branch was created
    return {
        "config": config_lib.to_dict(run.cfg),
        "config_hash": config_lib.config_hash(run.cfg),
        "versions": library_versions(),
        "command": sys.argv,
        "device": device.device_kind,
        "devices": run.mesh.size,
        "mesh": dict(run.mesh.shape),
        "processes": jax.process_count(),
        "hosts": hosts or [socket.gethostname()],
        "site": site,
        "chip": chip_dict(find_device_chip(device)),
        "work": work and work.as_dict() | batch_phases(run.cfg.data),
        "routes": {name: str(route) for name, route in run.routes.items()},
        "tuning": _describe_tuning(run),
        "notes": machine_notes(run),
        "optimizer_groups": [row._asdict() for row in groups],
        "measures": describe_measurements(run, work, collector) if work and collector else None,
        "data": {
            "fingerprint": corpus.fingerprint,
            "tokens": corpus.tokens,
            "tokenizer": corpus.tokenizer_name,
            "sources": {
                name: {"fingerprint": part.fingerprint, "tokens": part.tokens}
                for name, part in list_corpora(corpus).items()
                if name
            },
        },
    } | ({KEY: lineage} if lineage else {})
