"""A run's step compiled for a chip that is not there, and what the compiler then knows of it."""

import dataclasses
import math
from typing import NamedTuple

import jax

from jaxtrain.distributed import memory
from jaxtrain.metrics.flops import Flops, training_flops
from jaxtrain.metrics.hlo_collectives import Collective, find_collectives
from jaxtrain.metrics.mfu import Roofline, roofline
from jaxtrain.training.run import build_run, compile_step
from jaxtrain.training.step import abstract_state
from pallas_kernels.chip import Chip
from pallas_kernels.hlo import Program


class Memory(NamedTuple):
    """Bytes on one device. Gradients, activations and workspace share the temporaries."""

    parameters: int
    optimizer_state: int
    gradients: int  # one tree of them in the parameters' type, part of the temporaries
    temporaries: int
    peak: int
    usable: int

    @property
    def activations(self) -> int:
        """And workspace: temporaries that are no gradients."""
        return max(self.temporaries - self.gradients, 0)

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    def terms(self) -> dict[str, int]:
        return {
            "parameters": self.parameters,
            "optimizer state": self.optimizer_state,
            "gradients": self.gradients,
            "activations and workspace": self.activations,
        }


class Plan(NamedTuple):
    cfg: object  # the TrainConfig that was compiled
    chip: Chip
    mesh: dict  # axis -> devices
    devices: int
    hosts: int
    parameters: int
    routes: dict
    notes: tuple[str, ...]  # where what was compiled is not what will run
    memory: Memory
    full: Flops  # of a token, in training
    causal: Flops
    roofline: Roofline
    collectives: tuple[Collective, ...]
    compile_s: float

    @property
    def tokens(self) -> int:
        return self.cfg.data.batch * self.cfg.data.seq_len


def shard_bytes(tree) -> int:
    """Bytes on one device of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def with_model(cfg, **values):
    """The TrainConfig with fields of its model set."""
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **values))


def _build(cfg, devices):
    """(Run, notes); cuDNN's attention needs cuDNN to be compiled, the fused kernel stands in."""
    run = build_run(cfg, devices)
    if run.routes["attention"].implementation != "cudnn":
        return run, ()
    note = (
        "attention was compiled as the fused kernel: cuDNN's, which will run, needs cuDNN to "
        "compile; both keep the same arrays and do the same products"
    )
    return build_run(with_model(cfg, attention="flash"), devices), (note,)


def _memory(run, compiled, chip) -> Memory:
    state = abstract_state(run.model, run.optimizer, run.mesh)
    sizes = {name: shard_bytes(part) for name, part in state._asdict().items()}
    parameters, found = sizes["params"], compiled.memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(
        parameters,
        sum(sizes.values()) - parameters,
        parameters,
        found.temp_size_in_bytes,
        kept + found.temp_size_in_bytes,
        int(memory.fraction() * chip.hbm_bytes),
    )


def compile_plan(cfg, chip, gpus=1, hosts=1) -> Plan:
    """Compiles the step of a TrainConfig for `gpus` devices on each of `hosts` hosts.

    Raises:
        ValueError: the config does not fit the mesh, or asks for a route that is not to be had.
        RuntimeError: the compiler for GPUs is not installed.
    """
    try:
        from pallas_kernels.offline import devices_of
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "the plan compiles for a GPU that is not there, which needs the extra `offline`; "
            f'{error.name} is missing. Run pip install "jaxtrain[offline]", or add --formula.'
        ) from error

    devices = devices_of(chip, gpus, hosts)
    with jax.default_device(devices[0]):
        run, notes = _build(cfg, devices)
        step = compile_step(run)
    program, shape = Program(step.compiled.as_text()), (cfg.model, cfg.data.seq_len)
    return Plan(
        run.cfg,
        chip,
        dict(run.mesh.shape),
        gpus * hosts,
        hosts,
        run.parameters,
        run.routes,
        notes,
        _memory(run, step.compiled, chip),
        training_flops(*shape),
        training_flops(*shape, causal=True),
        roofline(program, chip),
        tuple(find_collectives(program, run.mesh)),
        step.compile_s,
    )
