"""Compiles steps that return what a trace records: gradients, activations and the new state."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.config.train_config import KernelsConfig, TrainConfig
from jaxtrain.training.run import Run, build_run
from jaxtrain.training.step import TrainState, build_gradient, build_update

OTHER = {"float64": "float32", "float32": "float64"}

Tree = Any


class StepOutputs(NamedTuple):
    """What one traced step computes."""

    state: TrainState  # after the step
    scalars: dict[str, jax.Array]
    grads: Tree  # of the parameters before the step, without the noise
    activations: dict[str, jax.Array]


def build_forward_backward(run: Run) -> Callable[..., tuple]:
    """Returns f(params, batch) -> ((nats, objective, grads), {name: activation})."""
    gradient = build_gradient(run.model, run.loss, run.cfg.accumulation)

    def activations(params, batch):
        inputs = batch["tokens"][:, :-1]
        docs = batch["docs"][:, :-1] if "docs" in batch else None
        layers, hidden_BTD = run.model.hidden_states(params, inputs, docs)
        named = {f"blocks.{i - 1}" if i else "embed": h_BTD for i, h_BTD in enumerate(layers)}
        return named | {"logits": run.model.logits(params, hidden_BTD)}

    return lambda params, batch: (gradient(params, batch), activations(params, batch))


def build_traced_step(run: Run) -> Callable[..., StepOutputs]:
    """Returns step(state, batch, rates, noise) -> StepOutputs, jitted.

    The noise is a tree like the gradients, which is added to them before they are clipped.
    """
    forward_backward = build_forward_backward(run)
    update = build_update(run.model, run.optimizer, run.cfg.optim)

    def step(state, batch, rates, noise):
        (nats, objective, grads), activations = forward_backward(state.params, batch)
        noisy = jax.tree.map(jnp.add, grads, noise)
        new, scalars = update(state, (nats, objective, noisy), rates)
        return StepOutputs(new, scalars, grads, activations)

    return jax.jit(step)


def build_forward_backward_in_other_precision(cfg: TrainConfig) -> Callable[..., tuple]:
    """Returns build_forward_backward's function in float32 for float64, and in float64 for float32.

    It takes and returns NumPy arrays.
    """
    precision = OTHER[cfg.model.dtype]
    with jax.enable_x64(precision == "float64"):
        run = build_run(
            dataclasses.replace(
                cfg,
                strict=False,
                kernels=KernelsConfig(),
                model=dataclasses.replace(cfg.model, dtype=precision, attention="auto"),
                optim=dataclasses.replace(cfg.optim, ns_dtype="float32"),
            ),
            jax.devices()[:1],
        )
        compute = jax.jit(build_forward_backward(run))

    def forward_backward(params, batch):
        with jax.enable_x64(precision == "float64"):
            params = jax.tree.map(lambda p: np.asarray(p, precision), params)
            return jax.tree.map(np.asarray, compute(params, batch))

    return forward_backward
