"""Suite optimizer: one update of all parameters, against optax.contrib.muon and torch.optim.Muon.

All variants have the same shapes, weights and gradients, and clip these by their global norm. Muon
updates the matrices, AdamW the rest; parameters and state are updated in place. The variants are:

- jaxtrain: `build_optimizer`, orthogonalising in bfloat16 (the default) and in float32.
- optax: the same stacked parameters, with the dimension numbers that our axes give, jitted with
  donation and the compiler options of our step. It supports float32 only and uses NAdamW.
- torch: one 2D parameter for each matrix of each layer, fused AdamW for the rest. It orthogonalises
  in bfloat16. In "torch float32" that cast is patched away, to compare like with like where the
  processor has no bf16 instructions.

The suite fails if the first updates do not agree, matrix by matrix. Later ones would not: optax
corrects the bias of the momentum, which cancels in the first update only. What optax updates with
NAdamW is not compared.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.axes import Axes
from jaxtrain.benchmarks import cpu_training
from jaxtrain.benchmarks.timing import (
    format_comparison,
    interleave,
    ratio_row,
    summarise,
    target_verdict,
    warm_up,
)
from jaxtrain.config.train_config import ModelConfig, OptimConfig, TrainConfig
from jaxtrain.model.trees import named_leaves
from jaxtrain.optim.build import build_optimizer
from jaxtrain.training.run import build_run
from jaxtrain.training.step import Step

GPT_124M = dict(L=12, D=768, H=12, G=12, K=64, F=3_072, V=50_304, norm="layer", norm_eps=1e-5)
GPT_124M |= dict(bias=True, tied=True, position="learned", positions=1_024, mlp="gelu")
SIZES: dict[str, dict[str, Any]] = cpu_training.SIZES | {"124m": GPT_124M}  # configs/gpt_124m.py's
DTYPES = ("float32", "bfloat16")  # the strictest first, as all variants must agree with it
VARIANTS = ("jaxtrain", "optax", "torch")
AGREEMENT = {"float32": 1e-4, "bfloat16": 5e-2}  # relative Frobenius distance of first updates
SPEEDUP_TARGETS = {"optax": 2.0, "torch": 1.0}
MOST_OF_STACK = 1.5  # target: temporary memory over the largest stack [X,I,O] in float32


class OptimizerProblem:
    """A model's parameters and gradients as NumPy trees, and the tree of their axes."""

    def __init__(self, size: str):
        self.model_cfg = ModelConfig(**SIZES[size])
        model = build_run(TrainConfig(model=self.model_cfg), jax.devices("cpu")[:1]).model
        self.axes = model.axes
        self.params = jax.tree.map(np.array, jax.jit(model.init)(jax.random.key(0)))
        rng = np.random.default_rng(1)
        self.grads = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), self.params)

    @property
    def largest_stack_bytes(self) -> int:
        pairs = zip(jax.tree.leaves(self.axes), jax.tree.leaves(self.params), strict=True)
        return max(4 * x.size for axes, x in pairs if axes.is_matrix)


def optim_config(dtype: str) -> OptimConfig:
    return OptimConfig(
        name="muon",
        ns_dtype=dtype,
        weight_decay=0.1,
        schedule="constant",
        warmup_steps=0,
    )


def optax_muon(cfg: OptimConfig, axes: Any) -> optax.GradientTransformation:
    """Returns clipping and optax.contrib.muon as in a config, for stacked parameters."""

    def dimension_numbers(a: Axes) -> optax.contrib.MuonDimensionNumbers | None:
        if not a.is_matrix:
            return None
        _, inputs, outputs = a.split(range(len(a.letters)))
        return optax.contrib.MuonDimensionNumbers(tuple(inputs), tuple(outputs))

    muon = optax.contrib.muon(
        cfg.learning_rate,
        beta=cfg.momentum,
        nesterov=cfg.nesterov,
        weight_decay=cfg.weight_decay,
        adam_b1=cfg.adam_b1,
        adam_b2=cfg.adam_b2,
        eps=cfg.adam_eps,
        adam_weight_decay=cfg.weight_decay,
        adam_learning_rate=cfg.adam_learning_rate,
        muon_weight_dimension_numbers=jax.tree.map(dimension_numbers, axes),
    )
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), muon)


class JaxUpdate:
    """An optax transform's update, compiled, with parameters and state donated."""

    def __init__(self, optimizer: optax.GradientTransformation, problem: OptimizerProblem):
        def update(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        # Copies, as the update donates its parameters.
        copy = lambda tree: jax.device_put(jax.tree.map(jnp.array, tree), jax.devices("cpu")[0])
        self._params, self._grads = copy(problem.params), copy(problem.grads)
        self._state = jax.jit(optimizer.init)(self._params)
        function = jax.jit(update, donate_argnums=(0, 1))
        self.step = Step(function, self._params, self._state, self._grads)
        self.compile_s = self.step.compile_s
        self.temp_bytes = self.step.compiled.memory_analysis().temp_size_in_bytes

    def __call__(self, turn: int) -> None:
        del turn
        new = self.step(self._params, self._state, self._grads)
        self._params, self._state = jax.block_until_ready(new)

    def read_params(self) -> dict[str, Any]:
        return jax.tree.map(np.array, self._params)


class TorchUpdate:
    """torch.optim's Muon and AdamW on the PyTorch model's parameters."""

    compile_s, temp_bytes = 0.0, None

    def __init__(self, dtype: str, problem: OptimizerProblem):
        from jaxtrain.crosscheck import torch_model, torch_train, torch_weights

        cfg = problem.model_cfg
        model = torch_model.build_torch_model(cfg, problem.params)
        grads = torch_model.build_torch_model(cfg, problem.grads).parameters()
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g.detach()
        optim = optim_config(dtype)
        self._clip = lambda: torch_train.clip_gradients(model, optim.clip_norm, optim.clip_eps)
        self._optimizers = torch_train.build_optimizers(optim, model)
        self.read_params = lambda: torch_weights.read_params(model, problem.params)

    def __call__(self, turn: int) -> None:
        del turn
        self._clip()  # in place: from the second turn on the norm is at its limit, for equal work
        for optimizer in self._optimizers:
            optimizer.step()


def build_updates(
    problem: OptimizerProblem, dtypes: Sequence[str], variants: Sequence[str]
) -> dict[str, JaxUpdate | TorchUpdate]:
    """Returns {"jaxtrain float32": update, ...} with equal weights; optax is always in float32."""

    def build(variant: str, dtype: str) -> JaxUpdate | TorchUpdate:
        if variant == "torch":
            return TorchUpdate(dtype, problem)
        cfg = optim_config(dtype)
        make = build_optimizer if variant == "jaxtrain" else optax_muon
        return JaxUpdate(make(cfg, problem.axes), problem)

    return {
        f"{variant} {dtype}": build(variant, dtype)
        for dtype in DTYPES
        for variant in VARIANTS
        if variant in variants and (dtype == "float32" if variant == "optax" else dtype in dtypes)
    }


def check_agreement(
    case: str, updates: Mapping[str, JaxUpdate | TorchUpdate], problem: OptimizerProblem
) -> None:
    """Raises RuntimeError unless all variants made the same first update."""
    axes, start = named_leaves(problem.axes), named_leaves(problem.params)
    first_name, first = "", {}
    for name, update in updates.items():
        changes = {leaf: x - start[leaf] for leaf, x in named_leaves(update.read_params()).items()}
        first_name, first = first_name or name, first or changes
        tolerance = max(AGREEMENT[which.split()[1]] for which in (name, first_name))
        for leaf, change in changes.items():
            if not axes[leaf].is_matrix and "optax" in name + first_name:
                continue
            shape_XIO = axes[leaf].matrix_shape(change.shape)
            norms_X = lambda x, s=shape_XIO: np.linalg.norm(x.reshape(s), axis=(1, 2))
            distance = float(np.max(norms_X(change - first[leaf]) / norms_X(first[leaf])))
            if not distance <= tolerance:
                raise RuntimeError(
                    f"all variants must make the same first update within {tolerance:g}; got "
                    f"{distance:.3g} between {first_name} and {name} in {leaf} of {case}. They are "
                    "different programs, so their ratio means nothing: run tests/test_optim_lmo.py."
                )


def measure(
    size: str,
    rounds: int,
    most_s: float,
    dtypes: Sequence[str] = DTYPES,
    variants: Sequence[str] = VARIANTS,
) -> list[dict[str, Any]]:
    """Returns the rows of one size; `temp_bytes` is None where it is not known."""
    problem = OptimizerProblem(size)
    updates = build_updates(problem, dtypes, variants)
    first_s = warm_up(updates, most_s=0)  # one call only, whose result is then compared
    check_agreement(size, updates, problem)
    for name, update in updates.items():
        if first_s[name] <= most_s:
            update(1)
    rows, stack_bytes = [], problem.largest_stack_bytes
    for name, samples in interleave(updates, rounds, most_s).items():
        update = updates[name]
        row = {"suite": "optimizer", "case": size, "variant": name} | summarise(samples)
        row |= {"first_call_s": update.compile_s + first_s[name]}
        row |= {"temp_bytes": update.temp_bytes, "largest_stack_bytes": stack_bytes}
        rows.append(row)
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns our speed-up in each dtype over optax, and over torch in the same dtype."""
    by_name = {(row["case"], *row["variant"].split()): row for row in rows}
    result = []
    for (case, variant, dtype), ours in by_name.items():
        if variant != "jaxtrain":
            continue
        for other, target in SPEEDUP_TARGETS.items():
            theirs = by_name.get((case, other, "float32" if other == "optax" else dtype))
            if theirs:
                name = f"{ours['variant']} / {theirs['variant']}"
                result.append(ratio_row(ours, theirs, name, target))
    return result


def _share_of_stack(row: dict[str, Any]) -> str:
    if row["temp_bytes"] is None:
        return "-"
    share = row["temp_bytes"] / row["largest_stack_bytes"]
    is_ours = row["variant"].startswith("jaxtrain")
    verdict = target_verdict(share, MOST_OF_STACK, at_most=True) if is_ours else ""
    return f"{share:.2f} {verdict}"


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a table of times and one of ratios."""
    mib = lambda size: "-" if size is None else f"{size / 2**20:.1f}"
    columns = {
        "variant": lambda r: r["variant"].replace("torch float32", "torch float32 (patched)"),
        "temp MiB": lambda r: mib(r["temp_bytes"]),
        "of largest stack": _share_of_stack,
    }
    return format_comparison(rows, ratios(rows), "update", columns)
