"""Suite cpu: whole training steps against the PyTorch twin, eager and compiled.

Same weights, batches, compute type and optimizer; a step is gradient, clipping and update. The
first losses must agree, or the comparison is refused.
"""

import jax
import numpy as np

from jaxtrain.benchmarks.processor import peak_of
from jaxtrain.benchmarks.timing import interleave, summarise, verdict, warm_up
from jaxtrain.config.train_config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.metrics.flops import training_flops
from jaxtrain.reporting.table import format_table
from jaxtrain.training.run import build_run, compile_step
from jaxtrain.training.step import init_state

S = dict(L=4, D=256, H=4, G=4, K=64, F=768, V=256, qk_norm=True)
SIZES = {"s": S, "m": S | dict(L=6, D=384, H=6, G=6, F=1_024)}
DTYPES = ("bfloat16", "float32")
OPTIMIZERS = ("adamw", "muon")
VARIANTS = ("jaxtrain", "eager", "compile")
AGREEMENT = {"float32": 1e-4, "bfloat16": 2e-2}  # of the first losses, relative
EAGER_TARGETS = {"s": 1.0, "m": 0.95}  # float32, against eager
FASTEST_TARGETS = {"s": 1.0, "m": 0.9}  # bfloat16, against the faster of eager and compile


class JaxStep:
    """The compiled step of a TrainConfig, called with NumPy tokens and waited for."""

    def __init__(self, cfg):
        run = build_run(cfg, jax.devices("cpu")[:1])
        self._sharding = batch_sharding(run.mesh)
        self._state = init_state(run.model, run.optimizer, run.mesh, cfg.seed)
        self.params = jax.tree.map(np.array, self._state.params)  # copies: the step donates them
        self.step, self._rates = compile_step(run), run.rates()

    def __call__(self, tokens_BT1) -> float:
        batch = {"tokens": jax.device_put(tokens_BT1, self._sharding)}
        self._state, scalars = jax.block_until_ready(self.step(self._state, batch, self._rates))
        return float(scalars["train/loss_nats"])


class TorchStep:
    """The twin's step from the same weights."""

    def __init__(self, cfg, params, compiled):
        import torch

        from jaxtrain.crosscheck import torch_model, torch_train

        self._tensor = torch.from_numpy
        model = torch_model.build_torch_model(cfg.model, params)
        self._step = torch_train.build_step(cfg, model, compiled)

    def __call__(self, tokens_BT1) -> float:
        return float(self._step(self._tensor(tokens_BT1.astype(np.int64))))


class Contender:
    """A variant's step on batch number `turn`, the same for every variant."""

    def __init__(self, step, cfg):
        self._step, self._shape, self._V = step, (cfg.data.batch, cfg.data.seq_len + 1), cfg.model.V
        self.first_nats = None

    def __call__(self, turn):
        tokens = np.random.default_rng(turn).integers(0, self._V, self._shape, np.int32)
        nats = self._step(tokens)
        self.first_nats = nats if self.first_nats is None else self.first_nats


def config_of(size: str, dtype: str, optimizer: str) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(**SIZES[size], dtype=dtype),
        data=DataConfig(batch=8, seq_len=256),
        optim=OptimConfig(name=optimizer, weight_decay=0.1, schedule="constant", warmup_steps=0),
    )


def contenders(cfg, variants) -> dict[str, Contender]:
    """{variant: Contender}, all with the weights that ours starts from."""
    ours = JaxStep(cfg)
    steps = {"jaxtrain": lambda: ours}
    steps |= {
        name: lambda name=name: TorchStep(cfg, ours.params, name == "compile")
        for name in ("eager", "compile")
    }
    return {name: Contender(steps[name](), cfg) for name in variants}


def check_agreement(case, group, dtype):
    """Raises RuntimeError unless the variants' first losses agree."""
    nats = {name: contender.first_nats for name, contender in group.items()}
    low, high = min(nats.values()), max(nats.values())
    if not high - low <= AGREEMENT[dtype] * low:
        raise RuntimeError(
            f"variants of one comparison must compute the same first loss; got {nats} in {case}. "
            "A ratio between different programs says nothing: run tests/test_crosscheck_twin.py."
        )


def run(size, peaks, rounds, most_s, dtypes=DTYPES, optimizers=OPTIMIZERS, variants=VARIANTS):
    """Rows of one size: every case and variant takes turns with all the others."""
    cases = {(dtype, name): config_of(size, dtype, name) for dtype in dtypes for name in optimizers}
    groups, everyone, first_s = {}, {}, {}
    for key, cfg in cases.items():
        group = groups[key] = contenders(cfg, variants)
        named = {(*key, name): contender for name, contender in group.items()}
        first_s |= warm_up(named, most_s)
        check_agreement(" ".join((size, *key)), group, key[0])
        everyone |= named
    samples = interleave(everyone, rounds, most_s)
    rows = []
    for (dtype, optimizer, variant), taken in samples.items():
        cfg = cases[dtype, optimizer]
        tokens = cfg.data.batch * cfg.data.seq_len
        flops = tokens * training_flops(cfg.model, cfg.data.seq_len).total
        row = {"suite": "cpu", "case": f"{size} {dtype} {optimizer}", "variant": variant}
        row |= summarise(taken)
        row["first_call_s"] = first_s[dtype, optimizer, variant]
        row["tokens_per_s"] = tokens / row["wall_s"]
        row["model_flops_per_s"] = flops / row["wall_s"]
        row["of_gemm_peak"] = row["model_flops_per_s"] / peak_of(dtype, peaks)
        rows.append(row)
    return rows


def ratios(rows) -> list[dict]:
    """Ours against theirs, case by case: how many times as fast, by wall and by CPU time."""
    table, out = {}, []
    for row in rows:
        table.setdefault(row["case"], {})[row["variant"]] = row
    for case, by_variant in table.items():
        ours = by_variant.pop("jaxtrain", None)
        if ours is None or not by_variant:
            continue
        size, dtype, optimizer = case.split()
        fastest = min(by_variant, key=lambda name: by_variant[name]["wall_s"])
        for name, theirs in [*by_variant.items(), ("fastest", by_variant[fastest])]:
            ratio = theirs["wall_s"] / ours["wall_s"]
            row = {"suite": "cpu", "case": case, "ratio": f"jaxtrain / {name}", "wall": ratio}
            row |= {"of_minima": theirs["wall_min_s"] / ours["wall_min_s"]}
            row |= {"cpu": theirs["cpu_s"] / ours["cpu_s"], "target": ""}
            if optimizer == "muon":
                goal = 1.0 if name == "fastest" else None
            elif dtype == "bfloat16":
                goal = FASTEST_TARGETS[size] if name == "fastest" else None
            else:
                goal = EAGER_TARGETS[size] if name == "eager" else None
            out.append(row | ({"target": verdict(ratio, goal)} if goal else {}))
    return out


def show(rows) -> str:
    times = {
        "case": lambda r: r["case"],
        "variant": lambda r: r["variant"],
        "step ms": lambda r: f"{1e3 * r['wall_s']:.0f}",
        "min": lambda r: f"{1e3 * r['wall_min_s']:.0f}",
        "cpu ms": lambda r: f"{1e3 * r['cpu_s']:.0f}",
        "tokens/s": lambda r: f"{r['tokens_per_s']:.0f}",
        "GFLOP/s": lambda r: f"{r['model_flops_per_s'] / 1e9:.1f}",
        "of peak": lambda r: f"{r['of_gemm_peak']:.1%}",
        "first s": lambda r: f"{r['first_call_s']:.1f}",
        "others": lambda r: f"{r['others']:.0%}",
        "n": lambda r: str(r["samples"]),
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
