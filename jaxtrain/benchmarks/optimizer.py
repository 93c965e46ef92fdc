"""Suite optimizer: one update of every parameter, against optax.contrib.muon and torch.optim.Muon.

Same shapes, start and gradients; matrices by Muon, all else by AdamW, no clipping; parameters and
state change in place. What each is given:

- jaxtrain: `build_optimizer` of an OptimConfig, iterating in bfloat16 (the default) and float32.
- optax: the same stacked leaves with the dimension numbers that our axes say, jitted and donated
  with the compiler options of our step. It iterates in float32 alone; its rest is NAdamW.
- torch: a 2D parameter for each matrix of each layer, fused AdamW for the rest. It iterates in
  bfloat16; under "torch float32" its cast is patched away, like against like where the processor
  has no bf16 products.

The first moves must agree, matrix by matrix, or the comparison is refused; for optax that is where
its bias correction, a factor of all, cancels, and its NAdamW is left out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.benchmarks import cpu_training
from jaxtrain.benchmarks.timing import interleave, summarise, verdict, warm_up
from jaxtrain.config.train_config import ModelConfig, OptimConfig, TrainConfig
from jaxtrain.model.trees import named_leaves
from jaxtrain.optim.build import build_optimizer
from jaxtrain.reporting.table import format_table
from jaxtrain.training.run import build_run
from jaxtrain.training.step import Step

GPT_124M = dict(L=12, D=768, H=12, G=12, K=64, F=3_072, V=50_304, norm="layer", norm_eps=1e-5)
GPT_124M |= dict(bias=True, tied=True, position="learned", positions=1_024, mlp="gelu")
SIZES = cpu_training.SIZES | {"124m": GPT_124M}  # the last as configs/gpt_124m.py
DTYPES = ("float32", "bfloat16")  # the strictest to agree with comes first
VARIANTS = ("jaxtrain", "optax", "torch")
AGREEMENT = {"float32": 1e-4, "bfloat16": 5e-2}  # of first moves, relative Frobenius distance
TIMES_AS_FAST = {"optax": 2.0, "torch": 1.0}
MOST_OF_STACK = 1.5  # temporary memory over the largest stack [X,I,O] in float32


class OptimizerProblem:
    """A model's parameters, made once: NumPy trees `params` and `grads`, beside their `axes`."""

    def __init__(self, size: str):
        self.model_cfg = ModelConfig(**SIZES[size])
        model = build_run(TrainConfig(model=self.model_cfg), jax.devices("cpu")[:1]).model
        self.axes = model.axes
        self.params = jax.tree.map(np.array, jax.jit(model.init)(jax.random.key(0)))
        rng = np.random.default_rng(1)
        draw = lambda x: rng.standard_normal(x.shape, np.float32)
        self.grads = jax.tree.map(draw, self.params)

    @property
    def largest_stack_bytes(self) -> int:
        pairs = zip(jax.tree.leaves(self.axes), jax.tree.leaves(self.params), strict=True)
        return max(4 * x.size for a, x in pairs if a.is_matrix)


def optim_config(dtype: str) -> OptimConfig:
    return OptimConfig(
        name="muon",
        ns_dtype=dtype,
        weight_decay=0.1,
        clip_norm=0.0,
        schedule="constant",
        warmup_steps=0,
    )


def optax_muon(cfg: OptimConfig, axes) -> optax.GradientTransformation:
    """optax.contrib.muon with the rates and decays of an OptimConfig, on our stacked leaves."""

    def numbers(a):
        inputs, outputs = ([a.letters.index(x) for x in side] for side in (a.inputs, a.outputs))
        return optax.contrib.MuonDimensionNumbers(tuple(inputs), tuple(outputs))

    return optax.contrib.muon(
        cfg.learning_rate,
        beta=cfg.momentum,
        nesterov=cfg.nesterov,
        weight_decay=cfg.weight_decay,
        adam_b1=cfg.adam_b1,
        adam_b2=cfg.adam_b2,
        eps=cfg.adam_eps,
        adam_weight_decay=cfg.weight_decay,
        adam_learning_rate=cfg.adam_learning_rate,
        muon_weight_dimension_numbers=jax.tree.map(
            lambda a: numbers(a) if a.is_matrix else None, axes
        ),
    )


class JaxUpdate:
    """A GradientTransformation's update, compiled, parameters and state donated."""

    def __init__(self, optimizer, problem):
        def update(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        own = lambda tree: jax.device_put(jax.tree.map(jnp.array, tree), jax.devices("cpu")[0])
        self._params, self._grads = own(problem.params), own(problem.grads)
        self._state = jax.jit(optimizer.init)(self._params)
        function = jax.jit(update, donate_argnums=(0, 1))
        self.step = Step(function, self._params, self._state, self._grads)
        self.compile_s = self.step.compile_s
        self.temp_bytes = self.step.compiled.memory_analysis().temp_size_in_bytes

    def __call__(self, turn):
        del turn
        new = self.step(self._params, self._state, self._grads)
        self._params, self._state = jax.block_until_ready(new)

    def read(self):
        return jax.tree.map(np.array, self._params)


class TorchUpdate:
    """torch.optim's Muon and AdamW on the twin's parameters."""

    compile_s, temp_bytes = 0.0, None

    def __init__(self, dtype, problem):
        from jaxtrain.crosscheck import torch_model, torch_train

        cfg = problem.model_cfg
        self._model = torch_model.build_torch_model(cfg, problem.params)
        grads = torch_model.build_torch_model(cfg, problem.grads).parameters()
        for p, g in zip(self._model.parameters(), grads, strict=True):
            p.grad = g.detach()
        self._optimizers = torch_train.build_optimizers(optim_config(dtype), self._model)
        self._products = lambda: torch_train.muon_products(dtype)
        self.read = lambda: torch_model.read_params(self._model, problem.params)

    def __call__(self, turn):
        del turn
        with self._products():
            for optimizer in self._optimizers:
                optimizer.step()


def contenders(problem, dtypes=DTYPES, variants=VARIANTS) -> dict:
    """{"jaxtrain float32": update, ...}, all from the same start; optax has float32 alone."""
    kinds = {}
    for dtype in (d for d in DTYPES if d in dtypes):
        cfg = optim_config(dtype)
        kinds["jaxtrain", dtype] = lambda cfg=cfg: JaxUpdate(
            build_optimizer(cfg, problem.axes), problem
        )
        kinds["torch", dtype] = lambda dtype=dtype: TorchUpdate(dtype, problem)
    theirs = lambda: JaxUpdate(optax_muon(optim_config("float32"), problem.axes), problem)
    kinds["optax", "float32"] = theirs
    order = sorted(kinds, key=lambda kind: (DTYPES.index(kind[1]), VARIANTS.index(kind[0])))
    return {" ".join(kind): kinds[kind]() for kind in order if kind[0] in variants}


def check_agreement(case, group, problem):
    """Raises RuntimeError unless all that took one step of `problem` moved alike."""
    axes, start = named_leaves(problem.axes), named_leaves(problem.params)
    first = None
    for name, update in group.items():
        moves = {leaf: x - start[leaf] for leaf, x in named_leaves(update.read()).items()}
        first = first or (name, moves)
        within = max(AGREEMENT[which.split()[1]] for which in (name, first[0]))
        for leaf, move in moves.items():
            if not axes[leaf].is_matrix and "optax" in name + first[0]:
                continue
            shape_XIO = axes[leaf].matrix_shape(move.shape)
            norms_X = lambda x, s=shape_XIO: np.linalg.norm(x.reshape(s), axis=(1, 2))
            off = float(np.max(norms_X(move - first[1][leaf]) / norms_X(first[1][leaf])))
            if not off <= within:
                raise RuntimeError(
                    f"variants of one comparison must make the same first step within {within:g}; "
                    f"got {off:.3g} between {first[0]} and {name} in {leaf} of {case}. A ratio "
                    "between different programs says nothing: run tests/test_optim_lmo.py."
                )


def run(size, rounds, most_s, dtypes=DTYPES, variants=VARIANTS) -> list[dict]:
    """Rows of one size: the variants take turns; `temp_bytes` is None where XLA does not say."""
    problem = OptimizerProblem(size)
    group = contenders(problem, dtypes, variants)
    first_s = warm_up(group, most_s=0)  # the first call alone
    check_agreement(size, group, problem)
    for name, update in group.items():
        if first_s[name] <= most_s:
            update(1)
    rows, stack_bytes = [], problem.largest_stack_bytes
    for name, taken in interleave(group, rounds, most_s).items():
        update = group[name]
        row = {"suite": "optimizer", "case": size, "variant": name} | summarise(taken)
        row |= {"first_call_s": update.compile_s + first_s[name]}
        row |= {"temp_bytes": update.temp_bytes, "largest_stack_bytes": stack_bytes}
        rows.append(row)
    return rows


def ratios(rows) -> list[dict]:
    """Ours in each dtype against optax, and against torch in the same dtype."""
    table, out = {(row["case"], *row["variant"].split()): row for row in rows}, []
    for (case, kind, dtype), ours in table.items():
        for theirs, goal in TIMES_AS_FAST.items() if kind == "jaxtrain" else ():
            other = table.get((case, theirs, "float32" if theirs == "optax" else dtype))
            if other is None:
                continue
            ratio = other["wall_s"] / ours["wall_s"]
            row = {"suite": "optimizer", "case": case, "wall": ratio}
            row |= {"ratio": f"{ours['variant']} / {other['variant']}"}
            row |= {"of_minima": other["wall_min_s"] / ours["wall_min_s"]}
            out.append(
                row | {"cpu": other["cpu_s"] / ours["cpu_s"], "target": verdict(ratio, goal)}
            )
    return out


def _memory(row) -> str:
    return "-" if row["temp_bytes"] is None else f"{row['temp_bytes'] / 2**20:.1f}"


def _of_stack(row) -> str:
    if row["temp_bytes"] is None:
        return "-"
    share = row["temp_bytes"] / row["largest_stack_bytes"]
    ours = row["variant"].startswith("jaxtrain")
    return f"{share:.2f}" + (f" {verdict(share, MOST_OF_STACK, at_most=True)}" if ours else "")


def show(rows) -> str:
    times = {
        "case": lambda r: r["case"],
        "variant": lambda r: r["variant"].replace("torch float32", "torch float32 (patched)"),
        "update ms": lambda r: f"{1e3 * r['wall_s']:.1f}",
        "min": lambda r: f"{1e3 * r['wall_min_s']:.1f}",
        "cpu ms": lambda r: f"{1e3 * r['cpu_s']:.1f}",
        "first s": lambda r: f"{r['first_call_s']:.1f}",
        "others": lambda r: f"{r['others']:.0%}",
        "n": lambda r: str(r["samples"]),
        "temp MiB": _memory,
        "of largest stack": _of_stack,
    }
    faster = {
        "case": lambda r: r["case"],
        "times as fast": lambda r: r["ratio"],
        "target": lambda r: r["target"],
        "wall": lambda r: f"{r['wall']:.2f}x",
        "of minima": lambda r: f"{r['of_minima']:.2f}x",
        "cpu": lambda r: f"{r['cpu']:.2f}x",
    }
    compared = ratios(rows)
    parts = [format_table(rows, times)] + ([format_table(compared, faster)] if compared else [])
    return "\n\n".join(parts)
