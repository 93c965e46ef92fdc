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
    names = ("llama", "qwen3", "gpt2", "mistral", "qwen2", "smollm3", "gemma3")
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
        # transformers 4 scales, transformers 5.24 does not: logits were 0.04 off.
        (
            "gemma3",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 8.0}},
            ["rope_scaling.type='linear' without rope_scaling.rope_type, which versions of"],
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
    assert ("Remove the unknown ones" in str(error.value)) == ("not a field" in str(error.value))
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


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_null_key_value_heads_are_as_many_as_the_query_heads(configs, tmp_path, family):
    cfg = read_values(tmp_path, configs[family] | {"num_key_value_heads": None})
    assert (cfg.H, cfg.G) == (4, 4)


def json_of(text):
    """Returns the JSON object of NAME=VALUE pairs, and its defaults in transformers 4.56."""
    old = """return_dict=true output_hidden_states=false output_attentions=false torchscript=false
        use_bfloat16=false tf_legacy_loss=false pruned_heads={} chunk_size_feed_forward=0
        is_encoder_decoder=false is_decoder=false cross_attention_hidden_size=null
        add_cross_attention=false tie_encoder_decoder=false max_length=20 min_length=0
        do_sample=false early_stopping=false num_beams=1 num_beam_groups=1 diversity_penalty=0.0
        temperature=1.0 top_k=50 top_p=1.0 typical_p=1.0 repetition_penalty=1.0 length_penalty=1.0
        no_repeat_ngram_size=0 encoder_no_repeat_ngram_size=0 bad_words_ids=null
        num_return_sequences=1 output_scores=false return_dict_in_generate=false
        forced_bos_token_id=null forced_eos_token_id=null remove_invalid_values=false
        exponential_decay_length_penalty=null suppress_tokens=null begin_suppress_tokens=null
        finetuning_task=null id2label={"0":"LABEL_0"} label2id={"LABEL_0":0} tokenizer_class=null
        prefix=null pad_token_id=null sep_token_id=null decoder_start_token_id=null
        task_specific_params=null problem_type=null _name_or_path="" use_cache=true
        _attn_implementation_autoset=false transformers_version="4.56.0" initializer_range=0.02"""
    pairs = (pair.split("=") for pair in f"{old} {text}".split())
    return {name: json.loads(value) for name, value in pairs}


FULL_36 = json.dumps(["full_attention"] * 36, separators=(",", ":"))
ROPES_36 = json.dumps([1, 1, 1, 0] * 9, separators=(",", ":"))
PUBLISHED = {
    "gpt2": """activation_function="gelu_new" architectures=["GPT2LMHeadModel"] attn_pdrop=0.1
        bos_token_id=50256 embd_pdrop=0.1 eos_token_id=50256 layer_norm_epsilon=1e-05
        model_type="gpt2" n_ctx=1024 n_embd=768 n_head=12 n_layer=12 n_positions=1024
        resid_pdrop=0.1 summary_activation=null summary_first_dropout=0.1
        summary_proj_to_labels=true summary_type="cls_index" summary_use_proj=true
        task_specific_params={"text-generation":{"do_sample":true,"max_length":50}}
        vocab_size=50257""",
    "SmolLM2-135M": """architectures=["LlamaForCausalLM"] attention_bias=false attention_dropout=0.0
        bos_token_id=0 eos_token_id=0 hidden_act="silu" hidden_size=576 intermediate_size=1536
        is_llama_config=true max_position_embeddings=8192 model_type="llama"
        num_attention_heads=9 num_hidden_layers=30 num_key_value_heads=3 pretraining_tp=1
        rms_norm_eps=1e-05 rope_interleaved=false rope_scaling=null rope_theta=100000
        tie_word_embeddings=true torch_dtype="bfloat16" vocab_size=49152""",
    "Qwen3-0.6B": """architectures=["Qwen3ForCausalLM"] attention_bias=false attention_dropout=0.0
        bos_token_id=151643 eos_token_id=151645 head_dim=128 hidden_act="silu" hidden_size=1024
        intermediate_size=3072 max_position_embeddings=40960 max_window_layers=28
        model_type="qwen3" num_attention_heads=16 num_hidden_layers=28 num_key_value_heads=8
        rms_norm_eps=1e-06 rope_scaling=null rope_theta=1000000 sliding_window=null
        tie_word_embeddings=true torch_dtype="bfloat16" use_sliding_window=false
        vocab_size=151936""",
    "Llama-3.2-1B": """architectures=["LlamaForCausalLM"] attention_bias=false
        attention_dropout=0.0 bos_token_id=128000 eos_token_id=128001 head_dim=64
        hidden_act="silu" hidden_size=2048 intermediate_size=8192 max_position_embeddings=131072
        mlp_bias=false model_type="llama" num_attention_heads=32 num_hidden_layers=16
        num_key_value_heads=8 pretraining_tp=1 rms_norm_eps=1e-05
        rope_scaling={"factor":32.0,"high_freq_factor":4.0,"low_freq_factor":1.0,"original_max_position_embeddings":8192,"rope_type":"llama3"}
        rope_theta=500000.0 tie_word_embeddings=true torch_dtype="bfloat16" vocab_size=128256""",
    "Mistral-7B-v0.1": """architectures=["MistralForCausalLM"] bos_token_id=1 eos_token_id=2
        hidden_act="silu" hidden_size=4096 intermediate_size=14336 max_position_embeddings=32768
        model_type="mistral" num_attention_heads=32 num_hidden_layers=32 num_key_value_heads=8
        rms_norm_eps=1e-05 rope_theta=10000.0 sliding_window=4096 tie_word_embeddings=false
        torch_dtype="bfloat16" vocab_size=32000""",
    "Qwen2.5-0.5B": """architectures=["Qwen2ForCausalLM"] attention_dropout=0.0
        bos_token_id=151643 eos_token_id=151643 hidden_act="silu" hidden_size=896
        intermediate_size=4864 max_position_embeddings=32768 max_window_layers=24
        model_type="qwen2" num_attention_heads=14 num_hidden_layers=24 num_key_value_heads=2
        rms_norm_eps=1e-06 rope_theta=1000000.0 sliding_window=32768 tie_word_embeddings=true
        torch_dtype="bfloat16" use_mrope=false use_sliding_window=false vocab_size=151936""",
    "SmolLM3-3B": f"""architectures=["SmolLM3ForCausalLM"] attention_bias=false
        attention_dropout=0.0 bos_token_id=null eos_token_id=128012 hidden_act="silu"
        hidden_size=2048 intermediate_size=11008 layer_types={FULL_36} max_window_layers=28
        max_position_embeddings=65536 mlp_bias=false model_type="smollm3"
        no_rope_layer_interval=4 no_rope_layers={ROPES_36} num_attention_heads=16
        num_hidden_layers=36 num_key_value_heads=4 pad_token_id=128004 pretraining_tp=2
        rms_norm_eps=1e-06 rope_scaling=null rope_theta=5000000.0 sliding_window=null
        torch_dtype="bfloat16" use_sliding_window=false vocab_size=128256""",
}


@pytest.mark.parametrize(
    "name, fields",
    [
        ("gpt2", {"L": 12, "G": 12, "K": 64, "F": 3_072, "tied": True, "norm_eps": 1e-5}),
        ("SmolLM2-135M", {"L": 30, "G": 3, "K": 64, "rope_theta": 1e5, "positions": 8_192}),
        ("Qwen3-0.6B", {"L": 28, "G": 8, "K": 128, "rope_theta": 1e6, "qk_norm": True}),
        ("Llama-3.2-1B", {"rope_scaling": "llama3", "rope_factor": 32.0, "rope_theta": 5e5}),
        ("Mistral-7B-v0.1", {"window": 4_096, "G": 8, "K": 128, "bias": False}),
        ("Qwen2.5-0.5B", {"window": 0, "attention_bias": "qkv", "K": 64, "tied": True}),
        ("SmolLM3-3B", {"nope_every": 4, "window": 0, "K": 128, "tied": True}),
    ],
)
def test_the_config_of_a_published_model_is_read(tmp_path, name, fields):
    cfg = vars(read_values(tmp_path, json_of(PUBLISHED[name])))
    assert {key: cfg[key] for key in fields} == fields


def test_a_field_with_two_values_is_refused(configs, tmp_path):
    text = json.dumps(configs["llama"])
    with pytest.raises(InteropError, match="two values of mlp_bias: True and False"):
        read_values(tmp_path, '{"mlp_bias": true, ' + text[1:])
    assert read_values(tmp_path, '{"mlp_bias": false, ' + text[1:])
