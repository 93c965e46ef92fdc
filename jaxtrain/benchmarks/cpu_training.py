"""Suite cpu: training steps on the processor against PyTorch, eager and compiled.

A step is the gradient, clipping and the update. All variants have the same weights, batches,
compute type and optimizer. The suite fails if their first losses do not agree.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain.benchmarks.jax_child import JaxStep
from jaxtrain.benchmarks.processor import peak_for
from jaxtrain.benchmarks.timing import format_comparison, interleave, ratio_row, summarise, warm_up
from jaxtrain.config.train_config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.metrics.flops import training_flops

S = dict(L=4, D=256, H=4, G=4, K=64, F=768, V=256, qk_norm=True)
SIZES: dict[str, dict[str, Any]] = {"s": S, "m": S | dict(L=6, D=384, H=6, G=6, F=1_024)}
DTYPES = ("bfloat16", "float32")
OPTIMIZERS = ("adamw", "muon")
VARIANTS = ("jaxtrain", "eager", "compile")
AGREEMENT = {"float32": 1e-4, "bfloat16": 2e-2}  # relative difference of the first losses
# Targets by size for our speed-up over one variant; "fastest" is the faster of PyTorch's two.
TARGETS = {
    ("float32", "adamw"): ("eager", {"s": 1.0, "m": 0.95}),
    ("bfloat16", "adamw"): ("fastest", {"s": 1.0, "m": 0.9}),
    ("float32", "muon"): ("fastest", {"s": 1.0, "m": 1.0}),
    ("bfloat16", "muon"): ("fastest", {"s": 1.0, "m": 1.0}),
}

TrainingStep = Callable[[np.ndarray], float]  # trains on tokens_BT1 and returns the loss


class Contender:
    """Runs a variant's step on batch number `turn`, which is the same for every variant."""

    def __init__(self, step: TrainingStep, cfg: TrainConfig):
        self._step, self._shape, self._V = step, (cfg.data.batch, cfg.data.seq_len + 1), cfg.model.V
        self.first_nats: float | None = None

    def __call__(self, turn: int) -> None:
        tokens = np.random.default_rng(turn).integers(0, self._V, self._shape, np.int32)
        nats = self._step(tokens)
        if self.first_nats is None:
            self.first_nats = nats


def training_config(size: str, dtype: str, optimizer: str) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(**SIZES[size], dtype=dtype),
        data=DataConfig(batch=8, seq_len=256),
        optim=OptimConfig(name=optimizer, weight_decay=0.1, schedule="constant", warmup_steps=0),
    )


def build_contenders(cfg: TrainConfig, variants: Sequence[str]) -> dict[str, Contender]:
    """Returns {variant: Contender}, all from the same weights."""
    jax_step = JaxStep(cfg, jax.devices("cpu")[:1])
    params = jax.tree.map(np.array, jax_step.init().params)  # copies: the step donates its own

    def build_step(variant: str) -> TrainingStep:
        if variant == "jaxtrain":
            return jax_step
        import torch

        from jaxtrain.crosscheck import torch_model, torch_train

        model = torch_model.build_torch_model(cfg.model, params)
        step = torch_train.build_step(cfg, model, compiled=variant == "compile")
        return lambda tokens_BT1: float(step(torch.from_numpy(tokens_BT1.astype(np.int64))))

    return {variant: Contender(build_step(variant), cfg) for variant in variants}


def check_agreement(case: str, contenders: Mapping[str, Contender], dtype: str) -> None:
    """Raises RuntimeError unless the variants' first losses agree."""
    nats = {name: contender.first_nats or np.nan for name, contender in contenders.items()}
    low, high = min(nats.values()), max(nats.values())
    if not high - low <= AGREEMENT[dtype] * low:
        raise RuntimeError(
            f"all variants must compute the same first loss; got {nats} in {case}. They are "
            "different programs, so their ratio means nothing: run "
            "tests/test_crosscheck_torch_model.py."
        )


def measure(
    size: str,
    peaks: Mapping[str, float],
    rounds: int,
    most_s: float,
    dtypes: Sequence[str] = DTYPES,
    optimizers: Sequence[str] = OPTIMIZERS,
    variants: Sequence[str] = VARIANTS,
) -> list[dict[str, Any]]:
    """Returns the rows of one size; all variants of all cases take turns."""
    configs = {
        (dtype, name): training_config(size, dtype, name) for dtype in dtypes for name in optimizers
    }
    everyone, first_s = {}, {}
    for (dtype, optimizer), cfg in configs.items():
        contenders = build_contenders(cfg, variants)
        named = {(dtype, optimizer, name): contender for name, contender in contenders.items()}
        first_s |= warm_up(named, most_s)
        check_agreement(f"{size} {dtype} {optimizer}", contenders, dtype)
        everyone |= named
    rows = []
    for (dtype, optimizer, variant), samples in interleave(everyone, rounds, most_s).items():
        cfg = configs[dtype, optimizer]
        tokens = cfg.data.batch * cfg.data.seq_len
        flops = tokens * training_flops(cfg.model, cfg.data.seq_len).total
        row = {"suite": "cpu", "case": f"{size} {dtype} {optimizer}", "variant": variant}
        row |= summarise(samples)
        row["first_call_s"] = first_s[dtype, optimizer, variant]
        row["tokens_per_s"] = tokens / row["wall_s"]
        row["model_flops_per_s"] = flops / row["wall_s"]
        row["of_gemm_peak"] = row["model_flops_per_s"] / peak_for(dtype, peaks)
        rows.append(row)
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns our speed-up over each PyTorch variant and over the faster one, case by case."""
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["variant"]] = row
    result = []
    for case, variants in by_case.items():
        ours = variants.pop("jaxtrain", None)
        if ours is None or not variants:
            continue
        size, dtype, optimizer = case.split()
        fastest = min(variants.values(), key=lambda row: row["wall_s"])
        rival, targets = TARGETS[dtype, optimizer]
        for name, theirs in [*variants.items(), ("fastest", fastest)]:
            target = targets[size] if name == rival else None
            result.append(ratio_row(ours, theirs, f"jaxtrain / {name}", target))
    return result


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a table of times and one of ratios."""
    columns = {
        "tokens/s": lambda r: f"{r['tokens_per_s']:.0f}",
        "GFLOP/s": lambda r: f"{r['model_flops_per_s'] / 1e9:.1f}",
        "of peak": lambda r: f"{r['of_gemm_peak']:.1%}",
    }
    return format_comparison(rows, ratios(rows), "step", columns)
