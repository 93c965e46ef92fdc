import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config.train_config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.training.run import build_run
from jaxtrain.training.step import build_gradient

torch = pytest.importorskip(
    "torch", reason='torch is missing: pip install "jaxtrain[crosscheck]" to test the twin'
)
from jaxtrain.crosscheck import torch_model, torch_train  # noqa: E402

SMALL = dict(L=2, D=32, H=4, K=8, F=48, V=64, dtype="float32")
ROLLED = SMALL | dict(unroll=1, attention="reference")  # compiles in half the time
FORMS = {
    "llama": SMALL | dict(G=2, qk_norm=True),
    "gpt2": ROLLED
    | dict(norm="layer", position="learned", mlp="gelu", bias=True, tied=True, positions=24),
    "capped": ROLLED | dict(G=1, mlp="relu2", logit_softcap=2.0),
}
B, T = 2, 24
KEY_BIAS = "['blocks']['attention']['k']['b']"  # softmax ignores it: its gradient is 0


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them only fight over matrices this small
    yield
    torch.set_num_threads(threads)


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
    """(params, tokens_BT1) -> logits_BTV, nats, gradients; compiled once for all tests."""
    run = build(form)
    gradient = build_gradient(run.model, run.loss, 1)

    def ours(params, tokens):
        nats, _, grads = gradient(params, {"tokens": tokens})
        return run.model.logits(params, run.model.apply(params, tokens[:, :-1])), nats, grads

    return jax.jit(ours)


def tokens_of(seed):
    tokens = np.random.default_rng(seed).integers(0, SMALL["V"], (B, T + 1), np.int32)
    return tokens, torch.from_numpy(tokens).long()


def weights_of(run):
    """Random weights, gains around 1: every gain and bias is seen at work."""
    rng = np.random.default_rng(7)

    def draw(path, shape):
        middle = 1.0 if path[-1].key == "gain" else 0.0
        return (middle + 0.2 * rng.normal(size=shape.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, run.model.shapes)


def distances(got, want):
    """Relative distance of each leaf, by its path."""
    table = lambda tree: {
        jax.tree_util.keystr(path): np.asarray(x, np.float64)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    got, want = table(got), table(want)
    assert got.keys() == want.keys()
    return {k: np.linalg.norm(got[k] - want[k]) / np.linalg.norm(want[k]) for k in want}


@pytest.mark.parametrize("form", FORMS)
def test_logits_loss_and_gradients_equal_the_twins(form):
    run = build(form)
    params, (tokens, their_tokens) = weights_of(run), tokens_of(0)
    theirs = torch_model.build_torch_model(run.cfg.model, params)
    nats = theirs.loss(their_tokens)
    nats.backward()
    logits, our_nats, grads = our_gradient(form)(params, tokens)
    their_logits = theirs(their_tokens[:, :-1]).detach().numpy()
    assert distances([logits], [their_logits])["[0]"] < 1e-5
    assert float(our_nats) == pytest.approx(float(nats.detach()), rel=1e-5)
    off = distances(grads, torch_model.read_params(theirs, grads, grads=True))
    off.pop(KEY_BIAS, None)
    assert max(off.values()) < 1e-5, off


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_logits_of_twelve_layers_are_within_5e_5(form):
    cfg = ModelConfig(**FORMS[form] | dict(L=12, unroll=1))
    run = build_run(TrainConfig(model=cfg, data=DataConfig(batch=B, seq_len=T)), jax.devices()[:1])
    params, (tokens, their_tokens) = run.model.init(jax.random.key(0)), tokens_of(0)
    ours = jax.jit(lambda p: run.model.logits(p, run.model.apply(p, tokens[:, :-1])))(params)
    theirs = torch_model.build_torch_model(cfg, params)(their_tokens[:, :-1]).detach().numpy()
    assert np.abs(np.asarray(ours) - theirs).max() < 5e-5
    assert np.abs(theirs).max() > 0.1


def moves_of_both(form, steps=5, **optim):
    """How far our weights and the twin's have moved after the same batches."""
    run = build(form, **optim)
    start = weights_of(run)
    model = torch_model.build_torch_model(run.cfg.model, start)
    step = torch_train.build_step(run.cfg, model)

    @jax.jit
    def update(grads, opt_state, params):
        updates, opt_state = run.optimizer.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state

    params, opt_state = start, jax.jit(run.optimizer.init)(start)
    for i in range(steps):
        tokens, their_tokens = tokens_of(i)
        params, opt_state = update(our_gradient(form)(params, tokens)[2], opt_state, params)
        step(their_tokens)
    move = lambda x, y: np.asarray(x, np.float64) - y
    return jax.tree.map(move, params, start), jax.tree.map(
        move, torch_model.read_params(model, start), start
    )


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_five_steps_of_adamw_move_the_weights_as_torchs_does(form):
    # A large epsilon: a gradient that is rounding alone would be divided by its own size.
    off = distances(*moves_of_both(form, name="adamw", adam_eps=1e-4))
    off.pop(KEY_BIAS, None)
    assert max(off.values()) < 1e-4, off


@pytest.mark.parametrize("narrow", ["bfloat16", "float32"])
def test_five_steps_of_muon_move_the_weights_as_torchs_does(narrow):
    off = distances(*moves_of_both("llama", name="muon", ns_dtype=narrow, adam_eps=1e-4))
    assert max(off.values()) < {"float32": 1e-4, "bfloat16": 5e-2}[narrow], off


def test_weights_go_into_the_twin_and_back_unchanged():
    run = build("gpt2")
    params = weights_of(run)
    back = torch_model.read_params(torch_model.build_torch_model(run.cfg.model, params), params)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_weights_of_another_model_are_refused():
    with pytest.raises(ValueError, match="must hold the twin's .* weights; got"):
        torch_model.build_torch_model(ModelConfig(**FORMS["gpt2"]), weights_of(build("llama")))


def test_bf16_of_the_twin_is_near_its_float32_and_masters_stay_float32():
    params, (_, tokens) = weights_of(build("llama")), tokens_of(0)
    wide = torch_model.build_torch_model(ModelConfig(**FORMS["llama"]), params)
    half = torch_model.build_torch_model(
        ModelConfig(**FORMS["llama"] | dict(dtype="bfloat16")), params
    )
    off = distances([half(tokens).detach().numpy()], [wide(tokens).detach().numpy()])
    assert 1e-4 < off["[0]"] < 3e-2
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_without_torch_the_import_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; import jaxtrain.crosscheck.torch_model"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "ImportError: the PyTorch twin needs torch" in run.stderr
    assert 'pip install "jaxtrain[crosscheck]"' in run.stderr
