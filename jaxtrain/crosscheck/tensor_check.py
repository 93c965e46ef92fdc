"""Steps two optimizers on the same random tensors and gradients, and compares the updates.

Without a model, a difference can only come from the optimizers. The tensors have the shapes and
gradients that optimizers treat differently: wide and tall matrices, gradients that start late or
pause, small gradients, and gradients that are zero in most rows.

As in rounding.py, tolerances are measured: two copies of our optimizer get gradients that are moved
by SIGMAS times their rounding error, and add in another order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxtrain.axes import Axes
from jaxtrain.config.sections import OptimConfig
from jaxtrain.crosscheck.comparison import Comparison, compare_traces
from jaxtrain.crosscheck.rounding import build_rounding_optimizer
from jaxtrain.crosscheck.their_optimizer import TheirOptimizer
from jaxtrain.crosscheck.tolerances import EPS, SIGMAS
from jaxtrain.crosscheck.trace import FORMAT, StepRecord, Trace, digest
from jaxtrain.optim.build import build_optimizer

Tensors = dict[str, np.ndarray]


class Kind(NamedTuple):
    """A random tensor; its gradient at step n is multiplied by size(n)."""

    shape: tuple[int, ...]  # matrices are [outputs, inputs], as in torch
    size: Callable[[int], float] = lambda step: 1.0
    rows: int = 0  # rows whose gradient is not zero; 0 is all

    @property
    def axes(self) -> Axes:
        return Axes.parse("|F<-D" if len(self.shape) == 2 else "|D")


MATRICES = {
    "square": Kind((32, 32)),
    "wide": Kind((16, 40)),
    "tall": Kind((40, 16)),
    "late_gradient": Kind((24, 20), lambda step: float(step > 3)),
    "pausing_gradient": Kind((20, 24), lambda step: float(not 5 <= step < 10)),
    "small_gradient": Kind((16, 24), lambda step: 1e-5),
    "few_rows": Kind((32, 12), rows=3),
}
# If only such tensors differ -> what to check.
HINTS = (
    (
        {"late_gradient", "late_vector"},
        "only tensors differ whose first gradients are zero: check how theirs counts steps, and "
        "divisions by zero",
    ),
    ({"pausing_gradient"}, "only a tensor differs whose gradient pauses: check divisions by zero"),
    ({"few_rows"}, "only a tensor differs whose gradient has zero rows: check eps"),
    (
        {"tall", "late_gradient", "few_rows"},
        "only matrices differ with more outputs (rows) than inputs: check the factor by shape, and "
        "what is done to the transpose",
    ),
    (
        {"wide", "pausing_gradient", "small_gradient"},
        "only matrices differ with fewer outputs (rows) than inputs: check the factor by shape, "
        "and what is done to the transpose",
    ),
)
CHAOTIC = 0.25  # relative tolerance of an update from which on comparing it shows nothing
AS_FLOAT32 = 1e-5  # relative differences below this look like rounding to float32
VECTORS = {"vector": Kind((48,)), "late_vector": Kind((16,), lambda step: float(step > 3))}


def _gradients(kinds: dict[str, Kind], step: int, dtype: str) -> Tensors:
    """Returns the gradients of a step: columns of sizes 1 to 0.3, part of them in all steps."""
    found = {}
    for i, (name, kind) in enumerate(kinds.items()):
        constant, noise = (np.random.default_rng((i, s)).normal(size=kind.shape) for s in (0, step))
        g = (0.3 * constant + noise) * np.geomspace(1, 0.3, kind.shape[-1]) * kind.size(step)
        g[kind.rows or len(g) :] = 0
        found[name] = g.astype(dtype)
    return found


def _records(kinds, steps: int, dtype: str, advance: Callable[[Tensors], Tensors], params: Tensors):
    """Yields (gradients, updates, parameters) of each step, updates in float64."""
    for step in range(1, steps + 1):
        grads = _gradients(kinds, step, dtype)
        new = advance(grads)
        updates = {name: np.float64(new[name]) - params[name] for name in new}
        yield grads, updates, new
        params = new


def _our_advance(optimizer: Any, params: Tensors) -> Callable[[], Callable[[Tensors], Tensors]]:
    """Returns start() -> advance(gradients) -> the new parameters; starts share one program."""

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    first = params, jax.jit(optimizer.init)(params)

    def start():
        carry = [*first]

        def advance(grads):
            carry[:] = step(*carry, grads)
            return {name: np.asarray(x) for name, x in carry[0].items()}

        return advance

    return start


def _their_advance(theirs: TheirOptimizer, params: Tensors) -> Callable[[Tensors], Tensors]:
    tensors = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in params.items()}
    optimizer = theirs.build([{"params": list(tensors.values())}])

    def advance(grads):
        for name, p in tensors.items():
            p.grad = torch.tensor(grads[name])
        optimizer.step()
        return {name: p.detach().numpy().copy() for name, p in tensors.items()}

    return advance


def _record(step: int, **quantities: Tensors) -> StepRecord:
    digests = {
        quantity: {name: np.array(digest(x)) for name, x in tensors.items()}
        for quantity, tensors in quantities.items()
    }
    return {"step": step, "loss": 0.0, **digests}


def _relative(bound: np.ndarray, x: np.ndarray) -> float:
    return float(np.linalg.norm(bound) / max(float(np.linalg.norm(x)), 1e-300))


def compare_on_tensors(
    cfg: OptimConfig, theirs: TheirOptimizer, steps: int, precision: str, seed: int = 0
) -> Comparison:
    """Steps both optimizers on random tensors, at constant rates and without clipping.

    Args:
        cfg: of our optimizer. With name=adamw there are vectors, too; the other optimizers step
            matrices only.
        precision: "float64" or "float32"; JAX must be set to it.

    Raises:
        ValueError: their optimizer cannot be built or stepped, or rounding decides all updates.
    """
    kinds = MATRICES | (VECTORS if cfg.name == "adamw" else {})
    axes = {name: kind.axes for name, kind in kinds.items()}
    rng, eps = np.random.default_rng(seed), EPS[precision]
    params = {n: rng.normal(scale=0.1, size=k.shape).astype(precision) for n, k in kinds.items()}
    signs = {name: rng.choice([-1.0, 1.0], kind.shape) for name, kind in kinds.items()}
    optimizer = build_optimizer(cfg, axes)
    start_copy = _our_advance(build_rounding_optimizer(cfg, optimizer, axes), params)
    ours = _records(kinds, steps, precision, _our_advance(optimizer, params)(), params)
    other = _records(kinds, steps, precision, _their_advance(theirs, params), params)

    def copy(sign):
        advance = start_copy()
        noisy = lambda g, name: (g * (1 + sign * SIGMAS * eps * signs[name])).astype(precision)
        move = lambda grads: advance({name: noisy(g, name) for name, g in grads.items()})
        return _records(kinds, steps, precision, move, params)

    records: tuple[list, list] = ([], [])
    chaotic: dict[str, int] = {}  # tensor -> the step from which rounding decides its updates
    for record in records:
        record.append(_record(0, parameter=params))
    runs = zip(ours, other, copy(1), copy(-1), strict=True)
    for step, ((grads, updates, new), (_, their_updates, their_new), *copies) in enumerate(runs, 1):
        line = _record(step, gradient=grads, update=updates, parameter=new)
        line["tolerance"] = {"gradient": dict.fromkeys(kinds, SIGMAS * eps)}
        last_bit = {name: eps * np.abs(np.float64(x)) for name, x in new.items()}
        for i, (quantity, values) in enumerate((("update", updates), ("parameter", new)), 1):
            limits = line["tolerance"][quantity] = {}
            for name, x in values.items():
                apart = np.maximum(*(np.abs(np.float64(copy[i][name]) - x) for copy in copies))
                if quantity == "update" and _relative(apart, x) > CHAOTIC:
                    chaotic.setdefault(name, step)
                limits[name] = _relative(apart + last_bit[name], x) + SIGMAS * eps
            limits |= dict.fromkeys(chaotic, float("inf"))
        if len(chaotic) == len(kinds):
            raise ValueError(
                f"rounding must not decide all updates; it does from step {step} on, so that "
                "agreement would show nothing. Set --precision=float64, or fewer --steps."
            )
        records[0].append(line)
        records[1].append(_record(step, gradient=grads, update=their_updates, parameter=their_new))
    header = {"trace": FORMAT, "precision": precision, "seed": 0, "optim": vars(cfg)}
    first, second = (
        Trace(header | {"side": side}, lines)
        for side, lines in zip(("jaxtrain", theirs.name), records, strict=True)
    )
    found = compare_traces(first, second)
    notes = [
        f"Not compared from step {step} on, because rounding decides their updates: "
        + ", ".join(name for name, start in chaotic.items() if start == step)
        for step in sorted(set(chaotic.values()))
    ]
    return found._replace(causes=found.causes or _find_causes(found), notes=notes)


def _find_causes(found: Comparison) -> list[str]:
    """Returns likely causes from which tensors differ, and by how much."""
    if found.divergence is None:
        return []
    sizes = {d.tensor: d.size for d in found.divergence.all}
    if found.precision == "float64" and max(sizes.values()) < AS_FLOAT32:
        return [
            "such small differences come from a part that computes in float32: compare with "
            "--precision=float32, or make theirs follow the type of its parameters"
        ]
    others = [size for name, size in sizes.items() if name != "small_gradient"]
    if others and sizes.get("small_gradient", 0.0) > 10 * max(others):
        return [
            "it differs most where gradients are small: check eps, and whether it is added to the "
            "root or inside"
        ]
    return [text for tensors, text in HINTS if set(sizes) <= tensors][:1]
