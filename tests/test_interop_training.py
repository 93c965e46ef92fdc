"""A family's model, read from transformers' files, trains and continues a text as transformers'.

`python tests/test_interop_training.py [NAME ...]` prints the differences of small models.
"""

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import MODELS, export, model_of, read, tree_of

from jaxtrain.config.train_config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.crosscheck.tensor_names import as_stored, build_naming, relative_to_stored
from jaxtrain.interop.families import family_of_model
from jaxtrain.interop.hf import hf_tensors, read_config
from jaxtrain.model.trees import named_leaves
from jaxtrain.training.run import build_run
from jaxtrain.training.step import build_gradient

REASON = "transformers is missing: install the crosscheck extra to compare with it"
transformers = pytest.importorskip("transformers", reason=REASON)
torch = pytest.importorskip("torch", reason=REASON)

FAMILIES = ["olmo2", "gemma2", "gemma3", "nanochat", "mistral", "qwen2_window", "smollm3"]
STEPS, NEW_TOKENS = 3, 12
PROMPT = [5, 17, 3, 60, 41, 8]
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

    opt_state, losses = jax.jit(run.optimizer.init)(params), []
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

    @jax.jit
    def extend(params, cache, tokens, at):
        hidden, cache = model.extend(params, cache, tokens, at)
        return model.logits(params, hidden)[0, -1].argmax(), cache

    cache, tokens = model.init_cache(1, len(prompt) + NEW_TOKENS), list(prompt)
    for i in range(len(prompt) + NEW_TOKENS - 1):
        likeliest, cache = extend(params, cache, np.asarray([[tokens[i]]]), i)
        if i + 1 == len(tokens):
            tokens.append(int(likeliest))
    return tokens


class Result(NamedTuple):
    """What both sides computed from the same weights on the same tokens."""

    cfg: ModelConfig
    start: Any  # our parameters before the first step, by name
    logits: float  # largest difference before training, relative to the largest logit
    losses: float  # largest difference in STEPS steps, nats
    changes: float  # largest difference of a tensor's change in training, relative to the change
    ours: list[int]  # a prompt with NEW_TOKENS greedy tokens, after training
    theirs: list[int]


@functools.cache
def compare(name, root):
    """Trains our model and transformers' from the same exported folder."""
    folder = export(name, root / name)
    cfg, load = read_config(folder), transformers.AutoModelForCausalLM.from_pretrained
    run, start = run_of(cfg), read(folder, name)
    theirs = load(folder, dtype=torch.float32, attn_implementation="eager").eval()
    params = tree_of(run.model, start)
    with torch.no_grad():
        want = theirs(torch.from_numpy(TOKENS[0])).logits.numpy()
    score = jax.jit(lambda params: run.model.logits(params, run.model.apply(params, TOKENS[0])))
    logits = np.abs(score(params) - want)
    our_losses, params = train_ours(run, params)
    losses = np.abs(np.subtract(our_losses, train_theirs(theirs)))
    family, axes = family_of_model(cfg), named_leaves(run.model.axes)

    def stored(named):
        wide = {name: np.asarray(x, np.float64) for name, x in named.items()}
        return dict(hf_tensors(family, cfg, axes, wide, np.float64))

    before, after = stored(start), stored(named_leaves(params))
    end = {name: x.double().numpy() for name, x in theirs.state_dict().items()}
    distance = lambda name, x: np.linalg.norm(x[name] - end[name])
    changes = [distance(name, after) / distance(name, before) for name in before]
    prompt = PROMPT
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    continued = theirs.generate(torch.tensor([prompt]), **options)[0].tolist()
    ours = continue_ours(run.model, params, prompt)
    return Result(
        *(cfg, start, float(logits.max() / np.abs(want).max()), float(losses.max())),
        *(float(max(changes)), ours, continued),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


@pytest.mark.parametrize("name", FAMILIES)
def test_three_steps_and_greedy_tokens_equal_those_of_transformers(name, root):
    found = compare(name, root)
    assert found.logits < 1e-5
    assert found.losses < 1e-5
    assert found.changes < 2e-4
    assert found.ours == found.theirs and len(set(found.ours[len(PROMPT) :])) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trace_in_the_style_hf_has_the_names_and_values_of_transformers(name, root):
    found = compare(name, root)
    cfg, axes = found.cfg, model_of(name)[1].axes
    model = transformers.AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32)
    tree = as_stored("hf", cfg, tree_of(model_of(name)[1], found.start))
    ours = dict(build_naming("hf", cfg, axes)(tree))
    theirs = {name: x.detach().numpy() for name, x in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x)


def test_tolerances_of_a_gemmas_norms_are_relative_to_the_stored_values():
    found = relative_to_stored({"norm": 1e-6}, {"norm": np.full(4, 1.5)}, {"norm": np.full(4, 0.5)})
    assert found == {"norm": pytest.approx(3e-6)}


if __name__ == "__main__":
    print("family  logits  loss  changes of weights  greedy tokens")
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or MODELS:
            found = compare(name, Path(folder))
            tokens = "equal" if found.ours == found.theirs else "DIFFERENT"
            gaps = f"{found.logits:.1e}  {found.losses:.1e}  {found.changes:.1e}"
            print(f"{name}  {gaps}  {tokens}", flush=True)
