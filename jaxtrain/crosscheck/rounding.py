"""Measures by how much rounding alone can make two correct implementations of a run differ.

Two implementations add in different orders, so that their gradients differ by rounding errors. What
becomes of these depends on the model, the batch and the optimizer: Adam's first update is nearly
the sign of the gradient, so that an entry of the size of its own rounding error may flip, and
Newton-Schulz amplifies small singular directions. No constant fits all cases, so each is measured:

1. The gradient is computed in float32 and in float64 from the same weights. Their difference is
   the rounding error of each entry, in float64 scaled down by the ratio of the epsilons.
2. Two more copies of the run are trained. In each step every entry of their gradients is moved by
   SIGMAS times its rounding error, up or down at random, and in opposite directions in the two.
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

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import KernelsConfig, TrainConfig
from jaxtrain.crosscheck.reordering import exaggerate, reorder
from jaxtrain.crosscheck.tensor_names import NameTensors
from jaxtrain.crosscheck.tolerances import EPS, SIGMAS
from jaxtrain.optim.build import build_optimizer
from jaxtrain.optim.schedule import build_schedule
from jaxtrain.training.run import Run, build_run
from jaxtrain.training.step import TrainState, build_gradient, build_update

# The copies' share of Newton-Schulz' bfloat16 rounding error, on top of the run's. In 10 steps of
# two tiny models torch.optim.Muon's updates differed from ours by a third of that error and, where
# a gradient's sign flipped, by twice of it.
COARSE = 2.0
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
    update = build_update(run.model, run.optimizer, build_schedule(run.cfg.optim))

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
    return np.sqrt(np.maximum(flat, expected)).reshape(error.shape)


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def _norm(x: Any) -> float:
    return float(np.linalg.norm(_wide(x).reshape(-1)))


def _relative(size: float, x: Any) -> float:
    return size / max(_norm(x), 1e-300)


def _quantities(before: Tree, outputs: StepOutputs, noise: Tree) -> dict[str, Tree]:
    """Returns the trees of a step that are compared, in float64; the gradients with their noise."""
    subtract = lambda after, before: _wide(after) - _wide(before)
    return {
        "gradient": jax.tree.map(lambda g, e: _wide(g) + e, outputs.grads, noise),
        "update": jax.tree.map(subtract, outputs.state.params, before),
        "parameter": jax.tree.map(_wide, outputs.state.params),
    }


def build_rounding_optimizers(run: Run) -> list[optax.GradientTransformationExtraArgs]:
    """Returns the optimizers of two perturbed copies, which differ from the run's by rounding."""
    cfg = run.cfg.optim
    # AdamW has no sums, and noise is drawn by position: it would be permuted, too.
    if cfg.name == "adamw" or cfg.noise_scale:
        return [run.optimizer] * 2
    if cfg.ns_dtype != "bfloat16":
        return [reorder(run.optimizer, run.model.axes, run.cfg.seed)] * 2
    form = "standard" if cfg.ns_form == "torch" else cfg.ns_form
    exact = build_optimizer(
        dataclasses.replace(cfg, ns_dtype="float32", ns_form=form), run.model.axes, run.mesh
    )
    return [exaggerate(run.optimizer, exact, factor) for factor in (COARSE, -COARSE)]


class RoundingMeter:
    """Trains two perturbed copies beside a run and derives the tolerances of each step.

    Args:
        run: in float32 or float64.
        step: from build_traced_step(run).
        state: at step 0.
    """

    def __init__(self, run: Run, step: Callable[..., StepOutputs], state: TrainState):
        self._eps, self._axes = EPS[run.cfg.model.dtype], run.model.axes
        self._copies, steps = [], {id(run.optimizer): step}  # each is compiled once
        for optimizer in build_rounding_optimizers(run):
            if id(optimizer) not in steps:
                steps[id(optimizer)] = build_traced_step(run._replace(optimizer=optimizer))
                opt_state = jax.jit(optimizer.init)(state.params)
                state = state._replace(opt_state=opt_state)
            self._copies.append((steps[id(optimizer)], state))
        self._other = build_forward_backward_in_other_precision(run.cfg)
        self._rng = np.random.default_rng(run.cfg.seed)

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
        up = jax.tree.map(lambda e: e * self._rng.choice((-1.0, 1.0), e.shape), noise)
        down = jax.tree.map(np.negative, up)
        main = _quantities(before, outputs, jax.tree.map(np.zeros_like, noise))
        copies, moved = [], []
        for i, signed in enumerate((up, down)):
            step, old = self._copies[i]
            copy = step(old, batch, rates, self._like_gradients(signed, outputs.grads))
            copies.append(copy)
            moved.append(_quantities(old.params, copy, signed))
            self._copies[i] = step, copy.state

        larger = lambda x, a, b: np.maximum(np.abs(a - x), np.abs(b - x))
        bounds = {q: jax.tree.map(larger, main[q], *(m[q] for m in moved)) for q in main}
        # An update is the difference of two stored parameters, each rounded to its last bit.
        bounds["update"] = jax.tree.map(
            lambda bound, p: bound + self._eps * np.abs(p), bounds["update"], main["parameter"]
        )
        found: dict[str, Any] = {
            quantity: {
                name: _relative(_norm(bound), x) + SIGMAS * self._eps
                for (name, bound), (_, x) in zip(
                    name_tensors(bounds[quantity]), name_tensors(tree), strict=True
                )
            }
            for quantity, tree in main.items()
        }
        norm = lambda tree: float(np.hypot.reduce([_norm(x) for x in jax.tree.leaves(tree)]))
        found["grad_norm"] = norm(bounds["gradient"]) / max(norm(main["gradient"]), 1e-300)
        found["activations"] = {
            name: SIGMAS * self._eps
            + _relative(
                accepted * _norm(_wide(x) - _wide(activations[name]))
                + max(_norm(_wide(copy.activations[name]) - _wide(x)) for copy in copies),
                x,
            )
            for name, x in outputs.activations.items()
        }
        loss, *others = (float(o.scalars["train/loss_nats"]) for o in (outputs, *copies))
        found["loss"] = max(abs(other - loss) for other in others) + max(
            accepted * abs(loss - float(nats)), SIGMAS * self._eps * abs(loss)
        )
        return found

    @staticmethod
    def _like_gradients(noise: Tree, grads: Tree) -> Tree:
        return jax.tree.map(lambda e, g: jnp.asarray(e, g.dtype), noise, grads)
