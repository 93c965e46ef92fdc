"""configs/gpt_track3.py computes and trains what the benchmark that it is named after does."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gpt_track3, track3
from jaxtrain.config.train_config import freeze
from jaxtrain.model.trees import named_leaves
from jaxtrain.optim.build import peak_rates
from jaxtrain.optim.param_groups import group_table
from jaxtrain.study.plan import build_plan
from jaxtrain.training.run import build_run
from jaxtrain.training.step import batch_loss, build_gradient

B, T, STEPS = 3, 20, 30
LAYERS, WIDTH, HEADS, HEAD, V = 2, 32, 2, 16, 96
# Norms and the rest of the model: ours -> the reference's. `{}` is the layer.
NAMES = {
    "embed": "embed.weight",
    "embed_norm.gain": "norm1.gains",
    "final_norm.gain": "norm2.gains",
    "head": "proj.weight",
    "head_bias": "proj.bias",
    "blocks.attention_norm.gain": "blocks.{}.norm1.gains",
    "blocks.mlp_norm.gain": "blocks.{}.norm2.gains",
}
PARTS = {f"attention.{x}": x for x in "qkvo"} | {"mlp.up": "up", "mlp.down": "down"}
for ours, theirs in PARTS.items():
    NAMES[f"blocks.{ours}.w"] = f"blocks.{{}}.{theirs}.weight"
    NAMES[f"blocks.{ours}.b"] = f"blocks.{{}}.{theirs}.bias"


def small_run():
    """Returns a run of the config with a small model, in float64."""
    jax.config.update("jax_enable_x64", True)
    config = gpt_track3.get_config()
    config.steps = STEPS
    config.accumulation = 1
    config.model.update(L=LAYERS, D=WIDTH, H=HEADS, G=HEADS, K=HEAD, F=4 * WIDTH, V=V)
    config.model.update(rope_theta=1_024.0 ** (4 / 3), dtype="float64")  # 4 pairs turn
    config.model.update(unroll=1, attention="reference")  # compile faster
    config.data.update(batch=B, seq_len=T)
    config.optim.update(ns_dtype="float64", adam_eps=1e-10 / (B * T))
    return build_run(freeze(config), jax.devices()[:1])


def to_reference(name, x):
    """Returns one layer's array of ours as the reference stores it: outputs first.

    The halves of each head of queries and keys are exchanged, since its RoPE turns backwards.
    """
    kind, _, last = name.rpartition(".")
    if kind.endswith((".q", ".k")):
        x = x.reshape(*x.shape[:-1], 2, HEAD // 2)[..., ::-1, :].reshape(x.shape)
    if last == "w":
        inputs = x.shape[0] * (x.shape[1] if kind.endswith(".o") else 1)
        return x.reshape(inputs, -1).T
    return x.ravel() if last in ("b", "gain") else x


def as_reference(tree):
    """Returns {the reference's name: array} of a tree of ours."""
    out = {}
    for name, x in named_leaves(tree).items():
        x, theirs = np.asarray(x), NAMES[name]
        layers = enumerate(x) if "{}" in theirs else [(None, x)]
        out |= {theirs.format(i): to_reference(name, part) for i, part in layers}
    return out


def random_weights(run):
    rng = np.random.default_rng(7)
    centre = lambda path: 1.0 if path[-1].key == "gain" else 0.0
    draw = lambda path, x: centre(path) + 0.2 * rng.normal(size=x.shape)
    return jax.tree_util.tree_map_with_path(draw, run.model.shapes)


def largest_distance(got, want):
    assert got.keys() == want.keys()
    return max(np.linalg.norm(got[k] - want[k]) / np.linalg.norm(want[k]) for k in want)


def test_model_muon_and_adam_groups_equal_the_benchmarks_over_a_whole_schedule():
    torch = pytest.importorskip("torch", reason="torch is missing: jaxtrain[crosscheck]")
    from tests import track3_reference

    torch.set_num_threads(1)
    run = small_run()
    params = random_weights(run)
    model = track3_reference.Track3(WIDTH, HEADS, LAYERS, V)
    model.load_state_dict({k: torch.tensor(x) for k, x in as_reference(params).items()})
    their_step = track3_reference.build_step(model, STEPS)
    gradient = build_gradient(run.model, run.loss, 1)

    @jax.jit
    def step(params, opt_state, tokens):
        nats, _, grads = gradient(params, {"tokens": tokens})
        updates, opt_state = run.optimizer.update(grads, opt_state, params)
        return nats, grads, jax.tree.map(jnp.add, params, updates), opt_state

    opt_state = jax.jit(run.optimizer.init)(params)
    batches = np.random.default_rng(3).integers(0, V, (STEPS, B, T + 1))
    for count, tokens in enumerate(batches):
        nats, grads, params, opt_state = step(params, opt_state, tokens)
        loss = model(torch.tensor(tokens[:, :-1]), torch.tensor(tokens[:, 1:]))
        loss.backward()
        assert float(nats) == pytest.approx(loss.item() / (B * T), rel=1e-10)
        theirs = {name: p.grad.numpy() / (B * T) for name, p in model.named_parameters()}
        assert largest_distance(as_reference(grads), theirs) < 1e-10
        their_step(count)
    theirs = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert largest_distance(as_reference(params), theirs) < 1e-10


def test_initial_weights_and_first_loss_are_the_benchmarks():
    run = small_run()
    params = run.model.init(jax.random.key(0))
    tokens = np.arange(B * (T + 1)).reshape(B, T + 1) % V
    weights = jnp.full((B, T), 1 / (B * T))
    nats = batch_loss(run.model, run.loss, params, {"tokens": tokens}, weights)[1]
    assert float(nats) == pytest.approx(math.log(V), rel=1e-12)
    uniform = (0.33 / 768) ** 0.5  # torch's default of 768 inputs, as the benchmark rounds it
    for name, x in named_leaves(params).items():
        role = name.split(".")[-2] if name.endswith(".w") else name
        std = {"embed": 1.0, "q": uniform, "k": uniform, "v": uniform, "up": uniform}.get(role, 0)
        assert float(x.std()) == pytest.approx(std, rel=0.1), name
        assert float(x.mean()) == pytest.approx(1.0 if name.endswith("gain") else 0.0, abs=0.1), (
            name
        )


def test_the_config_has_the_benchmarks_sizes_and_its_groups():
    run = build_run(freeze(gpt_track3.get_config()), jax.devices()[:1])
    layer = 4 * (768 * 768 + 768) + (2 * 768 * 3_072 + 3_072 + 768) + 2 * 768
    assert run.parameters == 2 * 50_304 * 768 + 50_304 + 2 * 768 + 12 * layer
    assert f"{run.parameters:,}" in gpt_track3.__doc__
    rows = {row.name: row for row in group_table(run.cfg.optim, run.model.axes, run.model.shapes)}
    rates = {row.group: (row.rate, row.decay) for row in rows.values()}
    assert rates == {
        "matrices": (0.025, 0.05),
        "embedding": (0.7, 0.001),
        "head": (0.004, 0.001),
        "vector": (0.015, 0.001),
    }
    assert rows["head_bias"].group == "vector"
    assert peak_rates(run.cfg.optim, run.model.axes) == {k: rate for k, (rate, _) in rates.items()}


def test_the_study_runs_the_config_untuned_against_the_benchmarks_target():
    plan = build_plan(track3.get_config())
    study = plan.study
    assert (study.target, study.target_margin, plan.budget("plain")) == (3.28, 0.004, 0)
    muon, normuon = (plan.trial("plain", name, {}, seed=1).config for name in study.contenders)
    benchmark = freeze(gpt_track3.get_config())
    assert muon == dataclasses.replace(benchmark, seed=1, workdir=muon.workdir)
    assert normuon.model == muon.model and normuon.data == muon.data
    assert normuon.steps == muon.steps == 3_250
