"""The cases of crosscheck's acceptance: 200 correct loops, and faults of three sizes."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from tests.crosscheck_models import Fault, Setup, Variant

SIZES = 1.0, 0.1, 0.01  # of each fault
SEEDS = 8  # correct loops of each setup


class Correct(NamedTuple):
    """A correct loop; the comparison must agree."""

    name: str
    setup: Setup
    variant: Variant


class Planted(NamedTuple):
    """A fault, and where a comparison should locate it at full size."""

    base: str  # a key of BASES
    stage: str
    step: int
    tensor: str = ""  # part of the name of the first tensor to look at


# Which parameters decay: jaxtrain's default, nanoGPT's, all as torch.optim.AdamW, matrices only.
DECAYS = (
    "matrices,embedding,head",
    "matrices,embedding,head,positions",
    "matrices,embedding,head,positions,vectors",
    "matrices",
)


def _setups() -> Iterator[tuple[str, Setup]]:
    """Yields 25 named setups, in which options are combined evenly."""
    families = (
        ("gpt2", {"family": "gpt2", "tied": True}),
        ("gpt2-untied", {"family": "gpt2"}),
        ("llama-gqa", {"family": "llama", "kv_heads": 2}),
        ("llama-tied", {"family": "llama", "tied": True, "norm_eps": 1e-6}),
    )
    for i in range(25):
        name, model = families[i % 4]
        # A GPT-2 folder fuses queries, keys and values, which Muon would orthogonalise together.
        # Its Muon loops use the model that stores them apart.
        optimizer = ("adamw", "muon", "adamw", "adamw", "muon")[i // 4 % 5]
        accumulation = (1, 2, 4)[i % 3]
        values = {
            "optimizer": optimizer,
            "accumulation": accumulation,
            "width": (64, 32, 48)[i // 2 % 3],
            "betas": ((0.9, 0.95), (0.9, 0.999))[i // 4 % 2],
            "adam_eps": 1e-6 if i % 8 == 3 else 1e-8,
            "weight_decay": (0.1, 0.0)[i // 3 % 2],
            "decays": DECAYS[i % 5 % 4],
            "clip": (0.5, 0.5, 0.0)[i // 5 % 3],
            "clip_eps": (1e-6, 0.0)[i // 2 % 2],
            "schedule": ("cosine", "constant")[i // 2 % 2],
            "warmup": (3, 1)[i // 7 % 2],
            "rate": (3e-3, 1e-3)[i // 6 % 2],
            "precision": "float64" if i % 7 == 6 else "float32",
            "steps": 8 if i % 5 == 0 else 6,
        }
        values["ns_dtype"] = values["precision"]
        if optimizer == "muon" and i % 3 != 1 and values["precision"] == "float32":
            values["ns_dtype"] = "bfloat16"
        if optimizer == "muon":
            optimizer = f"muon-{values['ns_dtype']}"
        words = (name, optimizer, f"x{accumulation}", values["precision"])
        yield f"{i:02}-{'-'.join(words)}", Setup(**model, **values)


def correct_loops() -> list[Correct]:
    """Returns SEEDS loops of each setup, which differ in seed, module and order of sums."""
    cases = []
    for i, (name, setup) in enumerate(_setups()):
        modules = ["transformers", "plain", "twin"]
        if setup.family == "llama" and setup.precision == "float64":
            modules.remove("transformers")  # its norms and its RoPE are computed in float32
        if setup.family == "gpt2" and setup.optimizer == "muon":
            modules = ["twin"]
        for seed in range(SEEDS):
            n = i + seed
            module = modules[n % len(modules)]
            orders = ("forward", "rows", "channels") if module == "plain" else ("forward", "rows")
            variant = Variant(
                module=module,
                attention=("sdpa", "eager")[seed % 2],
                adam=("fused", "foreach", "single")[n // 2 % 3],
                order=orders[n % len(orders)],
                threads=2 if seed == 7 else 1,
                data=("text", "uniform")[n // 3 % 2],
                spread=seed % 3 > 0,
                seed=100 * i + seed,
            )
            cases.append(Correct(f"{name}/{seed}", setup, variant))
    return cases


_COMMON = {"weight_decay": 0.1, "clip": 0.5, "schedule": "cosine", "warmup": 2}
BASES = {
    "gpt2": Setup("gpt2", tied=True, **_COMMON),
    "gpt2-x4": Setup("gpt2", tied=True, accumulation=4, **_COMMON),
    "llama": Setup("llama", kv_heads=2, optimizer="muon", **_COMMON),
}

FAULTS = {
    "exact gelu": Planted("gpt2", "forward", 1, "blocks.0"),
    "TF32 products": Planted("gpt2", "forward", 1, "blocks.0"),
    "epsilon of the norm": Planted("gpt2", "forward", 1, "blocks.0"),
    "RMSNorm for LayerNorm": Planted("gpt2", "forward", 1, "blocks.0"),
    "no scale of the scores": Planted("gpt2", "forward", 1, "blocks.0"),
    "mask off by one": Planted("gpt2", "forward", 1, "blocks.0"),
    "bias of a projection left out": Planted("gpt2", "forward", 1, "blocks.0"),
    "dropout left on": Planted("gpt2", "forward", 1, "blocks.0"),
    "positions off by one": Planted("gpt2", "forward", 1, "embed"),
    "soft-cap of the logits": Planted("gpt2", "loss", 1),
    "RoPE base": Planted("llama", "forward", 1, "blocks.0"),
    "RoPE interleaved": Planted("llama", "forward", 1, "blocks.0"),
    "key heads in the wrong order": Planted("llama", "forward", 1, "blocks.0"),
    "norm cast to float32": Planted("llama", "forward", 1, "blocks.0"),
    "stale weights": Planted("llama", "forward", 2, "embed"),
    "one weight matrix changed": Planted("gpt2", "start", 0, "h.1.mlp.c_fc"),
    "targets off by one": Planted("gpt2", "loss", 1),
    "label smoothing": Planted("gpt2", "loss", 1),
    "z-loss": Planted("gpt2", "loss", 1),
    "mean of the means of uneven micro-batches": Planted("gpt2-x4", "loss", 1),
    "sum over micro-batches": Planted("gpt2-x4", "gradient", 1),
    "last micro-batch lost": Planted("gpt2-x4", "gradient", 1),
    "gradients not cleared": Planted("gpt2", "gradient", 2),
    "backward pass of a norm": Planted("gpt2", "gradient", 1, "h.0.ln_1"),
    "head detached from the embedding": Planted("gpt2", "gradient", 1, "wte"),
    "no clipping": Planted("gpt2", "optimizer", 1),
    "each tensor clipped alone": Planted("gpt2", "optimizer", 1),
    "epsilon of clip_grad_norm_": Planted("gpt2", "optimizer", 1),
    "learning rate": Planted("gpt2", "optimizer", 1),
    "schedule one step late": Planted("gpt2", "optimizer", 1),
    "first beta": Planted("gpt2", "optimizer", 2),
    "second beta": Planted("gpt2", "optimizer", 2),
    "epsilon of Adam": Planted("gpt2", "optimizer", 1),
    "epsilon inside the root": Planted("gpt2", "optimizer", 1),
    "no bias correction": Planted("gpt2", "optimizer", 1),
    "weight decay in the gradient": Planted("gpt2", "optimizer", 1),
    "weight decay of vectors": Planted("gpt2", "optimizer", 1),
    "no weight decay of the embedding": Planted("gpt2", "optimizer", 1, "wte"),
    "one weight matrix not trained": Planted("gpt2", "optimizer", 1, "h.1.mlp.c_fc"),
    "weights stored in bfloat16": Planted("gpt2", "optimizer", 1),
    "momentum without Nesterov": Planted("llama", "optimizer", 2, "proj"),
    "scale by the wrong fan": Planted("llama", "optimizer", 1, "proj"),
    "Newton-Schulz in bfloat16": Planted("llama", "optimizer", 1, "proj"),
}


def planted_faults() -> list[tuple[str, Planted, Fault]]:
    """Returns (case's name, fault, its size) for every fault and size."""
    pairs = itertools.product(FAULTS.items(), SIZES)
    return [(f"{name}*{size:g}", planted, Fault(name, size)) for (name, planted), size in pairs]
