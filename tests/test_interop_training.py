"""A family's model, read from transformers' files, trains and continues a text as transformers'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import export, read, tree_of

from jaxtrain.config.train_config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.interop.families import family_of_model
from jaxtrain.interop.hf import hf_tensors, read_config
from jaxtrain.model.trees import named_leaves
from jaxtrain.training.run import build_run
from jaxtrain.training.step import build_gradient

REASON = "transformers is missing: install the crosscheck extra to compare with it"
transformers = pytest.importorskip("transformers", reason=REASON)
torch = pytest.importorskip("torch", reason=REASON)

FAMILIES = ["olmo2", "gemma2", "gemma3", "nanochat"]
STEPS, NEW_TOKENS = 3, 12
TOKENS = np.random.default_rng(3).integers(0, 96, (STEPS, 2, 13))
# A large epsilon, or Adam would divide gradients that are rounding errors by their own size.
ADAMW = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_of(cfg: ModelConfig):
    (b1, b2), scanned = ADAMW["betas"], {"unroll": 1, "attention": "reference"}
    optim = OptimConfig(
        **{"name": "adamw", "schedule": "constant", "warmup_steps": 0, "clip_norm": 0.5},
        **{"adam_learning_rate": ADAMW["lr"], "adam_eps": ADAMW["eps"]},
        **{"adam_b1": b1, "adam_b2": b2, "weight_decay": 0.0},
    )
    model = ModelConfig(**vars(cfg) | scanned)
    data = DataConfig(batch=TOKENS.shape[1], seq_len=TOKENS.shape[2] - 1)
    return build_run(TrainConfig(model=model, data=data, optim=optim), jax.devices()[:1])


def train_ours(run, params):
    """Returns the loss of each step, and the parameters after the last."""
    gradient = build_gradient(run.model, run.loss, 1)

    @jax.jit
    def step(params, opt_state, tokens):
        nats, _, grads = gradient(params, {"tokens": tokens})
        updates, opt_state = run.optimizer.update(grads, opt_state, params)
        return nats, jax.tree.map(jnp.add, params, updates), opt_state

    opt_state, losses = run.optimizer.init(params), []
    for tokens in TOKENS:
        nats, params, opt_state = step(params, opt_state, tokens)
        losses.append(float(nats))
    return losses, params


def train_theirs(model):
    """Trains transformers' model in place and returns the loss of each step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), **ADAMW), []
    for tokens in torch.from_numpy(TOKENS):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def continue_ours(model, params, prompt):
    """Returns the likeliest tokens after a prompt, with a key-value cache."""
    extend = jax.jit(model.extend)
    cache, tokens = model.init_cache(1, len(prompt) + NEW_TOKENS), list(prompt)
    for i in range(len(prompt) + NEW_TOKENS - 1):
        hidden, cache = extend(params, cache, np.asarray([[tokens[i]]]), i)
        if i + 1 == len(tokens):
            tokens.append(int(model.logits(params, hidden)[0, -1].argmax()))
    return tokens


@functools.cache
def trained(name, root):
    folder = export(name, root / name)
    cfg = read_config(folder)
    run = run_of(cfg)
    start = read(folder, name)
    losses, params = train_ours(run, tree_of(run.model, start))
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, folder)
    model = load(dtype=torch.float32, attn_implementation="eager").train()
    return cfg, run, start, losses, params, model, train_theirs(model)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


@pytest.mark.parametrize("name", FAMILIES)
def test_three_steps_of_training_equal_those_of_transformers_model(name, root):
    cfg, run, start, losses, params, model, their_losses = trained(name, root)
    np.testing.assert_allclose(losses, their_losses, rtol=2e-6)
    family, axes = family_of_model(cfg), named_leaves(run.model.axes)
    stored = lambda named: dict(hf_tensors(family, cfg, axes, named, np.float64))
    wide = lambda named: {name: np.asarray(x, np.float64) for name, x in named.items()}
    before, after = stored(wide(start)), stored(wide(named_leaves(params)))
    theirs = {name: x.double().numpy() for name, x in model.state_dict().items()}
    change = lambda name, end: end[name] - before[name]
    off = {
        name: np.linalg.norm(change(name, after) - change(name, theirs))
        / np.linalg.norm(change(name, theirs))
        for name in before
    }
    assert max(off.values()) < 2e-4, off


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trained_model_continues_a_text_with_the_tokens_of_transformers(name, root):
    _, run, _, _, params, model, _ = trained(name, root)
    prompt = [5, 17, 3]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    theirs = model.eval().generate(torch.tensor([prompt]), **options)[0].tolist()
    ours = continue_ours(run.model, params, prompt)
    assert ours == theirs and len(set(ours[3:])) > 1
