"""Every field of a config.json is used, checked, or refused by name."""

import json

import pytest
from small_models import export

from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import read_config


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Returns {family: the config.json that an export writes}."""
    root = tmp_path_factory.mktemp("hf")
    names = ("llama", "qwen3", "gpt2", "mistral", "qwen2", "smollm3")
    return {n: json.loads((export(n, root / n) / "config.json").read_text()) for n in names}


def read_values(folder, values):
    """Returns the model that a config.json with these values describes."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(values if type(values) is str else json.dumps(values))
    return read_config(folder)


@pytest.mark.parametrize(
    "family, fields, faults",
    [
        # A Mistral that is relabelled as a Llama. Its logits were 1.3 off.
        ("llama", {"sliding_window": 8}, ["sliding_window=8 (must be None)"]),
        # transformers takes rope_scaling, we took rope_parameters: logits were 6.4 off.
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            [
                "rope_parameters.rope_type='default' and rope_scaling.rope_type='linear'",
                "rope_parameters.factor=None and rope_scaling.factor=4.0",
            ],
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 2e4},
            ["rope_theta=20000.0 and rope_parameters.rope_theta=10000.0, which contradict"],
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "type": "linear"}},
            ["rope_parameters.rope_type='default' and rope_parameters.type='linear'"],
        ),
        ("llama", {"rope_parameters": None, "partial_rotary_factor": 0.5}, ["factor=0.5 (must be"]),
        ("llama", {"rope_parameters": "none"}, ["rope_parameters='none' (not a field that"]),
        (
            "llama",
            {"no_rope_layers": None, "x": {"a": [1]}, "y": 3, "mlp_bias": True},
            ["no_rope_layers=None (not", "x={'a': [1]} (not", "y=3 (not", "mlp_bias=True (must be"],
        ),
        ("llama", {"pruned_heads": {"0": [1]}}, ["pruned_heads={'0': [1]} (must be {} or None)"]),
        ("llama", {"per_layer_config": {"1": {"mlp_bias": True}}}, ["per_layer_config={'1':"]),
        ("llama", {"tie_word_embeddings": None}, ["tie_word_embeddings=None (must be true or"]),
        ("llama", {"num_hidden_layers": True}, ["num_hidden_layers=True (must be a whole"]),
        ("llama", {"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan (must be a finite number)"]),
        ("llama", {"layer_types": ["full_attention"]}, ["sliding_attention in each of 2 la"]),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, ["(must be full_att"]),
        ("llama", {"mlp_bias": True}, ["mlp_bias=True (must be False without attention_bias)"]),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, ["no rope_parameters.factor"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "factor": 4.0}},
            ["rope_parameters.factor=4.0 (not a field that jaxtrain knows"],
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}},
            ["no rope_parameters.high_freq_factor"],
        ),
        ("mistral", {"attention_bias": True}, ["attention_bias=True (must be False)"]),
        (
            "mistral",
            {"layer_types": ["full_attention", "sliding_attention"]},
            ["layer_types that are not those of sliding_window"],
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
            | {"sliding_window": 8},
            ["a window in layers [2] (must be all, or all but every n-th)"],
        ),
        ("smollm3", {"no_rope_layers": [1, 0]}, ["no_rope_layers=[1, 0] (must have a 0 for every"]),
        (
            "smollm3",
            {"no_rope_layers": [0, 1, 1, 1, 1]},
            ["no_rope_layers=[0, 1, 1, 1, 1] (must have a 0 for every n-th of 5 layers, else 1)"],
        ),
        (
            "smollm3",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": None},
            ["a window in layers [4] (must be all, or all but every n-th)"],
        ),
        ("gpt2", {"hidden_size": 64}, ["n_embd=32 and hidden_size=64, which contradict"]),
        ("gpt2", {"n_ctx": 128}, ["n_positions=64 and n_ctx=128, which contradict"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["layer_idx=True (must be False)"]),
        ("gpt2", {"n_head": 5}, ["model.D=32 (must be a multiple of model.H=5)"]),
    ],
)
def test_a_config_is_refused_with_every_field_that_we_do_not_compute(
    configs, tmp_path, family, fields, faults
):
    with pytest.raises(InteropError) as error:
        read_values(tmp_path, configs[family] | fields)
    assert "config.json must describe what jaxtrain computes; got" in str(error.value)
    missing = [fault for fault in faults if fault not in str(error.value)]
    assert not missing, error.value


@pytest.mark.parametrize(
    "family, removed, fields",
    [
        ("llama", "rope_parameters", {}),
        ("llama", "rope_theta", {}),
        ("llama", "rope_parameters", {"rope_scaling": {"type": "default"}}),
        ("llama", "rope_parameters", {"rope_scaling": None}),
        ("llama", "hidden_act", {"hidden_act": "swish", "pretraining_tp": 1, "pruned_heads": {}}),
        ("gpt2", "n_embd", {"hidden_size": 32, "max_position_embeddings": 64, "n_ctx": 64}),
        ("gpt2", "n_inner", {"n_inner": None}),
        ("mistral", "head_dim", {"head_dim": 8, "layer_types": ["sliding_attention"] * 2}),
        ("qwen2", "layer_types", {"max_window_layers": 7}),
        ("qwen2", "sliding_window", {"sliding_window": 4_096}),
        ("smollm3", "no_rope_layers", {"no_rope_layers": None}),
        ("smollm3", "no_rope_layers", {"no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0]}),
        ("smollm3", "rope_scaling", {}),
        ("gpt2", "activation_function", {"activation_function": "gelu_pytorch_tanh"}),
    ],
)
def test_other_spellings_of_the_same_model_are_read_as_it(
    configs, tmp_path, family, removed, fields
):
    values = configs[family]
    other = {name: x for name, x in values.items() if name != removed} | fields
    assert read_values(tmp_path, other) == read_values(tmp_path, values)


def test_a_field_with_two_values_is_refused(configs, tmp_path):
    text = json.dumps(configs["llama"])
    with pytest.raises(InteropError, match="two values of mlp_bias: True and False"):
        read_values(tmp_path, '{"mlp_bias": true, ' + text[1:])
    assert read_values(tmp_path, '{"mlp_bias": false, ' + text[1:])
