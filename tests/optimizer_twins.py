"""Optimizers in plain NumPy and float64, one matrix at a time, to compare ours with.

Written from the papers and scripts that each one names; they share no code with jaxtrain. A leaf
is [...,inputs,outputs] or a vector; `MATRICES` gives the two sizes of a leaf that is a stack.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import OptimConfig
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.optim.build import build_optimizer

AXES = {
    "w_in": Axes.parse("L|D->HK"),
    "w_out": Axes.parse("L|F->D"),
    "gain": Axes.parse("L|D"),
    "embed": Axes.parse("V|D"),
}
SHAPES = {"w_in": (2, 6, 2, 4), "w_out": (2, 10, 6), "gain": (2, 6), "embed": (12, 6)}
MATRICES = {"w_in": (6, 8), "w_out": (10, 6)}  # (inputs, outputs)
STEPS, WARMUP, DECAY_STEPS, RATE, ADAM_RATE, CLIP = 50, 5, 20, 0.02, 3e-3, 4.0
OPTIONS = {
    "total_steps": STEPS,
    "warmup_steps": WARMUP,
    "decay_fraction": DECAY_STEPS / STEPS,
    "learning_rate": RATE,
    "adam_learning_rate": ADAM_RATE,
    "clip_norm": CLIP,
    "ns_dtype": "float64",
}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def gradient(params, step):
    """Returns a noisy gradient that depends on the parameters, so that errors would feed back."""
    noise = draw(1000 + step)
    return {name: params[name] - 1 + noise[name] for name in SHAPES}


def train_ours(optimizer=None, **options):
    """Returns (params, evaluated params) after each step, and the last state, in float64."""
    jax.config.update("jax_enable_x64", True)
    optimizer = optimizer or build_optimizer(OptimConfig(**OPTIONS | options), AXES)
    params = {name: jnp.asarray(x) for name, x in draw(0).items()}
    state, update, history = optimizer.init(params), jax.jit(optimizer.update), []
    for step in range(STEPS):
        updates, state = update(gradient(params, step), state, params)
        params = {name: p + updates[name] for name, p in params.items()}
        history.append((params, eval_params(state, params)))
    return history, state


def share_of_peak(count):
    """The `wsd` schedule: linear warm-up, constant, linear decay to zero."""
    return min((count + 1) / WARMUP, (STEPS - count) / DECAY_STEPS, 1.0)


def clipped(grads):
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    return {name: g * min(1.0, CLIP / norm) for name, g in grads.items()}


def orthogonalize(x):
    """Five iterations of https://kellerjordan.github.io/posts/muon/ on one matrix."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Adam:
    """Adam's direction, https://arxiv.org/abs/1412.6980, Algorithm 1."""

    def __init__(self, b1=0.9, b2=0.95, eps=1e-8):
        self.b1, self.b2, self.eps, self.m, self.v, self.t = b1, b2, eps, 0.0, 0.0, 0

    def __call__(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        mean, square = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        return mean / (np.sqrt(square) + self.eps)


class Muon:
    """Muon's direction of one matrix [inputs,outputs], https://kellerjordan.github.io/posts/muon/."""

    def __init__(self, beta=0.95):
        self.beta, self.m = beta, 0.0

    def __call__(self, g):
        self.m = self.beta * self.m + (1 - self.beta) * g
        u = orthogonalize(self.beta * self.m + (1 - self.beta) * g)
        return u * max(1.0, u.shape[1] / u.shape[0]) ** 0.5


def decoupled(p, u, rate, decay):
    return p - rate * (u + decay * p)


def train_twin(matrix=Muon, apply=decoupled, decay=0.0, rate=RATE, rest_apply=None):
    """Returns params after each step: matrices by `matrix`, all else by AdamW.

    Args:
        matrix: makes the direction of one matrix.
        apply: (p, direction, rate, decay) -> new p of one matrix.
        rate: the matrices' peak rate.
        rest_apply: that of the other leaves; `apply` unless given.
    """
    params, history = draw(0), []
    directions = {name: [matrix() for _ in range(2)] for name in MATRICES}
    adams = {name: Adam() for name in SHAPES}
    for step in range(STEPS):
        grads, scale = clipped(gradient(params, step)), share_of_peak(step)
        new = {}
        for name, p in params.items():
            if name in MATRICES:
                p_XIO, g_XIO = (x.reshape(2, *MATRICES[name]) for x in (p, grads[name]))
                pairs = zip(directions[name], p_XIO, g_XIO, strict=True)
                moved = [apply(q, d(g), rate * scale, decay) for d, q, g in pairs]
                new[name] = np.stack(moved).reshape(p.shape)
            else:
                kept = 0.0 if name == "gain" else decay
                u = adams[name](grads[name])
                new[name] = (rest_apply or apply)(p, u, ADAM_RATE * scale, kept)
        params = new
        history.append(params)
    return history


def assert_histories_agree(ours, theirs, tolerance=1e-10):
    for step, (params, expected) in enumerate(zip(ours, theirs, strict=True)):
        for name, x in expected.items():
            error = np.abs(np.asarray(params[name]) - x).max()
            assert error <= tolerance, f"step {step}, {name}: {error:.2e}"
