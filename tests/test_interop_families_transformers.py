"""A config.json that transformers writes is read as transformers reads it, or refused.

Each field is changed, set to null and removed. Where the result is accepted, transformers and
jaxtrain must compute the same logits from the same weights.
"""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import tree_of

from jaxtrain.interop import InteropError
from jaxtrain.interop.families import FAMILIES
from jaxtrain.interop.families.family import IGNORED
from jaxtrain.interop.hf import read_config, read_weights
from jaxtrain.model.transformer import build_model
from jaxtrain.model.trees import named_leaves
from jaxtrain.ops.routes import choose_routes

TOKENS = np.random.default_rng(0).integers(0, 96, (1, 12))
# By their names in transformers' base class, which every family maps to its own.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": None,
}
# Where a family has these fields, too.
FURTHER = {"intermediate_size": 24, "n_inner": 24, "head_dim": 8, "num_key_value_heads": 1}
# Spellings that transformers reads, although it no longer writes them.
LEGACY = [
    {"rope_theta": 50.0},
    {"rope_theta": 50.0, "rope_parameters": None},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": None},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 50.0},
    {"rope_scaling": {"type": "default", "rope_theta": 50.0}},
    {"partial_rotary_factor": 0.5},
    {"hidden_size": 32},
    {"num_attention_heads": 4},
    {"num_hidden_layers": 1},
    {"sliding_window": 2},
    {"sliding_window": 2, "use_sliding_window": True, "layer_types": None},
    {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 2},
    {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 2}
    | {"use_sliding_window": True},
    {"sliding_window": None},
    {"sliding_window": 2, "use_sliding_window": True, "layer_types": None, "max_window_layers": 0},
    {"sliding_window": 2, "use_sliding_window": True, "layer_types": None, "max_window_layers": 1},
    {"no_rope_layers": [1, 0]},
    {"no_rope_layers": None, "no_rope_layer_interval": 2},
    {"no_rope_layers": None, "no_rope_layer_interval": 1},
    {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 9.0, "factor": 4.0}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    },
    {
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 0.5}
        | {"high_freq_factor": 2, "original_max_position_embeddings": 8},
        "rope_parameters": None,
    },
    {"torch_dtype": "bfloat16", "name_or_path": "x", "num_labels": 3, "top_k": 5},
]


def paths(value, path=()):
    """Yields the path of each field, in nested objects too, except in tables of labels."""
    for key, x in value.items():
        yield (*path, key)
        if isinstance(x, dict) and key not in ("id2label", "label2id"):
            yield from paths(x, (*path, key))


def changed(value):
    """Returns other values of a field's type; for null, one of several types."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value or 1]
    if isinstance(value, float):
        return [2 * value + 0.5]
    if isinstance(value, str):
        return ["gelu", "linear"]
    if isinstance(value, list):
        return [value[:1], ["sliding_attention"] * len(value)]
    return [{}] if isinstance(value, dict) else [True, 2, "tanh"]


def variants(config, skipped=()):
    """Yields (description, config.json) with one field changed, null or missing.

    Args:
        skipped: fields that stay as they are.
    """
    for path in paths(config):
        if path[0] in skipped:
            continue
        parent = functools.reduce(lambda x, key: x[key], path[:-1], config)
        values = [*changed(parent[path[-1]]), None, "removed"]
        for value in values:
            other = copy.deepcopy(config)
            parent = functools.reduce(lambda x, key: x[key], path[:-1], other)
            if value == "removed":
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            yield f"{'.'.join(path)}={value!r}", other
    for fields in LEGACY:
        yield str(fields), {**copy.deepcopy(config), **fields}


class Case:
    """A small model of transformers with random weights, and what both projects compute from it."""

    def __init__(self, model_type, folder):
        reason = "transformers is missing: install the crosscheck extra to compare with it"
        self.transformers = pytest.importorskip("transformers", reason=reason)
        self.torch = pytest.importorskip("torch", reason=reason)
        own = self.transformers.AutoConfig.for_model(model_type)
        sizes = SIZES | {name: x for name, x in FURTHER.items() if hasattr(own, name)}
        self.folder = folder
        own = self.transformers.AutoConfig.for_model(model_type, **sizes)
        self.config = json.loads(own.to_json_string(False))
        model = self.build(self.config)
        generator = self.torch.Generator().manual_seed(0)
        with self.torch.no_grad():
            for x in model.parameters():
                x.copy_(0.3 * self.torch.randn(x.shape, generator=generator))
        model.save_pretrained(folder)
        self.written = json.loads((folder / "config.json").read_text())
        self.weights = model.state_dict()
        self.cfg = self.read(self.config)

    def build(self, config):
        """Returns transformers' model of a config.json."""
        auto = self.transformers.AutoModelForCausalLM
        return auto.from_config(self.parse(config), attn_implementation="eager").float().eval()

    def parse(self, config):
        """Returns transformers' config of a config.json."""
        return self.transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)

    def theirs(self, config):
        """Returns transformers' logits; configs that it reads as equal share them."""
        return self.logits_of(self.parse(copy.deepcopy(config)).to_json_string(False))

    @functools.cache  # noqa: B019 - one case per family
    def logits_of(self, text):
        model = self.build(json.loads(text))
        model.load_state_dict(self.weights)
        with self.torch.no_grad():
            return model(self.torch.from_numpy(TOKENS))[0].numpy()

    def read(self, config):
        (self.folder / "config.json").write_text(json.dumps(config))
        cfg = read_config(self.folder)
        # RoPE has no table of positions: their number changes no logit.
        return dataclasses.replace(cfg, positions=16) if cfg.position == "rope" else cfg

    @functools.cache  # noqa: B019 - one case per family
    def ours(self, cfg):
        # The routes of a GPU, with plain products and attention: they have no custom derivatives,
        # which run slowly without jit.
        cfg = dataclasses.replace(cfg, attention="reference")
        model = build_model(cfg, choose_routes(cfg, False, "gpu", False))
        axes, shapes = named_leaves(model.axes), named_leaves(model.shapes)
        readers = read_weights(self.folder, cfg, axes, shapes)
        params = tree_of(model, {name: jnp.asarray(read()) for name, read in readers.items()})
        with jax.disable_jit():  # the operations are compiled once for all configs
            return np.asarray(model.logits(params, model.apply(params, TOKENS)))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def test_every_field_that_transformers_writes_is_accepted(case):
    assert len(case.config) > 30
    assert case.read(case.written) == case.cfg
    np.testing.assert_allclose(case.ours(case.cfg), case.theirs(case.config), rtol=0, atol=1e-4)


def test_a_changed_field_is_refused_or_changes_both_models_alike(case):
    base, same, changed, wrong = case.theirs(case.config), [], [], []
    # What is ignored in every family is changed in the first alone.
    is_first = case.config["model_type"] == next(iter(FAMILIES))
    skipped = () if is_first else {name for names in IGNORED.values() for name in names}
    for change, config in variants(case.config, skipped):
        try:
            ours = case.ours(case.read(config))
        except InteropError:
            continue
        try:
            theirs = case.theirs(config)
        except Exception:  # transformers refuses the value, by one of many errors
            continue
        (same if np.abs(theirs - base).max() < 1e-4 else changed).append(change)
        if (gap := np.abs(ours - theirs).max()) > 1e-4:
            wrong.append(f"{change} ({gap:.2g})")
    assert not wrong, wrong
    assert len(same) > (50 if is_first else 10) and len(changed) > 1, (same, changed)
