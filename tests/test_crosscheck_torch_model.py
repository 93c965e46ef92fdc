import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config.train_config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.training.batch_arrays import target_weights
from jaxtrain.training.run import build_run
from jaxtrain.training.step import batch_loss, build_gradient

torch = pytest.importorskip(
    "torch", reason='torch is missing: pip install "jaxtrain[crosscheck]" to test the PyTorch side'
)
from jaxtrain.crosscheck import torch_model, torch_train, torch_weights  # noqa: E402
from tests.crosscheck_sides import one_thread_and_old_x64_setting  # noqa: E402, F401

SMALL = dict(L=2, D=32, H=4, K=8, F=48, V=64, dtype="float32")
SCANNED = SMALL | dict(unroll=1, attention="reference")  # compiles in half the time
FORMS = {
    "llama": SMALL | dict(G=2, qk_norm=True),
    "gpt2": SCANNED
    | dict(norm="layer", position="learned", mlp="gelu", bias=True, tied=True, positions=24),
    "capped": SCANNED
    | dict(G=1, mlp="relu2", logit_softcap=2.0, window=7, attention_bias="all")
    | dict(rope_scaling="linear", rope_factor=4.0)
    | dict(norm_place="post", qk_norm=True, qk_norm_over="all"),
    "mixed": SCANNED
    | dict(L=4, G=2, window=5, global_every=2, nope_every=4, attention_bias="qkv")
    | dict(rope_local_theta=50.0, rope_scaling="llama3", rope_factor=8.0)
    | dict(rope_theta=100.0, rope_original_positions=16),
    "gemma": SCANNED
    | dict(G=2, norm_place="both", mlp="geglu", tied=True, embed_scale=32**0.5)
    | dict(attention_scale=0.5, attention_softcap=1.0),
    "nanochat": SCANNED | dict(norm_gain=False, qk_norm=True, mlp="relu2", embed_norm=True),
    "track3": SCANNED
    | dict(embed_norm=True, qk_norm=True, qk_norm_gain=False, rope_fraction=0.5, bias=True)
    | dict(head_bias=True, logit_softcap=2.0, logit_softcap_form="sqrt"),
}
B, T = 2, 24
KEY_BIAS = "['blocks']['attention']['k']['b']"  # its true gradient is 0: softmax ignores it


def build(form, **optim):
    optim = dict(schedule="constant", warmup_steps=0, weight_decay=0.1, clip_norm=0.5) | optim
    cfg = TrainConfig(
        model=ModelConfig(**FORMS[form]),
        data=DataConfig(batch=B, seq_len=T),
        optim=OptimConfig(**optim),
    )
    return build_run(cfg, jax.devices()[:1])


@functools.cache
def our_gradient(form):
    """Returns (params, tokens_BT1) -> logits_BTV, nats, gradients; compiled once for all tests."""
    run = build(form)
    gradient = build_gradient(run.model, run.loss, 1)

    def logits_loss_and_gradient(params, tokens):
        nats, _, grads = gradient(params, {"tokens": tokens})
        return run.model.logits(params, run.model.apply(params, tokens[:, :-1])), nats, grads

    return jax.jit(logits_loss_and_gradient)


def random_tokens(seed):
    tokens = np.random.default_rng(seed).integers(0, SMALL["V"], (B, T + 1), np.int32)
    return tokens, torch.from_numpy(tokens).long()


def random_weights(run):
    """Draws all weights at random, gains around 1, so that every gain and bias has an effect."""
    rng = np.random.default_rng(7)

    def draw(path, shape):
        middle = 1.0 if path[-1].key == "gain" else 0.0
        return (middle + 0.2 * rng.normal(size=shape.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, run.model.shapes)


def distances(got, want):
    """Returns the relative distance of each leaf, by path."""
    table = lambda tree: {
        jax.tree_util.keystr(path): np.asarray(x, np.float64)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    got, want = table(got), table(want)
    assert got.keys() == want.keys()
    return {k: np.linalg.norm(got[k] - want[k]) / np.linalg.norm(want[k]) for k in want}


@pytest.mark.parametrize("form", FORMS)
def test_logits_loss_and_gradients_equal_pytorchs(form):
    run = build(form)
    params, (tokens, their_tokens) = random_weights(run), random_tokens(0)
    theirs = torch_model.build_torch_model(run.cfg.model, params)
    nats = theirs.loss(their_tokens)
    nats.backward()
    logits, our_nats, grads = our_gradient(form)(params, tokens)
    their_logits = theirs(their_tokens[:, :-1]).detach().numpy()
    assert distances([logits], [their_logits])["[0]"] < 1e-5
    assert float(our_nats) == pytest.approx(float(nats.detach()), rel=1e-5)
    off = distances(grads, torch_weights.read_params(theirs, grads, grads=True))
    off.pop(KEY_BIAS, None)
    assert max(off.values()) < 1e-5, off


def test_weights_of_targets_give_both_sides_the_same_loss():
    run = build("capped")
    params, (tokens, their_tokens) = random_weights(run), random_tokens(1)
    docs = np.zeros((B, T + 1), np.int32)
    docs[0, 9:], docs[1, 20:] = 1, -1
    weights = (docs[:, 1:] >= 0).astype(np.float32)
    weights[0, 8] = 0  # a document was cut before token 9

    def nats_of(params, batch):
        weights_BT = target_weights(batch)
        return batch_loss(run.model, run.loss, params, batch, weights_BT)[1] / weights_BT.sum()

    ours = jax.jit(nats_of)(params, {"tokens": tokens, "docs": docs, "weights": weights})
    theirs = torch_model.build_torch_model(run.cfg.model, params)
    docs_BT1, weights_BT = torch.from_numpy(docs).long(), torch.from_numpy(weights)
    _, nats = theirs.losses(their_tokens, docs_BT1, weights_BT=weights_BT)
    assert float(ours) == pytest.approx(float(nats.detach()), rel=1e-5)
    _, unweighted = theirs.losses(their_tokens, docs_BT1)
    assert abs(float(unweighted.detach()) - float(ours)) > 1e-3


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_logits_after_twelve_layers_are_within_5e_5_of_pytorchs(form):
    cfg = ModelConfig(**FORMS[form] | dict(L=12, unroll=1))
    run = build_run(TrainConfig(model=cfg, data=DataConfig(batch=B, seq_len=T)), jax.devices()[:1])
    params, (tokens, their_tokens) = run.model.init(jax.random.key(0)), random_tokens(0)
    ours = jax.jit(lambda p: run.model.logits(p, run.model.apply(p, tokens[:, :-1])))(params)
    theirs = torch_model.build_torch_model(cfg, params)(their_tokens[:, :-1]).detach().numpy()
    assert np.abs(np.asarray(ours) - theirs).max() < 5e-5
    assert np.abs(theirs).max() > 0.1


def weight_changes(form, steps=5, **optim):
    """Returns how both sides' weights changed in training on the same batches."""
    run = build(form, **optim)
    start = random_weights(run)
    model = torch_model.build_torch_model(run.cfg.model, start)
    step = torch_train.build_step(run.cfg, model)

    @jax.jit
    def update(grads, opt_state, params):
        updates, opt_state = run.optimizer.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state

    params, opt_state = start, jax.jit(run.optimizer.init)(start)
    for i in range(steps):
        tokens, their_tokens = random_tokens(i)
        params, opt_state = update(our_gradient(form)(params, tokens)[2], opt_state, params)
        step(their_tokens)
    change = lambda x, y: np.asarray(x, np.float64) - y
    theirs = torch_weights.read_params(model, start)
    return jax.tree.map(change, params, start), jax.tree.map(change, theirs, start)


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_five_steps_of_adamw_change_the_weights_as_torchs_adamw_does(form):
    # A large epsilon, or Adam would divide gradients that are rounding errors by their own size.
    off = distances(*weight_changes(form, name="adamw", adam_eps=1e-4))
    off.pop(KEY_BIAS, None)
    assert max(off.values()) < 1e-4, off


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_five_steps_of_muon_change_the_weights_as_torchs_muon_does(dtype):
    off = distances(*weight_changes("llama", name="muon", ns_dtype=dtype, adam_eps=1e-4))
    assert max(off.values()) < {"float32": 1e-4, "bfloat16": 5e-2}[dtype], off


def test_weights_copied_to_pytorch_and_back_are_unchanged():
    run = build("gpt2")
    params = random_weights(run)
    back = torch_weights.read_params(torch_model.build_torch_model(run.cfg.model, params), params)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_weights_of_another_model_are_an_error():
    with pytest.raises(ValueError, match="must have the PyTorch model's .* weights; got"):
        torch_model.build_torch_model(ModelConfig(**FORMS["gpt2"]), random_weights(build("llama")))


def test_bfloat16_in_pytorch_is_near_float32_and_parameters_stay_float32():
    params, (_, tokens) = random_weights(build("llama")), random_tokens(0)
    wide = torch_model.build_torch_model(ModelConfig(**FORMS["llama"]), params)
    half_cfg = ModelConfig(**FORMS["llama"] | dict(dtype="bfloat16"))
    half = torch_model.build_torch_model(half_cfg, params)
    off = distances([half(tokens).detach().numpy()], [wide(tokens).detach().numpy()])
    assert 1e-4 < off["[0]"] < 3e-2
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_without_torch_the_import_error_names_the_extra():
    code = "import sys; sys.modules['torch'] = None; import jaxtrain.crosscheck.torch_model"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: the PyTorch side needs torch" in done.stderr
    assert 'pip install "jaxtrain[crosscheck]"' in done.stderr
