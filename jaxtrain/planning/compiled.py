"""Compiles a run's training step for GPUs that are not present and reads the compiled program."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.metrics.flops import Flops, training_flops
from jaxtrain.metrics.hlo_collectives import Collective, find_collectives
from jaxtrain.metrics.mfu import Roofline, roofline
from jaxtrain.planning.hardware import Hardware, collective_seconds
from jaxtrain.training.run import Run, build_run, compile_step
from jaxtrain.training.step import abstract_state
from pallas_kernels.hlo import Program


class StepMemory(NamedTuple):
    """Bytes on one device. XLA reports gradients, activations and workspace as one sum."""

    parameters: int
    optimizer_state: int
    gradients: int  # in the parameters' type; part of the temporaries
    temporaries: int  # XLA's sum
    peak: int
    usable: int

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    def by_use(self) -> dict[str, int]:
        return {
            "parameters": self.parameters,
            "optimizer state": self.optimizer_state,
            "gradients": self.gradients,
            "activations and workspace": max(self.temporaries - self.gradients, 0),
        }

    def all_sizes(self) -> dict[str, int]:
        return {**self.by_use(), "peak": self.peak, "usable": self.usable}


class Plan(NamedTuple):
    """The memory, work and communication of a config's compiled step on some hardware."""

    run: Run  # as compiled
    hardware: Hardware
    notes: tuple[str, ...]  # how the compiled program differs from the one that will run
    memory: StepMemory
    flops: Flops  # per token in training, attention counted over all T keys
    causal_flops: Flops  # per token in training, attention counted over the visible keys
    roofline: Roofline
    collectives: tuple[Collective, ...]
    compile_s: float

    @property
    def tokens(self) -> int:
        """Returns the tokens of one step."""
        return self.run.cfg.data.batch * self.run.cfg.data.seq_len

    @property
    def step_s(self) -> float:
        """Returns the lower bound of a step's time: the roofline, then all communication."""
        return self.roofline.seconds + sum(
            collective_seconds(collective, self.hardware) for collective in self.collectives
        )

    def mfu(self, flops: Flops) -> float:
        """Returns the MFU of a step that takes step_s, if a token costs `flops`."""
        return flops.total * self.tokens / self.step_s / self.hardware.peak_flops


def with_model(cfg: TrainConfig, **values: Any) -> TrainConfig:
    """Returns the config with some fields of its model replaced."""
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **values))


# Values of ModelConfig with which attention's fused kernel can compute a model's scores.
KERNEL_SCORES = {"attention_scale": 0.0}


def _build_run(cfg: TrainConfig, devices: Sequence[Any]) -> tuple[Run, tuple[str, ...]]:
    """Returns a run that can be compiled offline, and notes on how it differs from the real one."""
    run = build_run(cfg, devices)
    if run.routes["attention"].implementation != "cudnn":
        return run, ()
    # XLA leaves compiling this attention to cuDNN, which needs the GPU.
    note = (
        "attention was compiled as the fused kernel; the run will use cuDNN's, which cannot be "
        "compiled without a GPU. Both save the same arrays and compute the same products"
    )
    return build_run(with_model(cfg, attention="flash", **KERNEL_SCORES), devices), (note,)


def peak_bytes(compiled: Any) -> int:
    """Returns the peak memory on one device that the compiler reports for a program."""
    sizes = compiled.memory_analysis()
    # Donated buffers are both arguments and outputs, so they are subtracted once.
    live = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return live + sizes.temp_size_in_bytes


def _step_memory(run: Run, compiled: Any, usable: int) -> StepMemory:
    shard_bytes = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    state = abstract_state(run.model, run.optimizer, run.mesh)
    parameters = sum(map(shard_bytes, jax.tree.leaves(state.params)))
    return StepMemory(
        parameters=parameters,
        optimizer_state=sum(map(shard_bytes, jax.tree.leaves(state))) - parameters,
        gradients=parameters,
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        peak=peak_bytes(compiled),
        usable=usable,
    )


def compile_plan(cfg: TrainConfig, hardware: Hardware) -> Plan:
    """Compiles the step of a config for some hardware.

    Raises:
        ValueError: the config does not fit the mesh, or asks for a kernel that is not available.
        RuntimeError: the GPU compiler is not installed.
    """
    try:
        from pallas_kernels.offline import compiling_for, devices_of
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "compiling for a GPU that is not present needs the extra `offline`; "
            f'{error.name} is missing. Run pip install "jaxtrain[offline]".'
        ) from error

    devices = devices_of(hardware.chip, hardware.gpus, hardware.hosts)
    with compiling_for(devices[0]):
        run, notes = _build_run(cfg, devices)
        step = compile_step(run)
    program = Program(step.compiled.as_text())
    return Plan(
        run=run,
        hardware=hardware,
        notes=notes,
        memory=_step_memory(run, step.compiled, hardware.usable_bytes),
        flops=training_flops(cfg.model, cfg.data.seq_len),
        causal_flops=training_flops(cfg.model, cfg.data.seq_len, causal=True),
        roofline=roofline(program, hardware.chip),
        collectives=tuple(find_collectives(program, run.mesh)),
        compile_s=step.compile_s,
    )
