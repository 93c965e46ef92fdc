"""The parts of a run, assembled from its config: what training, evaluation and sampling share."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from jaxtrain import WANTS_GPU
from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.config import train_config as config_lib
from jaxtrain.distributed.mesh import build_mesh, check_batch
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.model.layers import letter_sizes
from jaxtrain.model.loss import build_loss
from jaxtrain.model.transformer import Model, build_model, count_params
from jaxtrain.ops import tuning
from jaxtrain.ops.fused import missing_kernels
from jaxtrain.ops.precision import resolve_dtype
from jaxtrain.ops.routes import chip_name, choose_routes, gpu_architecture
from jaxtrain.optim.build import build_optimizer, peak_rates
from jaxtrain.optim.schedule import build_schedule
from jaxtrain.training.diagnostic_step import build_diagnosis, count_parts
from jaxtrain.training.step import (
    Step,
    abstract_batch,
    abstract_rates,
    abstract_state,
    build_step,
    place_rates,
)

# What a run was trained by and need not be read by: the function of its weights is the same, and
# this machine may have no GPU, or another number of them.
HERE = {
    "mesh.replica": 1,
    "mesh.fsdp": -1,
    "mesh.tensor": 1,
    "model.attention": "auto",
    "kernels.strict": False,
    "strict": False,
}


class Run(NamedTuple):
    cfg: config_lib.TrainConfig
    mesh: jax.sharding.Mesh
    routes: dict
    model: Model
    loss: Any
    optimizer: Any

    @property
    def parameters(self) -> int:
        return count_params(self.model.axes, letter_sizes(self.cfg.model))

    def rates(self) -> dict:
        """The step's third argument: each group's peak rate, on the mesh."""
        return place_rates(peak_rates(self.cfg.optim, self.model.axes), self.mesh)


def build_run(cfg, devices=None) -> Run:
    """Every part of a TrainConfig's run but its data; no array is made.

    Raises:
        ValueError: the mesh, the batch or a route does not fit this machine.
    """
    mesh = build_mesh(cfg.mesh, devices)
    cfg, _ = resolve_dtype(cfg, mesh.devices.flat[0])
    check_batch(cfg.data.batch, cfg.accumulation, mesh)
    device, masked = mesh.devices.flat[0], cfg.data.document_mask
    routes = choose_routes(
        cfg.model,
        masked,
        device.platform,
        cfg.strict,
        cfg.kernels,
        arch=gpu_architecture(device),
        chip=chip_name(device),
        tensor=mesh.shape["tensor"],
        seq_len=cfg.data.seq_len,
        wants_gpu=WANTS_GPU,
    )
    if cfg.optim.name == "adamw" or cfg.optim.geometry != "spectral":
        del routes["square"]  # it has no Newton-Schulz
    model = build_model(cfg.model, routes, mesh, masked)
    softcap, dtype = cfg.model.logit_softcap, jnp.dtype(cfg.model.dtype)
    loss = build_loss(cfg.loss, softcap, dtype, mesh, routes["head"])
    optimizer = build_optimizer(cfg.optim, model.axes, mesh, cfg.seed, routes.get("square"))
    return Run(cfg, mesh, routes, model, loss, optimizer)


def _compile(function, run, options=None) -> Step:
    """A function of (state, batch, rates), compiled for the run's, with the chip's XLA options."""
    chosen = tuning.compiler_options(chip_name(run.mesh.devices.flat[0])) | (options or {})
    data = run.cfg.data
    step = Step(
        function,
        abstract_state(run.model, run.optimizer, run.mesh),
        abstract_batch(data.batch, data.seq_len, run.mesh, data.pack or data.document_mask),
        abstract_rates(peak_rates(run.cfg.optim, run.model.axes), run.mesh),
        options=chosen,
    )
    missing = missing_kernels(run.routes, step.compiled)
    if missing:
        raise ValueError(f"the compiled step must hold the kernels of its routes; got no {missing}")
    return step


def compile_step(run, options=None) -> Step:
    """step(state, batch, run.rates()) -> (state, scalars), the state donated.

    Args:
        options: of XLA, over those that jaxtrain.ops.tuning chooses for the chip.
    """
    rate, accumulation = build_schedule(run.cfg.optim), run.cfg.accumulation
    return _compile(
        build_step(run.model, run.loss, run.optimizer, rate, run.mesh, accumulation), run, options
    )


def compile_diagnosis(run) -> Step:
    """diagnose(state, batch, run.rates()) -> {metric: float32 []}.

    Raises:
        ValueError: the batch cannot be cut in two.
    """
    parts = count_parts(run.cfg.data.batch, run.cfg.accumulation, run.mesh)
    return _compile(build_diagnosis(run, parts), run)


def read_stored(workdir) -> dict:
    """What a run stored in `workdir/config.json`: its config, versions, routes and data.

    Raises:
        ValueError: there is no such file, or it is not a run's.
    """
    if not str(workdir).strip():
        raise ValueError(f"--run must name a folder; got {str(workdir)!r}.")
    path = Path(workdir) / "config.json"
    try:
        stored = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"--run must be a run's folder with a config.json; got {workdir}."
        ) from None
    except ValueError as error:  # not UTF-8, or no JSON
        raise ValueError(
            f"{path} must hold a run's config as JSON; got {error}. The training command writes it "
            "again."
        ) from error
    parts = [stored.get(key) for key in ("config", "data")] if isinstance(stored, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(
            f"{path} must hold a run's config and data; got something else. The training command "
            "writes it again."
        )
    return stored


def load_config(workdir, overrides=None) -> config_lib.TrainConfig:
    """The TrainConfig that a run stored.

    Args:
        overrides: by the names of flags.

    Raises:
        ValueError: as read_stored; or a field is unknown, or its value is refused by now.
    """
    values = read_stored(workdir)["config"] | {"workdir": str(workdir)}
    try:
        for name, value in (overrides or {}).items():
            section, _, field = name.rpartition(".")
            part = values.get(section, {}) | {field: value}
            values |= {section: part} if section else {name: value}
        return config_lib.freeze(values)
    except (AttributeError, TypeError, ValueError) as error:  # a section may be anything
        what = re.sub(r" Set --\S+\.$", "", str(error))
        path = Path(workdir) / "config.json"
        raise ValueError(f"{path} (edit it, no flag does): {what}") from None


def restore_run(workdir, step=None):
    """(Run, TrainState) of a run's newest good checkpoint, or of `step`, on this machine's devices.

    It takes the most devices that its batch divides over, and the routes that this machine has;
    it says so where these are not all, or not those that the run asked for.

    Raises:
        ValueError: the folder holds no run, or no checkpoint yet.
    """
    trained, cfg = load_config(workdir), load_config(workdir, HERE)
    start_runtime(cfg)
    asked = config_lib.describe_changes(config_lib.flatten(trained), cfg)
    asked = [change for change in asked if not change.startswith("mesh.")]
    if asked:
        logging.info("for this machine's routes: %s", "; ".join(asked))
    devices, rows = jax.devices(), cfg.data.batch // cfg.accumulation
    used = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    if used < len(devices):
        logging.info("%d of %d devices: a batch of %d divides no further", used, len(devices), rows)
    run = build_run(cfg, devices[:used])
    folder = Path(workdir) / "checkpoints"
    with Checkpoints(folder, cfg.keep_last, read_only=True) as checkpoints:
        restored = checkpoints.restore(
            abstract_state(run.model, run.optimizer, run.mesh), step=step
        )
    if restored is None:
        raise ValueError(f"--run must hold a checkpoint; got none in {folder}. Train it first.")
    return run, restored.state
