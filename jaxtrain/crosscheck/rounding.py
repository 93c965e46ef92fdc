"""Measures by how much rounding alone can make two correct implementations of a run differ.

Two implementations add in different orders, so that their gradients differ by rounding errors. What
becomes of these depends on the model, the batch and the optimizer: Adam's first update is nearly
the sign of the gradient, and flips in an entry that is as small as its rounding error; and
Newton-Schulz amplifies small singular directions. No constant fits all cases, so each is measured:

1. The gradient is computed in float32 and in float64 from the same weights. Their difference is
   the rounding error of each entry, in float64 scaled down by the ratio of the epsilons.
2. Two more copies of the run are trained. In each step every entry of their gradients is moved by
   SIGMAS times its rounding error, up or down at random, and in opposite directions in the two.
   An entry keeps its direction for PERSISTENCE steps on average, so that Adam's and Muon's averages
   are moved by as much as if all errors had one sign.
   Their optimizers add in another order or, if Newton-Schulz runs in bfloat16, have COARSE times
   more of its rounding error, for the rounding of the optimizer itself.
3. What the copies' gradients, updates and parameters differ from the run's, the larger of both for
   each entry, is the tolerance. Errors of earlier steps are in it, as the copies go their own way.

Activations and losses have no gradient to move; their tolerance is SIGMAS times the difference of
float32 and float64, and the copies' differences are added.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.axes import Axes
from jaxtrain.config.sections import OptimConfig
from jaxtrain.crosscheck.reordering import ExaggeratedState, exaggerate, reorder
from jaxtrain.crosscheck.tensor_names import NameTensors
from jaxtrain.crosscheck.tolerances import EPS, SIGMAS
from jaxtrain.crosscheck.traced_step import (
    StepOutputs,
    Tree,
    build_forward_backward_in_other_precision,
    build_traced_step,
)
from jaxtrain.model.trees import AxesTree
from jaxtrain.optim.build import build_optimizer
from jaxtrain.training.run import Run
from jaxtrain.training.step import TrainState

# The copies' share of Newton-Schulz' bfloat16 rounding error, on top of the run's. In 10 steps of
# two tiny models torch.optim.Muon's updates differed from ours by a third of that error and, where
# a gradient's sign flipped, by twice of it.
COARSE = 4.0
PERSISTENCE = 8  # steps
SIGNS = np.array([-1, 1], np.int8)


class Copy(NamedTuple):
    """A perturbed copy's step."""

    sign: int  # of the noise
    before: Tree  # its parameters before the step
    outputs: StepOutputs


def entry_errors(error: np.ndarray, axes: Axes) -> np.ndarray:
    """Estimates the size of the rounding error of each entry from one sample, float64.

    One sample may be small by luck. The product of the mean squares of its row and column, as in
    Adafactor's second moment, is the better estimate then; for a vector, its own mean square is.

    Source: Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235
    """
    square = np.square(error, dtype=np.float64)
    flat = square.reshape(-1, square.shape[-1])
    expected = flat.mean(1, keepdims=True)
    if axes.role != "vector":
        expected = expected * (flat.mean(0, keepdims=True) / max(float(flat.mean()), 1e-300))
    return np.sqrt(np.maximum(flat, expected)).reshape(error.shape).astype(error.dtype)


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def _norm(x: Any) -> float:
    return float(np.linalg.norm(_wide(x).reshape(-1)))


def _tree_norm(tree: Tree) -> float:
    return float(np.hypot.reduce([_norm(x) for x in jax.tree.leaves(tree)]))


def _relative(size: float, x: Any) -> float:
    return size / max(_norm(x), 1e-300)


def _values(quantity: str, before: Tree, outputs: StepOutputs, noise: Tree = None) -> Tree:
    """Returns what is compared of a step, in float64: its gradients, updates or parameters."""
    if quantity == "gradient":
        grads = jax.tree.map(_wide, outputs.grads)
        return grads if noise is None else jax.tree.map(np.add, grads, noise)
    if quantity == "parameter":
        return jax.tree.map(_wide, outputs.state.params)
    return jax.tree.map(lambda new, old: _wide(new) - _wide(old), outputs.state.params, before)


def build_rounding_optimizer(
    cfg: OptimConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    axes: AxesTree,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that differs from another by rounding.

    Args:
        cfg: the config that `optimizer` was built from.
        axes: pytree of Axes, like params.
        seed: of the order in which it adds.
    """
    # AdamW has no sums, and noise is drawn by position: it would be permuted, too.
    if cfg.name == "adamw" or cfg.noise_scale:
        return optimizer
    if cfg.ns_dtype != "bfloat16":
        return reorder(optimizer, axes, seed)
    form = "standard" if cfg.ns_form == "torch" else cfg.ns_form
    cfg = dataclasses.replace(cfg, ns_dtype="float32", ns_form=form)
    return exaggerate(optimizer, build_optimizer(cfg, axes), COARSE)


class RoundingMeter:
    """Trains two perturbed copies beside a run and derives the tolerances of each step.

    Args:
        run: in float32 or float64.
        step: from build_traced_step(run).
        state: at step 0.
    """

    def __init__(self, run: Run, step: Callable[..., StepOutputs], state: TrainState):
        self._eps, self._axes = EPS[run.cfg.model.dtype], run.model.axes
        self._step, self._copies = step, [state, state]
        optimizer = build_rounding_optimizer(
            run.cfg.optim, run.optimizer, run.model.axes, run.cfg.seed
        )
        if optimizer is not run.optimizer:
            self._step = build_traced_step(run._replace(optimizer=optimizer))
            start = jax.jit(optimizer.init)(state.params)
            starts = [start, start]
            if isinstance(start, ExaggeratedState):
                starts = [start._replace(key=jax.random.key(i)) for i in range(2)]
            # On the mesh, as the step returns them: else the second step would compile again.
            starts = jax.device_put(starts, NamedSharding(run.mesh, PartitionSpec()))
            self._copies = [state._replace(opt_state=opt_state) for opt_state in starts]
        self._other = build_forward_backward_in_other_precision(run.cfg)
        self._rng = np.random.default_rng(run.cfg.seed)
        draw = lambda p: self._rng.choice(SIGNS, p.shape)
        self._signs = jax.tree.map(draw, state.params)
        self._parameter_bounds = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), state.params)
        self._loss_apart = 0.0

    def tolerances(
        self,
        before: Tree,
        outputs: StepOutputs,
        batch: dict[str, jax.Array],
        rates: dict[str, jax.Array],
        name_tensors: NameTensors,
    ) -> dict[str, Any]:
        """Trains the copies for one step and returns the step's tolerances.

        Args:
            before: the run's parameters before the step.
            outputs: of the run's step.

        Returns:
            {"loss": nats, "grad_norm": relative} and {"activations", "gradient", "update",
            "parameter": {name: relative to the tensor's norm}}.
        """
        (nats, _, grads), activations = self._other(before, jax.tree.map(np.asarray, batch))
        accepted = SIGMAS * self._eps / EPS["float32"]  # times float32's rounding error
        noise = jax.tree.map(
            lambda axes, g, other: accepted * entry_errors(_wide(g) - _wide(other), axes),
            self._axes,
            outputs.grads,
            grads,
        )
        self._signs = jax.tree.map(self._redraw, self._signs)
        up = jax.tree.map(np.multiply, noise, self._signs)
        copies = [self._train_copy(i, sign, up, batch, rates) for i, sign in enumerate((1, -1))]
        found: dict[str, Any] = {}
        # One quantity after the other: the host stores few trees in float64 at a time.
        for quantity in ("gradient", "update", "parameter"):
            values = _values(quantity, before, outputs)
            bounds = self._bounds(quantity, values, copies, up)
            found[quantity] = {
                name: _relative(_norm(bound), x) + SIGMAS * self._eps
                for (name, bound), (_, x) in zip(
                    name_tensors(bounds), name_tensors(values), strict=True
                )
            }
            if quantity == "gradient":
                size = max(_tree_norm(values), 1e-300)
                found["grad_norm"] = _tree_norm(bounds) / size
                # The standard deviation of the loss if each parameter is moved by its bound, up or
                # down at random. The copies are but two directions, and may be lucky ones.
                apart = _tree_norm(jax.tree.map(np.multiply, values, self._parameter_bounds))
            if quantity == "parameter":
                self._parameter_bounds = jax.tree.map(np.float32, bounds)
        outcomes = [copy.outputs for copy in copies]
        found["loss"] = self._loss_tolerance(outputs, outcomes, float(nats), apart)
        found["activations"] = {
            name: SIGMAS * self._eps
            + _relative(
                accepted * _norm(_wide(x) - _wide(activations[name]))
                + max(_norm(_wide(o.activations[name]) - _wide(x)) for o in outcomes),
                x,
            )
            for name, x in outputs.activations.items()
        }
        return found

    def _train_copy(self, index: int, sign: int, noise: Tree, batch: Any, rates: Any) -> Copy:
        """Trains a copy for one step with its gradients moved by sign * noise."""
        old = self._copies[index]
        move = lambda e, p: jnp.asarray(sign * e, p.dtype)
        outputs = self._step(old, batch, rates, jax.tree.map(move, noise, old.params))
        self._copies[index] = outputs.state
        return Copy(sign, old.params, outputs)

    def _bounds(self, quantity: str, values: Tree, copies: list[Copy], noise: Tree) -> Tree:
        """Returns the largest difference of each entry from the copies' entries."""
        bounds = jax.tree.map(np.zeros_like, values)
        for copy in copies:
            signed = jax.tree.map(lambda e, sign=copy.sign: sign * e, noise)
            others = _values(quantity, copy.before, copy.outputs, signed)
            larger = lambda bound, x, other: np.maximum(bound, np.abs(other - x))
            bounds = jax.tree.map(larger, bounds, values, others)
        if quantity != "update":
            return bounds
        # An update is the difference of two stored parameters, each rounded to its last bit.
        last_bit = lambda bound, p: bound + self._eps * np.abs(_wide(p))
        return jax.tree.map(last_bit, bounds, copies[0].outputs.state.params)

    def _loss_tolerance(
        self, outputs: StepOutputs, copies: list[StepOutputs], other_nats: float, apart: float
    ) -> float:
        """Returns the loss's tolerance in nats; it never falls, as one step may be lucky."""
        loss, *others = (float(o.scalars["train/loss_nats"]) for o in (outputs, *copies))
        self._loss_apart = max(self._loss_apart, apart, *(abs(other - loss) for other in others))
        rounding = max(abs(loss - other_nats) / EPS["float32"], abs(loss))
        return self._loss_apart + SIGMAS * self._eps * rounding

    def _redraw(self, signs: np.ndarray) -> np.ndarray:
        """Draws the direction of one in PERSISTENCE entries again."""
        is_drawn = self._rng.random(signs.shape) < 1 / PERSISTENCE
        return np.where(is_drawn, self._rng.choice(SIGNS, signs.shape), signs)
