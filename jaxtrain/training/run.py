"""Builds the parts of a run from its config: what training, evaluation and sampling share."""

from collections.abc import Callable, Sequence
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
from jaxtrain.model.layer_parts import letter_sizes
from jaxtrain.model.loss import build_loss
from jaxtrain.model.transformer import Model, build_model, count_params
from jaxtrain.ops import tuning
from jaxtrain.ops.cudnn import explain_missing_cudnn
from jaxtrain.ops.fused import missing_kernels
from jaxtrain.ops.precision import resolve_dtype
from jaxtrain.ops.routes import Route, choose_routes
from jaxtrain.optim.build import build_optimizer, peak_rates
from jaxtrain.optim.parametrisation import scale_initial_values
from jaxtrain.run_directory.contents import load_train_config
from jaxtrain.training.batch_arrays import abstract_batch
from jaxtrain.training.remat import resolve_remat
from jaxtrain.training.step import (
    Step,
    TrainState,
    abstract_rates,
    abstract_state,
    build_step,
    place_rates,
)
from pallas_kernels.devices import chip_name, gpu_architecture

# Fields that depend on the machine that trained. A machine that only reads the weights may have no
# GPU, or a different number of devices; the weights define the same function there.
READER_OVERRIDES = {
    "mesh.replica": 1,
    "mesh.fsdp": -1,
    "mesh.tensor": 1,
    "model.attention": "auto",
    "kernels.strict": False,
    "strict": False,
}


class Run(NamedTuple):
    """The parts that a config describes, without data or arrays."""

    cfg: config_lib.TrainConfig  # its model.remat may be "auto"; see the property remat
    mesh: jax.sharding.Mesh
    routes: dict[str, Any]  # op -> the implementation chosen for this machine
    model: Model
    loss: Callable
    optimizer: Any

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return count_params(self.model.axes, letter_sizes(self.cfg.model))

    @property
    def remat(self) -> str:
        """The value of model.remat with which the model was built, never "auto"."""
        return self.routes["remat"].implementation

    def rates(self) -> dict[str, jax.Array]:
        """Returns the step's third argument: each group's peak learning rate, on the mesh."""
        return place_rates(peak_rates(self.cfg.optim, self.model.axes), self.mesh)


def build_run(cfg: config_lib.TrainConfig, devices: Sequence | None = None) -> Run:
    """Builds every part of a run but its data; no array is allocated.

    Raises:
        ValueError: the mesh, the batch or a route does not fit this machine.
    """
    mesh = build_mesh(cfg.mesh, devices)
    device = mesh.devices.flat[0]
    cfg, _ = resolve_dtype(cfg, device)
    check_batch(cfg.data.batch, cfg.accumulation, mesh)
    routes, model = build_routed_model(cfg, mesh)
    model = scale_initial_values(cfg, model)
    softcap, form = cfg.model.logit_softcap, cfg.model.logit_softcap_form
    dtype = jnp.dtype(cfg.model.dtype)
    loss = build_loss(cfg.loss, softcap, dtype, mesh, routes["head"], form)
    optimizer = build_optimizer(cfg.optim, model.axes, mesh, cfg.seed, routes.get("square"))
    return Run(cfg, mesh, routes, model, loss, optimizer)


def build_routed_model(
    cfg: config_lib.TrainConfig, mesh: jax.sharding.Mesh
) -> tuple[dict[str, Any], Model]:
    """Returns the implementation chosen for each op of a microbatch, and the model with them.

    Raises:
        ValueError: a route that the config demands does not fit this machine.
    """
    device, masked = mesh.devices.flat[0], cfg.data.document_mask
    cfg, reason = resolve_remat(cfg, mesh)
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
        sequences=cfg.data.batch // cfg.accumulation // mesh.shape["replica"] // mesh.shape["fsdp"],
        wants_gpu=WANTS_GPU,
        no_cudnn=explain_missing_cudnn(),
    )
    if not cfg.optim.orthogonalizes:
        del routes["square"]  # only Newton-Schulz multiplies a matrix by itself
    routes["remat"] = Route("remat", cfg.model.remat, reason)
    return routes, build_model(cfg.model, routes, mesh, masked)


def compile_step(run: Run, options: dict[str, Any] | None = None) -> Step:
    """Compiles step(state, batch, run.rates()) -> (state, scalars); the state is donated.

    Args:
        options: XLA options, over those that jaxtrain.ops.tuning chooses for the chip.
    """
    parts = run.model, run.loss, run.optimizer, run.cfg.optim, run.mesh, run.cfg.accumulation
    parts += (len(run.cfg.data.source_names),)
    return compile_for_run(build_step(*parts), run, options)


def compile_for_run(function: Callable, run: Run, options: dict[str, Any] | None = None) -> Step:
    """Compiles a jitted function of (state, batch, rates) with the chip's XLA options.

    Raises:
        ValueError: a kernel that the routes promise is not in the program.
    """
    chosen = tuning.compiler_options(chip_name(run.mesh.devices.flat[0])) | (options or {})
    step = Step(
        function,
        abstract_state(run.model, run.optimizer, run.mesh),
        abstract_batch(run.cfg.data, run.mesh),
        abstract_rates(peak_rates(run.cfg.optim, run.model.axes), run.mesh),
        options=chosen,
    )
    missing = missing_kernels(run.routes, step.compiled)
    if missing:
        raise ValueError(
            f"the compiled step must contain the kernels of its routes; got none of {missing}. "
            "This is a bug: report it."
        )
    return step


def build_reader(workdir: Path | str) -> Run:
    """Builds a run, to read its checkpoints on this machine's devices.

    Uses the largest number of devices that divides the batch, and kernel routes that this machine
    has. Logs unused devices and changed routes.

    Raises:
        ValueError: the folder contains no run.
    """
    trained, cfg = load_train_config(workdir), load_train_config(workdir, READER_OVERRIDES)
    start_runtime(cfg)
    changes = config_lib.describe_changes(config_lib.flatten(trained), cfg)
    changes = [change for change in changes if not change.startswith("mesh.")]
    if changes:
        logging.info("changed to run on this machine: %s", "; ".join(changes))
    devices, rows = jax.devices(), cfg.data.batch // cfg.accumulation
    used = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    if used < len(devices):
        logging.info(
            "using %d of %d devices: they must divide a batch of %d", used, len(devices), rows
        )
    return build_run(cfg, devices[:used])


def restore_run(workdir: Path | str, step: int | None = None) -> tuple[Run, TrainState]:
    """Restores a run's newest good checkpoint, or that of `step`, as build_reader.

    Raises:
        ValueError: the folder contains no run, or no checkpoint yet.
    """
    run = build_reader(workdir)
    folder = Path(workdir) / "checkpoints"
    template = abstract_state(run.model, run.optimizer, run.mesh)
    with Checkpoints(folder, run.cfg.keep_last, read_only=True) as checkpoints:
        restored = checkpoints.restore(template, step=step)
    if restored is None:
        raise ValueError(
            f"--run must contain a checkpoint; got none in {folder}. Train the run first."
        )
    return run, restored.state
