"""Other people's optimizer settings, which ours must reproduce: torch's Muon, clipping, decay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config.train_config import ModelConfig, OptimConfig, TrainConfig
from jaxtrain.optim.build import build_optimizer
from jaxtrain.training.run import build_run

torch = pytest.importorskip(
    "torch", reason='torch is missing: pip install "jaxtrain[crosscheck]" to test the PyTorch side'
)
transformers = pytest.importorskip("transformers", reason="transformers is missing: crosscheck")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from jaxtrain.crosscheck import jax_train, torch_model, torch_train  # noqa: E402
from jaxtrain.crosscheck.comparison import compare_traces  # noqa: E402
from jaxtrain.crosscheck.explanation import explain  # noqa: E402
from jaxtrain.crosscheck.recorder import Recorder  # noqa: E402
from jaxtrain.crosscheck.torch_weights import read_params  # noqa: E402
from jaxtrain.crosscheck.trace import batches_of, read_trace  # noqa: E402
from jaxtrain.interop.hf import write_folder  # noqa: E402
from jaxtrain.model.trees import named_leaves  # noqa: E402
from tests.crosscheck_sides import (  # noqa: E402, F401
    draw_start,
    one_layer,
    one_thread_and_old_x64_setting,
    small_config,
)

TEXT = "".join(f"line {i}: {i * i} is the square of {i}.\n" for i in range(200))
GPT2 = dict(norm="layer", position="learned", positions=256, mlp="gelu", bias=True, tied=True)
FORMS = {"gpt2": GPT2, "llama": dict(G=2)}
CONSTANT = dict(schedule="constant", warmup_steps=0)


@functools.cache
def run_of(form):
    model = ModelConfig(L=2, D=32, H=4, K=8, F=48, V=64, dtype="float64", **FORMS[form])
    return build_run(TrainConfig(model=model), jax.devices()[:1])


def random_tree(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("gpt2", dict(name="adamw", decay_groups="matrices,embedding,positions")),
        ("gpt2", dict(name="adamw", decay_groups="matrices", clip_norm=0.5, clip_eps=0.25)),
        ("llama", dict(name="muon", decay_groups="head,vectors", clip_eps=1e-6)),
        ("llama", dict(name="adamw", decay_groups="")),
        (
            "gpt2",
            dict(name="muon", adam_weight_decay=0.3, decay_groups="matrices,positions,vectors")
            | dict(embedding_learning_rate=0.3, head_learning_rate=0.1, vector_learning_rate=0.2),
        ),
    ],
)
def test_both_sides_follow_decay_groups_and_clip_eps(form, options):
    jax.config.update("jax_enable_x64", True)
    run = run_of(form)
    cfg = OptimConfig(weight_decay=0.5, ns_dtype="float64", **CONSTANT, **options)
    optimizer = build_optimizer(cfg, run.model.axes)
    params = start = random_tree(run.model.shapes, 0)
    model = torch_model.build_torch_model(run.cfg.model, start)
    theirs = torch_train.build_update(TrainConfig(model=run.cfg.model, optim=cfg), model)

    @jax.jit
    def advance(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    state = optimizer.init(start)
    for step in range(3):
        grads = random_tree(run.model.shapes, 1 + step)
        params, state = advance(params, state, grads)
        sources = torch_model.build_torch_model(run.cfg.model, grads).parameters()
        for p, g in zip(model.parameters(), sources, strict=True):
            p.grad = g.detach()
        theirs()
    for got, want in zip(
        jax.tree.leaves(params), jax.tree.leaves(read_params(model, start)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


def start_from_folder(cfg, folder):
    """Returns our start, and a folder that transformers reads the same float32 weights from."""
    drawn = draw_start(cfg)
    axes = named_leaves(drawn.run.model.axes)
    write_folder(folder, cfg.model, axes, named_leaves(drawn.weights))
    return jax_train.build_start(dataclasses.replace(cfg, weights=str(folder)), read_data=False)


def load_gpt2(folder, dtype):
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()


def train_and_record(model, optimizers, path, steps, precision, clip=0.0):
    """A plain PyTorch loop with the recorder's three lines."""
    generator = torch.Generator().manual_seed(0)
    split = {"c_attn": 3}
    with Recorder(path, model, split, precision=precision) as recorder:
        for _ in range(steps):
            tokens = torch.randint(0, 256, (4, 25), generator=generator)
            x, y = tokens[:, :-1], tokens[:, 1:]
            loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
            loss.backward()
            recorder.before_step(x, y, loss)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            for optimizer in optimizers:
                optimizer.step()
            recorder.after_step()
            model.zero_grad()
    return read_trace(path)


def compare_with(theirs, start, folder):
    path, steps = folder / "ours.jsonl", len(theirs.steps) - 1
    jax_train.record(start, steps, path, "hf", batches_of(theirs), measure_rounding=False)
    return compare_traces(read_trace(path), theirs)


def largest(comparison, quantity):
    found = (d for step in comparison.steps for d in comparison.differences[step])
    return max(d.size for d in found if d.quantity == quantity)


def nanogpt_groups(model, decay):
    """Decays the tensors with two or more dims, as nanoGPT's configure_optimizers does."""
    named = dict(model.named_parameters())
    return [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]


def trainer_groups(model, decay):
    """Decays all parameters but biases and norms, as transformers' Trainer does."""
    decays = set(transformers.Trainer.get_decay_parameter_names(None, model))
    named = dict(model.named_parameters())
    return [
        {"params": [p for n, p in named.items() if n in decays], "weight_decay": decay},
        {"params": [p for n, p in named.items() if n not in decays], "weight_decay": 0.0},
    ]


def test_nanogpts_and_the_trainers_recipes_agree_in_float64(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    options = dict(name="adamw", decay_groups="matrices,embedding,positions,head", clip_norm=0.5)
    options |= dict(weight_decay=0.1, clip_eps=1e-6, adam_learning_rate=6e-4, adam_eps=1e-8)
    cfg = small_config("gpt2", tmp_path, tmp_path / "text.txt", "float64", 3, **CONSTANT, **options)
    start = start_from_folder(one_layer(cfg), tmp_path / "hf")
    compared = []
    for groups in (nanogpt_groups, trainer_groups):
        model = load_gpt2(tmp_path / "hf", torch.float64)
        adamw = torch.optim.AdamW(groups(model, 0.1), lr=6e-4, betas=(0.9, 0.95), eps=1e-8)
        path = tmp_path / f"{groups.__name__}.jsonl"
        compared.append(train_and_record(model, [adamw], path, 3, "float64", clip=0.5))
    found = compare_with(compared[0], start, tmp_path)
    assert found.divergence is None, explain(found)
    for quantity in ("update", "parameter"):
        assert largest(found, quantity) < 1e-10
    assert largest(compare_traces(*compared), "parameter") == 0
    grad_norms = [record["grad_norm"] for record in compared[0].steps[1:]]
    assert min(grad_norms) > 0.5  # every step is clipped


def median_off(theirs, start, folder, **optim):
    """Returns the median difference of the matrices' first updates under other settings of ours."""
    cfg = start.run.cfg
    cfg = dataclasses.replace(cfg, steps=1, optim=dataclasses.replace(cfg.optim, **optim))
    start = start._replace(run=build_run(cfg, jax.devices()[:1]))
    found = compare_with(theirs, start, folder)
    is_matrix = lambda d: d.quantity == "update" and d.tensor.endswith("_proj.weight")
    return np.median([d.size for d in found.differences[1] if is_matrix(d)])


def test_a_loop_with_stock_torch_muon_is_followed_in_bfloat16_products(tmp_path):
    """In float64 all else is exact. Rounding of bfloat16 sums differs between the libraries."""
    (tmp_path / "text.txt").write_text(TEXT)
    options = dict(name="muon", weight_decay=0.1, clip_norm=0.0, learning_rate=0.01, adam_eps=1e-8)
    cfg = small_config(
        "llama", tmp_path, tmp_path / "text.txt", "float64", 1, **CONSTANT, **options
    )
    start = start_from_folder(one_layer(cfg), tmp_path / "hf")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    named = dict(model.named_parameters())
    matrices = [n for n in named if n.endswith("_proj.weight")]
    tables = ["model.embed_tokens.weight", "lm_head.weight"]
    norms = [n for n in named if n not in matrices + tables]
    group = lambda names, decay: {"params": [named[n] for n in names], "weight_decay": decay}
    muon = torch.optim.Muon([named[n] for n in matrices], lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW(
        [group(tables, 0.1), group(norms, 0.0)], lr=3e-3, betas=(0.9, 0.95), eps=1e-8
    )
    theirs = train_and_record(model, [muon, adamw], tmp_path / "t.jsonl", 1, "float64")
    off = functools.partial(median_off, theirs, start, tmp_path)
    as_torch = off(ns_form="torch", ns_dtype="bfloat16")
    assert as_torch < 3e-3
    assert off(ns_form="auto", ns_dtype="float64") > max(4 * as_torch, 1e-2)
