import dataclasses
import json
import shlex

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import MODELS, TOKENS, export, logits, model_of, read

from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import read_config, write_folder
from jaxtrain.interop.hf_files import INDEX, WHOLE, save_tensors
from jaxtrain.model.trees import named_leaves


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {name: export(name, root / name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_an_export_is_read_back_bitwise(folders, name):
    cfg, _, params = model_of(name)
    assert vars(read_config(folders[name])) == vars(cfg)
    got, want = read(folders[name], name), named_leaves(params)
    assert got.keys() == want.keys()
    for key, x in got.items():
        np.testing.assert_array_equal(x, want[key])


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_logits_from_an_export(folders, name):
    reason = "transformers is missing: install the crosscheck extra to compare with it"
    transformers = pytest.importorskip("transformers", reason=reason)
    torch = pytest.importorskip("torch", reason=reason)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(TOKENS)).logits.numpy()
    _, model, params = model_of(name)
    np.testing.assert_allclose(logits(model, params), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype, bits", [("bfloat16", 8), ("float16", 11)])
def test_an_export_in_a_16_bit_dtype_has_the_rounded_weights(tmp_path, dtype, bits):
    folder = export("llama", tmp_path / "out", dtype=dtype)
    _, _, params = model_of("llama")
    for key, x in read(folder, "llama").items():
        np.testing.assert_allclose(x, named_leaves(params)[key], rtol=2.0**-bits, atol=1e-7)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


def test_a_large_export_is_split_into_indexed_files(tmp_path):
    folder = export("llama", tmp_path / "out", part_bytes=20_000)
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 2 and (folder / INDEX).exists() and not (folder / WHOLE).exists()
    assert len(list(folder.iterdir())) == len(parts) + 2
    whole = named_leaves(model_of("llama")[2])
    for key, x in read(folder, "llama").items():
        np.testing.assert_array_equal(x, whole[key])


def test_an_export_that_fails_its_check_leaves_nothing(tmp_path):
    def refuse(folder):
        assert (folder / WHOLE).exists()
        raise InteropError("no")

    with pytest.raises(InteropError, match="no"):
        export("llama", tmp_path / "out", verify=refuse)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_with_the_size_of_the_weights(tmp_path):
    # A missing folder fails in the same library call as a full disk.
    with pytest.raises(InteropError, match="must have space for 128 bytes; got .*Set --to"):
        save_tensors({"x": np.zeros((4, 8), np.float32)}, tmp_path / "out" / "none" / WHOLE)


def test_an_export_never_overwrites_an_existing_folder(folders):
    with pytest.raises(InteropError, match="must go to a new folder"):
        export("llama", folders["llama"])


def test_a_file_without_name_prefix_and_with_buffers_is_read(folders, tmp_path):
    tensors = load_file(folders["gpt2"] / WHOLE)
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    copy = damaged(folders["gpt2"], tmp_path, bare)
    for key, x in read(copy, "gpt2").items():
        np.testing.assert_array_equal(x, named_leaves(model_of("gpt2")[2])[key])


def damaged(folder, tmp_path, tensors=None, **config):
    out = tmp_path / "damaged"
    out.mkdir()
    values = json.loads((folder / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(values))
    save_file(tensors or load_file(folder / WHOLE), out / WHOLE)
    return out


def test_all_faults_of_the_tensors_are_in_one_error(folders, tmp_path):
    tensors = load_file(folders["llama"] / WHOLE)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 31), np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    with pytest.raises(InteropError) as error:
        read(damaged(folders["llama"], tmp_path, tensors), "llama")
    for fault in (
        "model.norm.weight is missing",
        "model.layers.1.mlp.up_proj.weight is [48, 31], must be [48, 32]",
        "model.layers.2.mlp.up_proj.weight is unexpected",
    ):
        assert fault in str(error.value)


def test_tensors_with_nan_or_infinity_are_listed_with_their_counts(folders, tmp_path):
    tensors = load_file(folders["gpt2"] / WHOLE)
    name = "transformer.h.1.attn.c_attn.weight"  # three parameters of ours
    tensors[name][0, :3] = np.nan, np.inf, -np.inf
    large = tensors["transformer.ln_f.bias"].astype(np.float64)
    large[5] = 1e300
    copy = damaged(folders["gpt2"], tmp_path, tensors | {"transformer.ln_f.bias": large})
    with pytest.raises(InteropError) as error:
        read(copy, "gpt2")
    assert f"{name} has 1 NaN and 2 infinite of 3,072 values in float32" in str(error.value)
    assert "ln_f.bias has 0 NaN and 1 infinite of 32 values in float32" in str(error.value)
    assert str(error.value).count(" has ") == 2


@pytest.mark.parametrize("files", [["pytorch_model.bin"], ["b.pth", "pytorch_model-1.bin"]])
def test_a_folder_of_pytorch_files_is_refused_with_a_command_that_converts_them(
    folders, tmp_path, files
):
    torch = pytest.importorskip("torch", reason="torch is missing: install the crosscheck extra")
    copy = damaged(folders["llama_tied"], tmp_path)
    tensors = {k: torch.from_numpy(x) for k, x in load_file(copy / WHOLE).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # shares its memory
    for i, file in enumerate(files):
        part = {k: x for n, (k, x) in enumerate(tensors.items()) if n % len(files) == i}
        torch.save(part, copy / file)
    (copy / WHOLE).unlink()
    torch.save({"steps": 3}, copy / "training_args.bin")
    with pytest.raises(InteropError) as error:
        read(copy, "llama_tied")
    text, _, command = str(error.value).partition(f" Convert {', '.join(files)}: ")
    assert text.endswith("model.safetensors.") and "training_args" not in command
    exec(shlex.split(command)[2], {})
    for key, x in read(copy, "llama_tied").items():
        np.testing.assert_array_equal(x, named_leaves(model_of("llama_tied")[2])[key])


def test_a_stored_head_of_a_tied_model_must_equal_its_embedding(folders, tmp_path):
    tensors = load_file(folders["llama_tied"] / WHOLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(InteropError, match="lm_head.weight is not the embedding"):
        read(damaged(folders["llama_tied"], tmp_path, tensors), "llama_tied")


def test_a_truncated_file_is_named(folders, tmp_path):
    copy = damaged(folders["llama"], tmp_path)
    data = (copy / WHOLE).read_bytes()
    (copy / WHOLE).write_bytes(data[: len(data) // 2])
    with pytest.raises(InteropError, match="model.safetensors must be a complete safetensors file"):
        read(copy, "llama")


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("llama", {"architectures": ["PhiForCausalLM"]}, "LlamaForCausalLM, .*; got"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' .must be 'silu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True .must be False without attention_bias"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "RoPE of the type 'yarn'"),
        ("llama", {"model_type": "mistral"}, "model_type='mistral' .must be 'llama'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map="),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads=0 .must be a whole"),
        ("llama", {"hidden_size": "32"}, "hidden_size='32' .must be a whole number"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types with sliding_attention, but no sliding_window",
        ),
    ],
)
def test_a_config_that_our_model_does_not_compute_is_refused(
    folders, tmp_path, name, fields, message
):
    with pytest.raises(InteropError, match=message):
        read_config(damaged(folders[name], tmp_path, **fields))


@pytest.mark.parametrize("content", ["[]", "{", '"text"', "[" * 200_000])
def test_a_damaged_config_is_named(folders, tmp_path, content):
    copy = damaged(folders["llama"], tmp_path)
    (copy / "config.json").write_text(content)
    with pytest.raises(InteropError, match="config.json must contain "):
        read_config(copy)


def test_an_index_without_a_map_is_named(folders, tmp_path):
    copy = damaged(folders["llama"], tmp_path)
    (copy / WHOLE).unlink()
    (copy / INDEX).write_text("{}")
    with pytest.raises(InteropError, match="index.json must contain a weight_map"):
        read(copy, "llama")


def test_a_whole_file_is_read_instead_of_an_index_beside_it_as_by_transformers(folders, tmp_path):
    copy = damaged(folders["llama"], tmp_path)
    part = "model-00001-of-00001.safetensors"
    tensors = load_file(copy / WHOLE)
    save_file({name: 2 * x for name, x in tensors.items()}, copy / part)
    (copy / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, part)}))
    got, want = read(copy, "llama"), read(folders["llama"], "llama")
    np.testing.assert_array_equal(got["embed"], want["embed"])


GEMMA2 = vars(MODELS["gemma2"])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"logit_softcap": 30.0}, "nearest, llama, .* model.logit_softcap=30.0 .must be 0.0"),
        ({"qk_norm": True, "mlp": "relu2"}, "nearest, qwen3, .* model.mlp='relu2'"),
        ({"norm": "layer"}, "model.norm='layer'"),
        ({"nope_every": 3}, "does not have model.nope_every=3"),
        ({"window": 8, "global_every": 3}, "nearest, mistral, .* model.global_every=3 .must be 0"),
        (GEMMA2 | {"attention_scale": 2.0}, "gemma2, .* model.attention_scale=2.0 .must be 1/sqrt"),
        (GEMMA2 | {"global_every": 3}, "gemma2, .* model.global_every=3 .must be 0, or with"),
    ],
)
def test_a_model_that_no_family_computes_is_refused_before_anything_is_written(
    tmp_path, fields, message
):
    cfg, model, params = model_of("llama")
    odd = dataclasses.replace(cfg, **fields)
    with pytest.raises(InteropError, match=message):
        write_folder(tmp_path / "out", odd, named_leaves(model.axes), named_leaves(params))
    assert not list(tmp_path.iterdir())


def test_special_tokens_are_null_unless_they_are_given(folders, tmp_path):
    """Null is not transformers' default: a Llama's eos would be the ordinary token 2."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    config = json.loads((folders["llama"] / "config.json").read_text())
    assert [config[name] for name in names] == [None] * 3
    given = {"bos_token_id": 5, "eos_token_id": [5, 7]}
    config = json.loads(
        (export("llama", tmp_path / "x", special=given) / "config.json").read_text()
    )
    assert [config[name] for name in names] == [5, [5, 7], None]
